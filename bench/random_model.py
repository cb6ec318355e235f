"""A language model with random weights and the demo model's tokenizer, whose steps take milliseconds on a CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from consumers.demo_model import PATH

HIDDEN, LAYERS = 256, 4


def make(folder: Path) -> Path:
    """Write a Llama with 3.8 million parameters to folder. Returns the folder."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PATH / name, folder)
    config = json.loads((PATH / "config.json").read_text())
    config |= {"hidden_size": HIDDEN, "intermediate_size": 3 * HIDDEN, "num_hidden_layers": LAYERS, "head_dim": 64}
    config |= {"num_attention_heads": HIDDEN // 64, "num_key_value_heads": HIDDEN // 128}
    (folder / "config.json").write_text(json.dumps(config))
    mx.random.seed(1)
    shapes = tree_flatten(llama.Model(llama.ModelArgs.from_dict(config)).parameters())
    weights = {
        name: mx.random.normal(value.shape) * 0.02 if value.ndim > 1 else mx.ones(value.shape) for name, value in shapes
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder

"""Write LoRA adapters for a model, and print what mlx-lm generates with each: `python -m ... MODEL FOLDER PROMPT...`.

Prints one JSON object: the tokens after each prompt, for each adapter (`one`, `two`, `peft`) and, with an empty name,
for the model without one. `peft` is `one` in PEFT's form. Only this process imports MLX.
"""

from __future__ import annotations

import json
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.generate import generate_step
from mlx_lm.tuner.utils import linear_to_lora_layers

TOKENS = 24
LAYERS = {
    "one": {"rank": 4, "scale": 10.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "self_attn.v_proj"]},
    "two": {"rank": 8, "scale": 6.0, "dropout": 0.0, "keys": ["self_attn.v_proj", "mlp.down_proj"]},
}


def write(model: str, name: str, folder: Path, seed: int) -> None:
    """Write an adapter with random weights."""
    loaded, _ = load(model)
    mx.random.seed(seed)
    linear_to_lora_layers(loaded, len(loaded.layers), LAYERS[name])
    weights = {}
    for path, value in tree_flatten(loaded.parameters()):
        if path.endswith("lora_a"):
            weights[path] = value
        elif path.endswith("lora_b"):
            weights[path] = mx.random.normal(value.shape) * 0.08
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": len(loaded.layers), "lora_parameters": LAYERS[name]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_peft(source: Path, folder: Path, shape: dict[str, Any]) -> None:
    """Write an adapter of mlx-lm as PEFT does."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": shape["rank"], "lora_alpha": shape["scale"] * shape["rank"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    names = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
    weights = {}
    for path, value in mx.load(str(source / "adapters.safetensors")).items():
        layer, _, part = path.rpartition(".")
        weights[f"base_model.model.{layer}.{names[part]}"] = mx.contiguous(value.T)
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), weights)


def written(model: str, adapter: str | None, prompts: list[str]) -> list[list[int]]:
    """What the model with the adapter writes after each prompt."""
    loaded, tokenizer = load(model, adapter_path=adapter)
    answers = []
    for prompt in prompts:
        message = {"role": "user", "content": prompt}
        tokens = mx.array(tokenizer.apply_chat_template([message], add_generation_prompt=True))
        said = (int(token) for token, _ in generate_step(tokens, loaded, max_tokens=TOKENS))
        answers.append(list(takewhile(lambda token: token not in tokenizer.eos_token_ids, said)))
    return answers


def main(model: str, root: str, *prompts: str) -> None:
    """Write the adapters, and print what each says."""
    mx.disable_compile()
    folder = Path(root)
    for seed, name in enumerate(LAYERS):
        write(model, name, folder / name, seed)
    write_peft(folder / "one", folder / "peft", LAYERS["one"])
    said = {name: written(model, str(folder / name), list(prompts)) for name in LAYERS}
    print(json.dumps({"": written(model, None, list(prompts)), **said, "peft": said["one"]}))
    mx.clear_streams()


if __name__ == "__main__":
    main(*sys.argv[1:])

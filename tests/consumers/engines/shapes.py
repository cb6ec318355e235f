"""Tiny models with random weights, in the shapes of families whose caches differ. The configurations are our own.

Each has the least that its class in mlx-lm needs. As a program, it writes a model with the demo model's tokenizer and
prints the tokens that the model writes after each prompt: `python -m tests.consumers.engines.shapes SHAPE FOLDER
TOKENS PROMPT...`. Only this process imports MLX.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path
from typing import Any, Final

VOCABULARY: Final = 2560
"""That of the demo model's tokenizer."""

_USUAL: Final[dict[str, Any]] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "rope_theta": 10_000.0,
}
_EXPERTS: Final[dict[str, Any]] = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}

SHAPES: Final[dict[str, dict[str, Any]]] = {
    "llama": {**_USUAL, "model_type": "llama", "max_position_embeddings": 2048},
    "qwen3": {**_USUAL, "model_type": "qwen3", "max_position_embeddings": 40960, "tie_word_embeddings": True},
    "gpt2": {
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 64,
        "n_head": 2,
        "n_layer": 4,
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
        "vocab_size": VOCABULARY,
    },
    "phi3": {
        **_USUAL,
        "model_type": "phi3",
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "longrope", "long_factor": [1.0] * 16, "short_factor": [1.0] * 16},
    },
    "gemma2": {**_USUAL, "model_type": "gemma2", "max_position_embeddings": 8192},
    "gemma3": {
        "model_type": "gemma3",
        "vocab_size": VOCABULARY,
        "text_config": {
            **_USUAL,
            "model_type": "gemma3_text",
            "sliding_window": 16,
            "sliding_window_pattern": 2,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    },
    "gpt_oss": {
        **_USUAL,
        **_EXPERTS,
        "model_type": "gpt_oss",
        "sliding_window": 16,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        },
    },
    "llama4": {
        "model_type": "llama4",
        "text_config": {
            **_USUAL,
            **_EXPERTS,
            "num_experts_per_tok": 1,
            "model_type": "llama4_text",
            "attention_bias": False,
            "attention_chunk_size": 32,
            "interleave_moe_layer_step": 1,
            "intermediate_size_mlp": 64,
            "max_position_embeddings": 10_485_760,
            "rope_scaling": None,
            "use_qk_norm": True,
        },
    },
    "deepseek_v3": {
        **{name: value for name, value in _USUAL.items() if name != "head_dim"},
        "model_type": "deepseek_v3",
        "num_key_value_heads": 2,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "max_position_embeddings": 163840,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    "mamba2": {
        "model_type": "mamba2",
        "num_heads": 4,
        "head_dim": 32,
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "state_size": 16,
        "num_hidden_layers": 4,
        "layer_norm_epsilon": 1e-5,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "tie_word_embeddings": True,
        "time_step_limit": [0.0, 1e9],
        "time_step_rank": "auto",
    },
    "lfm2": {
        "model_type": "lfm2",
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128000,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 64,
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
        "block_ff_dim": 64,
        "full_attn_idxs": [1, 3],
    },
    "qwen3_5": {
        "model_type": "qwen3_5",
        "text_config": {
            **_USUAL,
            "model_type": "qwen3_5_text",
            "max_position_embeddings": 262144,
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "linear_conv_kernel_dim": 4,
            "full_attention_interval": 2,
        },
    },
    "recurrent_gemma": {
        "model_type": "recurrent_gemma",
        "attention_bias": False,
        "conv1d_width": 4,
        "hidden_size": 64,
        "intermediate_size": 64,
        "logits_soft_cap": 30.0,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "attention_window_size": 16,
        "vocab_size": VOCABULARY,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
}


def tiny(name: str) -> Any:
    """The model of a shape, with random weights of a fixed seed."""
    import mlx.core as mx
    from mlx_lm.utils import _get_classes

    config = copy.deepcopy(SHAPES[name])
    kind, arguments = _get_classes(config)
    mx.random.seed(5)
    model = kind(arguments.from_dict(config))
    model.eval()
    mx.eval(model.parameters())
    return model


def write(name: str, folder: Path) -> Any:
    """Write the model of a shape, for MLX to load. Returns it."""
    from mlx_lm.utils import save_model

    from consumers.models.names import located

    model, tokenizer = tiny(name), Path(located("demo"))
    save_model(folder, model)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, folder)
    (folder / "config.json").write_text(json.dumps(SHAPES[name]))
    return model


def main(name: str, folder: str, tokens: str, *prompts: str) -> None:
    """Write a model, and print what it writes."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.tokenizer_utils import load

    mx.disable_compile()
    model, tokenizer = write(name, Path(folder)), load(Path(folder))
    for prompt in prompts:
        steps = generate_step(mx.array(tokenizer.encode(prompt)), model, max_tokens=int(tokens))
        print(json.dumps([int(token) for token, _ in steps]))
    mx.clear_streams()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The shape of a model: from the metadata of a GGUF file to `config.json`, and the names of its tensors.

Three architectures are supported: `llama` (Llama, Mistral, SmolLM), `qwen2` and `qwen3`. What is not supported and
would change an answer is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from gguf import MODEL_ARCH, TensorNameMap

from consumers.models.store import ModelError

_ARCHITECTURES: Final = {
    "llama": (MODEL_ARCH.LLAMA, "LlamaForCausalLM"),
    "qwen2": (MODEL_ARCH.QWEN2, "Qwen2ForCausalLM"),
    "qwen3": (MODEL_ARCH.QWEN3, "Qwen3ForCausalLM"),
}
_OUTER: Final = ("model.embed_tokens", "model.norm", "lm_head")
_ATTENTION: Final = tuple(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"))
_INNER: Final = (
    *("input_layernorm", "post_attention_layernorm"),
    *_ATTENTION,
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
)
ROPE_FACTORS: Final = "rope_freqs.weight"
"""The tensor of the factors by which Llama 3.1 and newer slow the rotation of each pair."""

# How Llama 3.1 and newer stretch their context; the factor alone differs between them.
_LLAMA3_ROPE: Final = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_TOLERANCE: Final = 1e-3


class ModelShape:
    """What the metadata of a GGUF file says of a model's shape.

    Raises:
        ModelError: the architecture is not supported, or the file states no architecture.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields
        self.architecture = str(fields.get("general.architecture", "none"))
        if self.architecture not in _ARCHITECTURES:
            raise ModelError(
                f'The architecture "{self.architecture}" is not supported. A GGUF file must be of one of '
                f"{', '.join(_ARCHITECTURES)}; for others, name a repository or a folder in MLX's format."
            )
        if self._get("expert_count", 0):
            raise ModelError(f'A mixture of experts ("{self.architecture}") is not supported as a GGUF file.')
        self.layers = int(self._get("block_count"))

    def _get(self, key: str, default: Any = None) -> Any:
        value = self._fields.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise ModelError(f"The GGUF file does not state {self.architecture}.{key}. It is incomplete.")
        if isinstance(value, list):
            raise ModelError(f"Layers with different values of {self.architecture}.{key} are not supported.")
        return value

    def names(self) -> dict[str, str]:
        """MLX's name of each tensor that a file of this architecture can hold, by GGUF's name of it."""
        known = TensorNameMap(_ARCHITECTURES[self.architecture][0], self.layers)
        modules = (*_OUTER, *(f"model.layers.{layer}.{part}" for layer in range(self.layers) for part in _INNER))
        return {
            f"{theirs}.{kind}": f"{module}.{kind}"
            for module in modules
            if (theirs := known.get_name(module)) is not None
            for kind in ("weight", "bias")
        }

    def config(
        self, *, vocabulary: int, tensors: Sequence[str], rope_factors: Sequence[float] | None
    ) -> dict[str, Any]:
        """The content of `config.json`, but for quantisation and the ids of tokens.

        Args:
            vocabulary: the number of rows of the embedding.
            tensors: MLX's names of the tensors.
            rope_factors: the content of the tensor `ROPE_FACTORS`, if there is one.

        Raises:
            ModelError: the model stretches its context in a way that is not supported.
        """
        heads, width = int(self._get("attention.head_count")), int(self._get("embedding_length"))
        head = int(self._get("attention.key_length", width // heads))
        if int(self._get("rope.dimension_count", head)) != head:
            raise ModelError("Heads that are rotated only in part are not supported as a GGUF file.")
        base = float(self._get("rope.freq_base", 10_000.0))
        return {
            "model_type": self.architecture,
            "architectures": [_ARCHITECTURES[self.architecture][1]],
            "attention_bias": any(name.endswith("q_proj.bias") for name in tensors),
            "head_dim": head,
            "hidden_size": width,
            "intermediate_size": int(self._get("feed_forward_length")),
            "max_position_embeddings": int(self._get("context_length")),
            "num_attention_heads": heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": int(self._get("attention.head_count_kv", heads)),
            "rms_norm_eps": float(self._get("attention.layer_norm_rms_epsilon")),
            "rope_scaling": self._rope_scaling(base, head, rope_factors),
            "rope_theta": base,
            # In Llama's files, the two numbers of each rotated pair are neighbours.
            "rope_traditional": self.architecture == "llama",
            "tie_word_embeddings": "lm_head.weight" not in tensors,
            "torch_dtype": "float16",
            "vocab_size": vocabulary,
        }

    def _rope_scaling(self, base: float, head: int, factors: Sequence[float] | None) -> dict[str, Any] | None:
        if factors is not None:
            return _llama3(base, head, factors)
        kind = self._get("rope.scaling.type", "none")
        if kind == "none":
            return None
        if kind == "linear":
            return {"rope_type": "linear", "factor": float(self._get("rope.scaling.factor"))}
        raise ModelError(f'The rope scaling "{kind}" is not supported as a GGUF file.')


def _llama3(base: float, head: int, factors: Sequence[float]) -> dict[str, Any]:
    """The parameters from which the factors were computed. The file has only the factors, MLX wants the parameters."""
    factor = float(max(factors))
    again = list(_llama3_factors(base, head, factor))
    if len(again) != len(factors) or any(
        not math.isclose(a, b, rel_tol=_TOLERANCE) for a, b in zip(again, factors, strict=True)
    ):
        raise ModelError("The rope factors of this file are not those of Llama 3, and no others are supported.")
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3_ROPE}


def _llama3_factors(base: float, head: int, factor: float) -> Iterator[float]:
    low, high, context = _LLAMA3_ROPE.values()
    for pair in range(0, head, 2):
        turns = context / (2 * math.pi * base ** (pair / head))
        if turns > high:
            yield 1.0
        elif turns < low:
            yield factor
        else:
            smooth = (turns - low) / (high - low)
            yield 1 / ((1 - smooth) / factor + smooth)

"""How many tokens a model can have before it, from its configuration.

What a configuration does not state is what transformers assumes for this type of model, and else what mlx-lm does. Rope
scaling: `max_position_embeddings` includes it for some types and not for others, as vLLM's documentation of
`--max-model-len` and each type's own configuration have it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

log = logging.getLogger(__name__)

_UNSTATED: Final = 4096
_NO_LIMIT: Final = 10**9
"""Tokenizers without a limit state a number far above this."""

_NAMES: Final = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")
_INNER: Final = ("text_config", "llm_config", "language_config")
_STRETCHED: Final = ("linear", "dynamic")
"""Kinds of rope scaling that multiply the stated length."""


def context_tokens(config: Mapping[str, Any], model: Any, tokenizer: Any) -> int:
    """The context length of a model.

    Args:
        config: the content of its `config.json`.
        model: in mlx-lm, with the arguments that it was made from.
        tokenizer: its tokenizer, whose limit counts where nothing else states one.
    """
    for levels in (_levels(config), _levels(_assumed(config)), _arguments(model)):
        if stated := _stated(levels):
            return stated
    return _sane(getattr(tokenizer, "model_max_length", None)) or _UNSTATED


def _stated(levels: Sequence[Mapping[str, Any]]) -> int:
    """The length that a configuration states, the innermost level first; 0 if it states none."""
    for level in levels:
        scaled = _scaled(level)
        if length := next((length for name in _NAMES if (length := _sane(level.get(name)))), 0):
            return max(scaled, length) if scaled else int(length * _factor(level))
        if scaled:
            return scaled
    return 0


def _scaled(level: Mapping[str, Any]) -> int:
    """What YaRN stretches the original length to; 0 without it."""
    rope = _rope(level)
    if "yarn" not in _kind(rope):
        return 0
    return int(_sane(rope.get("original_max_position_embeddings")) * float(rope.get("factor") or 1))


def _factor(level: Mapping[str, Any]) -> float:
    rope = _rope(level)
    # The length of these types is that after scaling.
    included = str(level.get("model_type", "")).startswith("gemma3")
    return 1.0 if included or _kind(rope) not in _STRETCHED else float(rope.get("factor") or 1)


def _rope(level: Mapping[str, Any]) -> Mapping[str, Any]:
    rope = level.get("rope_scaling") or level.get("rope_parameters")
    return rope if isinstance(rope, Mapping) else {}


def _kind(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "")


def _levels(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A configuration, after that of the language model inside it."""
    inner = [level for name in _INNER if isinstance(level := config.get(name), Mapping)]
    return [*inner, config]


def _assumed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration with what transformers assumes; empty for a type that it does not know."""
    from transformers import AutoConfig

    try:
        own = dict(config)
        return dict(AutoConfig.for_model(own.pop("model_type", ""), **own).to_dict())
    except Exception:  # a configuration that mlx-lm can load may be wrong for transformers
        log.debug("transformers does not know this type of model.", exc_info=True)
        return {}


def _arguments(model: Any) -> list[Mapping[str, Any]]:
    """The arguments from which mlx-lm made a model, those of the language model inside it first."""
    inner = getattr(model, "language_model", None)
    return [vars(args) for part in (inner, model) if (args := getattr(part, "args", None)) is not None]


def _sane(length: Any) -> int:
    if isinstance(length, bool) or not isinstance(length, int | float) or not 0 < length < _NO_LIMIT:
        return 0
    return int(length)

"""The files of a LoRA adapter, as `mlx_lm.lora` and as PEFT write them, read into one form."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Final, NamedTuple

from consumers.engines.local.child.backend import LoadError

_MLX, _PEFT = "adapters.safetensors", "adapter_model.safetensors"
_PEFT_PREFIX: Final = "base_model.model."
_PEFT_PARTS: Final = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b"}
_UNSUPPORTED: Final = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias", "layer_replication")
"""Of PEFT: what changes more than thin matrices of one scale. Each is false or empty where it is not in use."""


class LayerAdapter(NamedTuple):
    """What an adapter adds to one layer: `scale * (x @ a) @ b`, a of (inputs, rank) and b of (rank, outputs)."""

    a: Any
    b: Any
    scale: float


def opened(name: str, folder: Path) -> dict[str, LayerAdapter]:
    """Read the adapter of this name: its layers, by their path in the model.

    Raises:
        LoadError: it is no LoRA adapter. The message names the adapter and the folder.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise LoadError(f'There is no folder {folder} for the adapter "{name}". Correct the setting adapters.')
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        parts, scale = _of_mlx(folder, config) if (folder / _MLX).exists() else _of_peft(folder, config)
        return _paired(parts, scale)
    except LoadError as error:
        raise LoadError(f'Adapter "{name}" in {folder} cannot be used: {error}') from None
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise LoadError(f'The files of the adapter "{name}" in {folder} cannot be read ({what}).') from error


def _of_mlx(folder: Path, config: dict[str, Any]) -> tuple[dict[str, Any], float]:
    if (kind := config.get("fine_tune_type", "lora")) != "lora":
        raise LoadError(f"its type is {kind}, and only lora can be chosen per request. Use adapter_path.")
    scale = float(config["lora_parameters"]["scale"])
    return _loaded(folder / _MLX), scale


def _of_peft(folder: Path, config: dict[str, Any]) -> tuple[dict[str, Any], float]:
    used = [name for name in _UNSUPPORTED if config.get(name)]
    if str(config.get("peft_type", "")).upper() != "LORA" or used or config.get("bias", "none") != "none":
        raise LoadError(f"PEFT's {', '.join(used) or 'other kinds than plain LoRA'} cannot be chosen per request.")
    rank = int(config["r"])
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    parts = {}
    for name, value in _loaded(folder / _PEFT).items():
        short = name.removeprefix(_PEFT_PREFIX)
        for ending, part in _PEFT_PARTS.items():
            short = short.removesuffix(ending) + part if short.endswith(ending) else short
        parts[short] = value.T
    return parts, scale


def _loaded(file: Path) -> dict[str, Any]:
    import mlx.core as mx

    weights: Any = mx.load(str(file))
    return dict(weights)


def _paired(parts: dict[str, Any], scale: float) -> dict[str, LayerAdapter]:
    layers: dict[str, dict[str, Any]] = {}
    for name, value in parts.items():
        path, _, part = name.rpartition(".")
        layers.setdefault(path, {})[part] = value
    for path, pair in layers.items():
        if set(pair) != {"lora_a", "lora_b"} or any(value.ndim != 2 for value in pair.values()):
            raise LoadError(f"the layer {path} has {', '.join(sorted(pair))}, not one lora_a and one lora_b.")
    return {path: LayerAdapter(pair["lora_a"], pair["lora_b"], scale) for path, pair in layers.items()}

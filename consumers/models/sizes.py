"""The memory that the weights of a model take, read from the headers of its files."""

from __future__ import annotations

import json
import logging
import math
import struct
from pathlib import Path
from typing import Any, Final

log = logging.getLogger(__name__)

_WEIGHTS: Final = "*.safetensors"
_MOST_HEADER_BYTES: Final = 100 << 20
_FLOATING: Final = ("F", "BF")
_BITS: Final = 4
_FLOAT32_BYTES: Final = 4


def files_bytes(folder: Path) -> int:
    """The size of the weights' files; 0 if there are none."""
    return sum(file.stat().st_size for file in folder.glob(_WEIGHTS)) if folder.is_dir() else 0


def expected_bytes(folder: Path, *, float32: bool) -> int:
    """The memory that the weights take once they are loaded.

    Args:
        folder: of the model, in MLX's format.
        float32: they are converted to float32, as `consumers.engines.local.child.float32` does on a CPU.
    """
    stored = files_bytes(folder)
    if not float32:
        return stored
    try:
        return sum(_as_float32(_header(file), _bits(folder)) for file in folder.glob(_WEIGHTS))
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        log.warning("The size of the weights in %s cannot be read (%s).", folder, error)
        return stored


def _header(file: Path) -> dict[str, Any]:
    """The tensors of a safetensors file by name: a length of eight bytes, and then as much JSON."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > _MOST_HEADER_BYTES:
            raise ValueError("its header is too long")
        tensors: dict[str, Any] = json.loads(opened.read(length))
    tensors.pop("__metadata__", None)
    return tensors


def _bits(folder: Path) -> int:
    """Of a quantized weight, where its shape does not tell."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return int((config.get("quantization") or {}).get("bits", _BITS))


def _as_float32(tensors: dict[str, Any], bits: int) -> int:
    total = 0
    for name, tensor in tensors.items():
        values = math.prod(tensor["shape"])
        begin, end = tensor["data_offsets"]
        module, _, parameter = name.rpartition(".")
        if parameter == "weight" and f"{module}.scales" in tensors:
            total += values * 32 // bits * _FLOAT32_BYTES
        elif parameter in ("scales", "biases") and f"{module}.scales" in tensors:
            continue
        else:
            total += values * _FLOAT32_BYTES if tensor["dtype"].startswith(_FLOATING) else end - begin
    return total

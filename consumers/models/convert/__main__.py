"""The process that converts: `python -m consumers.models.convert FILE FOLDER [SAMPLING]`.

It writes a folder in MLX's format and prints how many bytes of the file it has read. SAMPLING is a JSON object for
`generation_config.json`. Errors are one line on standard error. MLX is not imported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from safetensors.numpy import save_file

from consumers.models.convert.affine import GROUP, affine
from consumers.models.convert.shape import ROPE_FACTORS, ModelShape
from consumers.models.convert.tokenizer import Vocabulary
from consumers.models.store import ModelError

_SHARD_BYTES: Final = 1 << 30
"""The weights are written in files of about this size, so that a model need not fit into memory."""

# The sampling parameters that a GGUF file can recommend, and their names in `generation_config.json`.
_SAMPLING: Final = {
    "temp": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}

Arrays = dict[str, npt.NDArray[Any]]


def convert(file: Path, folder: Path, sampling: dict[str, float]) -> None:
    """Write the model in a GGUF file to a folder in MLX's format.

    Raises:
        ModelError: the file is not a GGUF file, or its model is not supported.
    """
    reader = _opened(file)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    shape, vocabulary = ModelShape(fields), Vocabulary(fields)
    names = shape.names()
    tensors = {tensor.name: tensor for tensor in reader.tensors if tensor.name != ROPE_FACTORS}
    for name in tensors:
        if name not in names:
            raise ModelError(f'The tensor "{name}" is not one of the architecture "{shape.architecture}".')
    for name in names:
        if name.endswith(".weight") and name != "output.weight" and name not in tensors:
            raise ModelError(f'The GGUF file has no tensor "{name}". It is incomplete.')
    config = shape.config(
        vocabulary=int(tensors["token_embd.weight"].shape[1]),
        tensors=[names[name] for name in tensors],
        rope_factors=next((tensor.data.tolist() for tensor in reader.tensors if tensor.name == ROPE_FACTORS), None),
    )
    folder.mkdir(parents=True, exist_ok=True)
    config |= _write_weights(((names[name], tensor) for name, tensor in tensors.items()), folder)
    _write_tokenizer(vocabulary, folder, config["max_position_embeddings"])
    stated = {
        ours: fields[key] for theirs, ours in _SAMPLING.items() if (key := f"general.sampling.{theirs}") in fields
    }
    _write_json(folder / "generation_config.json", vocabulary.ids() | stated | sampling)
    _write_json(folder / "config.json", config | vocabulary.ids())


def _opened(file: Path) -> GGUFReader:
    try:
        return GGUFReader(file)
    except OSError as error:
        raise ModelError(f"Cannot read {file}: {error.strerror}.") from None
    except (ValueError, IndexError, KeyError) as error:
        raise ModelError(f"{file} is not a GGUF file, or is damaged ({error}).") from None


def _write_weights(tensors: Iterator[tuple[str, ReaderTensor]], folder: Path) -> dict[str, Any]:
    """Write the weights. Returns the part of `config.json` about quantisation."""
    bits: dict[str, int] = {}
    shard: Arrays = {}
    done = shards = 0
    for name, tensor in tensors:
        shard |= _arrays(name, tensor, bits)
        done += int(tensor.n_bytes)
        sys.stdout.write(f"{done}\n")
        sys.stdout.flush()
        if sum(array.nbytes for array in shard.values()) >= _SHARD_BYTES:
            shards += 1
            _save(shard, folder, shards)
            shard = {}
    if shard:
        _save(shard, folder, shards + 1)
    if not bits:
        return {}
    usual = max(set(bits.values()), key=list(bits.values()).count)
    layers = {module: {"group_size": GROUP, "bits": width} for module, width in bits.items() if width != usual}
    return {"quantization": {"group_size": GROUP, "bits": usual, **layers}}


def _arrays(name: str, tensor: ReaderTensor, bits: dict[str, int]) -> Arrays:
    """The arrays that MLX loads for one tensor. A quantised one is noted in bits, by the name of its module."""
    module = name.removesuffix(".weight")
    if (quantised := affine(tensor.data, tensor.tensor_type)) is not None:
        bits[module] = quantised.bits
        return {
            name: quantised.weight,
            f"{module}.scales": quantised.scales,
            f"{module}.biases": quantised.biases,
        }
    try:
        return {name: dequantize(tensor.data, tensor.tensor_type).astype(np.float16)}
    except NotImplementedError:
        raise ModelError(f"The quantisation {tensor.tensor_type.name} of {name} is not supported.") from None


def _save(arrays: Arrays, folder: Path, number: int) -> None:
    save_file(arrays, folder / f"model-{number:05}.safetensors", metadata={"format": "mlx"})


def _write_tokenizer(vocabulary: Vocabulary, folder: Path, context: int) -> None:
    vocabulary.tokenizer().save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", vocabulary.settings(context))


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> int:
    """Convert as the arguments say, and return the exit code."""
    file, folder, *sampling = sys.argv[1:]
    try:
        convert(Path(file), Path(folder), json.loads(sampling[0]) if sampling else {})
    except (ModelError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

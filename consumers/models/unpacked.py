"""A GGUF file with 16-bit weights, made of one with quantized weights, for llama.cpp on a CPU.

Beside quantized weights, llama.cpp's CPU code rounds each layer's input to 8 bits. A very small model loses facts by
that: SmolLM2-135M then no longer knows the capital of France. Beside 16-bit weights, the input keeps 16 bits, and the
weights are the same numbers.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

from pipeline.process.python import module_command, with_import_root

# Larger models lose little by 8 bits, and 16 bits would take up to four times the memory.
_MOST_BYTES = 200_000_000
_TIMEOUT_S = 120.0
_DRAFT = ".part"

log = logging.getLogger("models")


def for_llama(gguf: Path) -> Path:
    """The file that llama.cpp gets: a small model's 16-bit copy, kept beside the file, where that can be made.

    The copy is made once, in a process of its own: reading the file takes several times its size in memory.
    """
    # On a Mac, llama.cpp computes on the GPU, whose code does not round to 8 bits.
    if sys.platform == "darwin" or not gguf.is_file() or gguf.stat().st_size > _MOST_BYTES:
        return gguf
    copy = gguf.with_name(f"{gguf.stem}.f16{gguf.suffix}")
    if _is_current(copy, gguf):
        return copy
    log.info("unpacking %s to 16 bits", gguf)
    _sweep(copy)
    command = [*module_command("consumers.models.unpacked"), str(gguf), str(copy)]
    try:
        subprocess.run(
            command, check=True, timeout=_TIMEOUT_S, capture_output=True, text=True, env=with_import_root(os.environ)
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().rpartition("\n")[2]
        log.warning("%s is used as it is, because it was not unpacked to 16 bits: %s", gguf, said)
    return copy if _is_current(copy, gguf) else gguf


def _is_current(copy: Path, gguf: Path) -> bool:
    return copy.is_file() and copy.stat().st_mtime >= gguf.stat().st_mtime


def _sweep(copy: Path) -> None:
    """Remove what killed processes left. Others may be writing now."""
    for draft in copy.parent.glob(f"{copy.name}.*{_DRAFT}"):
        if draft.stat().st_mtime < time.time() - _TIMEOUT_S:
            draft.unlink(missing_ok=True)


def unpack(source: Path, copy: Path) -> None:
    """Write the copy, in one step. If no weights are quantized, it is a link to the file.

    Raises:
        OSError: the file cannot be read, or the copy cannot be written.
        ValueError: the file is not a GGUF file.
        NotImplementedError: the library cannot unpack this quantization.
    """
    import gguf  # noqa: PLC0415 - slow to import, and needed only here
    import numpy as np  # noqa: PLC0415 - as above

    plain = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16)
    reader = gguf.GGUFReader(source)
    draft = copy.with_name(f"{copy.name}.{os.getpid()}{_DRAFT}")
    if all(tensor.tensor_type in plain for tensor in reader.tensors):
        draft.hardlink_to(source)
        draft.replace(copy)
        return
    writer = gguf.GGUFWriter(draft, str(reader.fields["general.architecture"].contents()))
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        is_array = field.types[0] is gguf.GGUFValueType.ARRAY
        writer.add_key_value(key, field.contents(), field.types[0], sub_type=field.types[-1] if is_array else None)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for tensor in reader.tensors:
        if tensor.tensor_type in plain:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        else:
            weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            writer.add_tensor(tensor.name, weights.astype(np.float16))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        draft.replace(copy)
    finally:
        draft.unlink(missing_ok=True)


if __name__ == "__main__":
    unpack(Path(sys.argv[1]), Path(sys.argv[2]))

"""Quantised tensors: from GGUF's blocks to MLX's affine form, in which a weight is `scale * level + bias`.

Both formats have groups of 32 weights in a row. A group's levels are unsigned integers, packed from the lowest bit up.
The kinds below have this form, so that each level stays as it is. Tensors of other kinds become float16 weights.

The scales and biases of Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 are float16 numbers in both formats, and nothing is rounded.
Q4_K and Q5_K store a scale as a product of two numbers. The product is rounded to float16, which is as precise as
weights in float16 are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Kind
from gguf.quants import Q4_K as KQuant  # noqa: N811 - a class that is named for its format

GROUP: Final = 32
_PACK_ROWS: Final = 4096
_FOUR: Final = np.uint8(4)
_LOW: Final = np.uint8(0x0F)

Bytes = npt.NDArray[np.uint8]
Halves = npt.NDArray[np.float16]
Floats = npt.NDArray[np.float32]


class Affine(NamedTuple):
    """A matrix in MLX's affine form: packed levels, and a scale and a bias for each group of 32 weights."""

    weight: npt.NDArray[np.uint32]
    scales: Halves
    biases: Halves
    bits: int


class _Groups(NamedTuple):
    """The groups of a tensor: their levels, 32 in a row, and their scales and biases as float32."""

    levels: Bytes
    scales: Floats
    biases: Floats


def affine(data: Bytes, kind: Kind) -> Affine | None:
    """The rows of a quantised tensor in MLX's form; None if MLX has no such form or float16 cannot hold its scales."""
    if kind not in _READERS:
        return None
    bits, block_bytes, read = _READERS[kind]
    rows = data.shape[0]
    groups = read(np.ascontiguousarray(data).reshape(-1, block_bytes))
    with np.errstate(over="ignore"):
        scales, biases = groups.scales.astype(np.float16), groups.biases.astype(np.float16)
    if not (np.isfinite(scales).all() and np.isfinite(biases).all()):
        return None
    return Affine(
        _packed(groups.levels.reshape(rows, -1), bits), scales.reshape(rows, -1), biases.reshape(rows, -1), bits
    )


def _packed(levels: Bytes, bits: int) -> npt.NDArray[np.uint32]:
    """Levels as a stream of bits in words of 32, each row on its own, the lowest bits first."""
    if bits == 8:
        return levels.view("<u4")
    if bits == 4:
        return np.ascontiguousarray(levels[:, 0::2] | levels[:, 1::2] << _FOUR).view("<u4")
    parts = []
    for start in range(0, len(levels), _PACK_ROWS):  # a byte for each bit meanwhile
        part = levels[start : start + _PACK_ROWS, :, None]
        stream = np.unpackbits(part, axis=2, count=bits, bitorder="little").reshape(len(part), -1)
        parts.append(np.packbits(stream, axis=1, bitorder="little"))
    return np.concatenate(parts).view("<u4")


def _halves(blocks: Bytes, at: int) -> Floats:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """The low halves of 16 bytes, and then the high ones."""
    return np.concatenate([packed & _LOW, packed >> _FOUR], axis=1)


def _fifth_bits(packed: Bytes) -> Bytes:
    """The highest bit of each of 32 levels, in its place."""
    return np.unpackbits(packed, axis=1, bitorder="little") << _FOUR


def _q4_0(blocks: Bytes) -> _Groups:
    scales = _halves(blocks, 0)
    return _Groups(_nibbles(blocks[:, 2:]), scales, -8 * scales)


def _q4_1(blocks: Bytes) -> _Groups:
    return _Groups(_nibbles(blocks[:, 4:]), _halves(blocks, 0), _halves(blocks, 2))


def _q5_0(blocks: Bytes) -> _Groups:
    scales = _halves(blocks, 0)
    return _Groups(_nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6]), scales, -16 * scales)


def _q5_1(blocks: Bytes) -> _Groups:
    return _Groups(_nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8]), _halves(blocks, 0), _halves(blocks, 2))


def _q8_0(blocks: Bytes) -> _Groups:
    scales = _halves(blocks, 0)
    # From -128 to 127, as two's complements: to 0 to 255 by the highest bit.
    return _Groups(blocks[:, 2:] ^ np.uint8(0x80), scales, -128 * scales)


def _k_scales(blocks: Bytes) -> tuple[Floats, Floats]:
    """The scales and biases of the eight groups in each block of Q4_K or Q5_K."""
    scales, minima = KQuant.get_scale_min(np.ascontiguousarray(blocks[:, 4:16]))
    return _halves(blocks, 0) * scales, -_halves(blocks, 2) * minima


def _k_nibbles(packed: Bytes) -> Bytes:
    """The levels of eight groups. Each 32 bytes hold a group in their low halves, and the next in their high ones."""
    pairs = packed.reshape(-1, 4, 1, 32)
    return np.concatenate([pairs & _LOW, pairs >> _FOUR], axis=2).reshape(-1, 8, 32)


def _q4_k(blocks: Bytes) -> _Groups:
    return _Groups(_k_nibbles(blocks[:, 16:]), *_k_scales(blocks))


def _q5_k(blocks: Bytes) -> _Groups:
    # Bit g of byte i is the highest bit of level i in group g.
    places = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
    highest = (blocks[:, None, 16:48] >> places & np.uint8(1)) << _FOUR
    return _Groups(_k_nibbles(blocks[:, 48:]) | highest, *_k_scales(blocks))


_READERS: Final[dict[Kind, tuple[int, int, Callable[[Bytes], _Groups]]]] = {
    Kind.Q4_0: (4, 18, _q4_0),
    Kind.Q4_1: (4, 20, _q4_1),
    Kind.Q5_0: (5, 22, _q5_0),
    Kind.Q5_1: (5, 24, _q5_1),
    Kind.Q8_0: (8, 34, _q8_0),
    Kind.Q4_K: (4, 144, _q4_k),
    Kind.Q5_K: (5, 176, _q5_k),
}
"""Of each kind: the bits of a level, the bytes of a block, and how its blocks are read."""

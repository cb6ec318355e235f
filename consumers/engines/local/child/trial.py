"""Try a BLAS library: load it, compute a product of known result, and print its speed (`python -m ... LIBRARY`).

The speed is in 10⁹ operations a second. Without MLX, because the import of MLX takes longer than everything else here.
"""

from __future__ import annotations

import ctypes
import sys
import time
from typing import Final

_SIZE: Final = 512
_TIMES: Final = 3
_ROW_MAJOR, _NO_TRANSPOSE, _TRANSPOSE = 101, 111, 112


def gflops(library: str) -> float:
    """The speed of the best of some products, the first of which also starts the threads.

    Raises:
        OSError: the library cannot be loaded.
        AttributeError: it has no CBLAS.
        ValueError: its product is wrong.
    """
    product = ctypes.CDLL(library).cblas_sgemm
    product.restype = None
    number, scalar, matrix = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    product.argtypes = [number] * 6 + [scalar, matrix, number, matrix, number, scalar, matrix, number]
    kind = scalar * (_SIZE * _SIZE)
    left, right, result = kind(*([0.5] * len(kind()))), kind(*([2.0] * len(kind()))), kind()
    best_s = float("inf")
    for _ in range(_TIMES):
        started = time.perf_counter()
        product(
            *(_ROW_MAJOR, _NO_TRANSPOSE, _TRANSPOSE, _SIZE, _SIZE, _SIZE),
            *(1.0, left, _SIZE, right, _SIZE, 0.0, result, _SIZE),
        )
        best_s = min(best_s, time.perf_counter() - started)
    if set(result) != {float(_SIZE)}:
        raise ValueError("The product is wrong.")
    return 2 * _SIZE**3 / best_s / 1e9


if __name__ == "__main__":
    print(gflops(sys.argv[1]))  # noqa: T201 - the result

"""How fast MLX multiplies float32 matrices on this machine's CPU (`python -m ... [BLAS]` prints it as JSON).

The BLAS library is loaded here, for all names, before MLX is: the linker then binds MLX to it.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from typing import Final

from consumers.engines.local.child.importing import read_models_once

_ENOUGH_S: Final = 0.01
_SIZES: Final = (128, 256, 512, 1024)
_TIMES: Final = 3


def load_blas(library: str) -> None:
    """Load a BLAS library for MLX, which must not be imported yet. An empty name leaves MLX its own.

    Raises:
        OSError: it cannot be loaded.
    """
    if library:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)


def on_cpu() -> bool:
    """Whether MLX computes on the CPU by default."""
    import mlx.core as mx

    return bool(mx.default_device() == mx.cpu)


def on_cuda() -> bool:
    """Whether MLX computes on an NVIDIA GPU."""
    import mlx.core as mx

    return not on_cpu() and not mx.metal.is_available()


def gflops() -> float:
    """The speed of a float32 product on the CPU, in 10⁹ operations a second.

    The product grows until it takes 10 ms, so that a slow library is not measured for seconds.
    """
    import mlx.core as mx

    size, best_s = 0, 0.0
    for size in _SIZES:
        left, right = mx.ones((size, size), mx.float32), mx.ones((size, size), mx.float32)
        mx.eval(left, right)
        best_s = float("inf")
        for _ in range(_TIMES):  # the first of them starts the library's threads
            started = time.perf_counter()
            mx.eval(mx.matmul(left, right.T, stream=mx.cpu))
            best_s = min(best_s, time.perf_counter() - started)
        if best_s >= _ENOUGH_S:
            break
    return 2 * size**3 / best_s / 1e9


def main() -> None:
    """Print the version of mlx-lm, the device, and the speed on a CPU."""
    load_blas(sys.argv[1] if len(sys.argv) > 1 else "")
    import mlx.core as mx

    read_models_once()
    import mlx_lm

    found = {"mlx_lm": mlx_lm.__version__, "device": str(mx.default_device()), "gflops": gflops() if on_cpu() else 0.0}
    print(json.dumps(found))  # noqa: T201 - the result


if __name__ == "__main__":
    main()

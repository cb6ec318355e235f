"""The BLAS library of MLX's CPU build on Linux: which ones there are, and which one is the fastest here.

MLX's CPU wheel is linked against the reference BLAS, which is many times slower than any other one. The engine's child
loads a better library for all names before it imports MLX, and the linker then binds MLX to it. No other process and no
program that the child starts is affected, as they would be by `LD_PRELOAD`; a library that the user preloads still goes
first. Each library is tried in a process of its own, with a product of known result: one that does not load, crashes or
computes wrongly is not used.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Final

from msgspec import Struct

from consumers.engines.local import openblas
from consumers.engines.local.cuda import uses_cuda
from pipeline.core.cores import usable_cores
from pipeline.machine import cpu_count, cpu_quota
from pipeline.process.python import module_command

log = logging.getLogger(__name__)

AUTO: Final = "auto"
NONE: Final = "none"
_TRIAL_TIMEOUT_S: Final = 20.0
_DISTRIBUTIONS_OPENBLAS: Final = ("libopenblas.so.0", "libopenblasp.so.0")
_IMPORT_ROOT: Final = Path(__file__).resolve().parents[3]


class Blas(Struct, frozen=True):
    """A library.

    Attributes:
        name: for the user.
        library: a path, or a name that the linker finds.
        gflops: speed of a float32 product in the trial, in 10⁹ operations a second; 0 before it.
    """

    name: str
    library: str
    gflops: float = 0.0

    def is_gone(self) -> bool:
        """Whether the file was removed since, for example with the user's cache folder."""
        path = Path(self.library)
        return path.is_absolute() and not path.exists()


def threads_environment(threads: int) -> dict[str, str]:
    """The variables from which BLAS libraries read their number of threads. Those that the user has set win.

    Args:
        threads: 0 for the cores that this process may use. The libraries count the machine's cores, whatever the limits
            of a container.
    """
    number = str(threads or usable_cores(cpu_count(), cpu_quota()))
    names = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
    # MKL's integers are 32 bits wide, as MLX's are; it has both in one library.
    values = dict.fromkeys(names, number) | {"MKL_INTERFACE_LAYER": "LP64"}
    return {name: os.environ.get(name, value) for name, value in values.items()}


async def selected(wanted: str, threads: int) -> Blas | None:
    """The library to load, or None for MLX's own: on other platforms, on a GPU, and where none can be used.

    Args:
        wanted: the setting `blas`.
        threads: the setting `mlx_threads`.
    """
    if wanted == NONE or sys.platform != "linux" or await asyncio.to_thread(uses_cuda):
        return None
    environment = os.environ | threads_environment(threads)
    if wanted != AUTO:
        # A name without a folder stays one: the linker looks for it.
        path = Path(wanted)
        blas = await _trial(Blas(path.name, str(path.expanduser())), environment)  # noqa: ASYNC240 - reads no disk
        if blas is None:
            log.warning("The BLAS library %s cannot be used. MLX runs with its own, which is slow.", wanted)
        return blas
    # One after another: side by side, they would measure each other.
    tried = [await _trial(blas, environment) for blas in _installed()]
    tried.append(await _bundled(environment))
    usable = [blas for blas in tried if blas is not None]
    if not usable:
        log.warning("No BLAS library can be used. MLX runs with its own, which is slow. See `headrace doctor`.")
    return max(usable, key=lambda blas: blas.gflops, default=None)


def _installed() -> list[Blas]:
    """Libraries that may be installed. A name that the linker does not find fails its trial."""
    of_system = [Blas("the system's OpenBLAS", name) for name in _DISTRIBUTIONS_OPENBLAS]
    return of_system + [Blas("MKL", str(path)) for path in _mkl()]


async def _bundled(environment: Mapping[str, str]) -> Blas | None:
    """The OpenBLAS of the Python package, from the first folder where it can be made and loaded."""
    for folder in openblas.folders():
        try:
            path = await asyncio.to_thread(openblas.made, folder)
        except openblas.BlasError as error:
            log.warning("%s", error)
            continue
        if blas := await _trial(Blas("OpenBLAS", str(path)), environment):
            return blas
    return None


def _mkl() -> list[Path]:
    try:
        files = metadata.files("mkl") or []
    except metadata.PackageNotFoundError:
        return []
    return [Path(str(file.locate())).resolve() for file in files if file.name.startswith("libmkl_rt.so")]


async def _trial(blas: Blas, environment: Mapping[str, str]) -> Blas | None:
    """The library with its speed, or None if it cannot be used."""
    process = await asyncio.create_subprocess_exec(
        *(*module_command("consumers.engines.local.child.trial"), blas.library),
        env=dict(environment) | {"PYTHONPATH": str(_IMPORT_ROOT)},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(_TRIAL_TIMEOUT_S):
            out, err = await process.communicate()
    except TimeoutError:
        return None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    speed = _speed(out) if process.returncode == 0 else 0.0
    if not speed:
        log.debug("%s cannot be used: %s", blas.library, err.decode(errors="replace").strip()[-300:])
        return None
    return Blas(blas.name, blas.library, speed)


def _speed(said: bytes) -> float:
    """The number that a trial has printed; 0 without one. A library can print as well, as MKL does with MKL_VERBOSE."""
    for line in said.splitlines():
        with contextlib.suppress(ValueError):
            return float(line)
    return 0.0

"""MLX's build for CUDA: whether it is installed, and where it keeps the kernels that it compiles."""

from __future__ import annotations

import os
from importlib import metadata
from typing import Final

import platformdirs

_PACKAGE: Final = "mlx-cuda"
_FOLDER: Final = "MLX_PTX_CACHE_DIR"


def uses_cuda() -> bool:
    """Whether MLX's build for CUDA is installed."""
    return _version() is not None


def kernels_environment() -> dict[str, str]:
    """The variable from which MLX reads where compiled kernels are. One that the user has set wins.

    MLX's own default is below the folder for temporary files, which is empty after a restart of the machine, and which
    other users can write to. A version of MLX must not find the kernels of another one.
    """
    version = _version()
    if version is None or _FOLDER in os.environ:
        return {}
    return {_FOLDER: str(platformdirs.user_cache_path("headrace", appauthor=False) / "kernels" / version)}


def _version() -> str | None:
    names = ((found.name or "", found.version) for found in metadata.distributions())
    return next((version for name, version in names if name.startswith(_PACKAGE)), None)

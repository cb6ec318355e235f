"""The progress of loading a model, told to the parent: the step, in words, and the bytes of weights in memory."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

from consumers.engines.local.protocol import FromChild, Loading

_EVERY_S: Final = 0.25
_WEIGHTS: Final = "*.safetensors"


class LoadHeadway:
    """Tells of each new step at once, and of the bytes four times a second until it is left.

    Args:
        send: gives the parent a frame, from any thread.
        model_path: the folder of the model. Of a repository, the size is not known.
    """

    def __init__(self, send: Callable[[FromChild], None], model_path: str) -> None:
        self._send = send
        self._note = ""
        folder = Path(model_path)
        files = folder.glob(_WEIGHTS) if model_path and folder.is_dir() else ()
        self._total_bytes = sum(file.stat().st_size for file in files)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="headway", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()

    def note(self, text: str) -> None:
        """A new step has begun."""
        self._note = text
        self._tell()

    def _run(self) -> None:
        while not self._ended.wait(_EVERY_S):
            self._tell()

    def _tell(self) -> None:
        self._send(Loading(self._note, min(weights_bytes(), self._total_bytes), self._total_bytes))


def weights_bytes() -> int:
    """The memory that MLX has in use in this process; 0 before it is imported."""
    # It must not be imported here: a BLAS library is loaded before it.
    active = getattr(sys.modules.get("mlx.core"), "get_active_memory", None)
    return int(active()) if active is not None else 0

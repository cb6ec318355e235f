"""The engine's child process (`python -m consumers.engines.local.child MODEL_PATH BLAS`).

Frames from the parent arrive on standard input, and frames to the parent leave on standard output. Both are moved to
other descriptors first, so that the output of a library never mixes with the frames. The parent passes the settings in
the environment.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    # A terminal or a service manager sends these signals to the whole process group, also while this process still
    # imports the rest. The parent ends this process.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import logging
import os
import queue
import sys
import threading
from io import FileIO
from pathlib import Path
from typing import Final

from consumers.engines.local.child.backend import Backend, LoadError, Note
from consumers.engines.local.child.faults import fault_in
from consumers.engines.local.child.headway import LoadHeadway, weights_bytes
from consumers.engines.local.child.loop import Begin, Command, EngineLoop
from consumers.engines.local.protocol import (
    LENGTH_BYTES,
    Cancel,
    Count,
    Counted,
    FromChild,
    LoadFailed,
    Ready,
    Rejected,
    Shutdown,
    Submit,
    decode_to_child,
    encode,
)
from pipeline.config import Config, load
from pipeline.wire.errors import ErrorCode, HeadraceError

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG: Final = 1
_NICENESS: Final = 3
"""A model on a CPU uses all the processor time it gets. The threads and processes that carry requests need little, and
need it at once. More would starve the model beside other programs that use all the time they get."""

_GRACE_S: Final = 5.0
"""How long the running step may take after the parent has asked the child to end, or is gone."""


class Pipe:
    """The pipes to and from the parent. Writing is thread-safe."""

    def __init__(self) -> None:
        # Descriptors from os.dup are not inherited, so no other process can hold the pipe open.
        self._inbound = os.fdopen(os.dup(0), "rb")
        self._outbound = FileIO(os.dup(1), "wb")
        self._writing = threading.Lock()
        os.dup2(2, 1)
        nowhere = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nowhere, 0)
        os.close(nowhere)

    def send(self, frame: FromChild) -> None:
        """Write a frame. If the parent is gone, `receive` returns None."""
        data = memoryview(encode(frame))
        with self._writing, contextlib.suppress(BrokenPipeError):
            while data:
                data = data[self._outbound.write(data) or 0 :]

    def receive(self) -> bytes | None:
        """The body of the next frame, or None if the parent is gone."""
        length = self._inbound.read(LENGTH_BYTES)
        if len(length) < LENGTH_BYTES:
            return None
        size = int.from_bytes(length, "big")
        body = self._inbound.read(size)
        return body if len(body) == size else None


class Reader(threading.Thread):
    """A thread that reads, checks and tokenises requests, so that a long prompt delays no other request."""

    def __init__(self, pipe: Pipe, backend: Backend, commands: queue.SimpleQueue[Command], *, faults: bool) -> None:
        super().__init__(name="reader", daemon=True)
        self._pipe = pipe
        self._backend = backend
        self._commands = commands
        self._faults = faults

    def run(self) -> None:
        """Run until the parent asks the child to end, or is gone. The process then ends within `_GRACE_S`."""
        try:
            while (body := self._pipe.receive()) is not None:
                frame = decode_to_child(body)
                if isinstance(frame, Shutdown):
                    break
                if isinstance(frame, Cancel):
                    self._commands.put(frame)
                elif isinstance(frame, Count):
                    self._count(frame)
                else:
                    self._prepare(frame)
        finally:
            last_resort = threading.Timer(_GRACE_S, os._exit, [1])
            last_resort.daemon = True
            last_resort.start()
            self._commands.put(Shutdown())

    def _count(self, frame: Count) -> None:
        try:
            counted = Counted(frame.key, self._backend.count_tokens(frame.request))
        except HeadraceError as error:
            counted = Counted(frame.key, refusal=Rejected.of(frame.key, error))
        except Exception as error:
            log.exception("The tokens of a prompt could not be counted.")
            failure = HeadraceError(ErrorCode.ENGINE_FAILED, f"The engine failed to count the tokens ({error}).")
            counted = Counted(frame.key, refusal=Rejected.of(frame.key, failure))
        self._pipe.send(counted)

    def _prepare(self, frame: Submit) -> None:
        try:
            sequence = self._backend.prepare(frame.key, frame.work)
            fault = fault_in(frame.work.request) if self._faults else None
        except HeadraceError as error:
            self._pipe.send(Rejected.of(frame.key, error))
        except Exception as error:
            log.exception("A request could not be prepared.")
            failure = HeadraceError(
                ErrorCode.ENGINE_FAILED, f"The engine failed to prepare the request ({type(error).__name__}: {error})."
            )
            self._pipe.send(Rejected.of(frame.key, failure))
        else:
            work = frame.work
            self._commands.put(Begin(frame.epoch, sequence, fault, work.priority, extra=work.extra, coming=work.coming))


def open_backend(config: Config, model_path: str, blas: str, note: Note) -> Backend:
    """Load the backend that the settings select. `blas` is the library for MLX; empty for its own.

    Raises:
        LoadError: the model cannot be loaded.
        OSError: the library cannot be loaded. The parent then starts a process without it.
    """
    if config.engine == "simulated":
        from consumers.engines.local.child.simulated import SimulatedBackend

        return SimulatedBackend(config, note)
    from consumers.engines.local.child.mlx import MlxBackend
    from consumers.engines.local.child.speed import load_blas

    load_blas(blas)
    return MlxBackend(config, model_path, note, blas=blas)


def _die_with_parent() -> None:
    """Make Linux kill this process when its parent dies, even in a step that hangs."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def yield_to_others(*, besides: int | None) -> None:
    """Lower the priority of the threads of this process, but for one, and of those that they will start. Linux only."""
    if sys.platform == "linux":
        niceness = min(os.getpriority(os.PRIO_PROCESS, 0) + _NICENESS, 19)
        for thread in (int(task.name) for task in Path("/proc/self/task").iterdir()):
            if thread != besides:
                with contextlib.suppress(ProcessLookupError):
                    os.setpriority(os.PRIO_PROCESS, thread, niceness)


def main() -> None:
    """Run until the parent asks the child to end, or is gone."""
    pipe = Pipe()
    # Python searches for no garbage at the end, which takes a fifth of a second.
    atexit.register(gc.freeze)
    faulthandler.enable()
    _die_with_parent()
    config = load()
    logging.basicConfig(level=config.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
    try:
        with LoadHeadway(pipe.send, sys.argv[1]) as headway:
            backend = open_backend(config, sys.argv[1], sys.argv[2], headway.note)
    except LoadError as error:
        log.debug("The model could not be loaded.", exc_info=True)
        pipe.send(LoadFailed(str(error)))
        sys.exit(1)
    reader = Reader(pipe, backend, commands, faults=config.engine_faults)
    reader.start()
    if backend.on_cpu:
        yield_to_others(besides=reader.native_id)
    pipe.send(Ready(backend.facts, weights_bytes()))
    EngineLoop(backend, commands, pipe.send, config).run()
    backend.close()


if __name__ == "__main__":
    main()

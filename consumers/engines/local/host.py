"""The child process as its parent sees it: start, frames in both directions, end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from asyncio.subprocess import PIPE, Process
from typing import Final, Self

from consumers.engines.local.blas import threads_environment
from consumers.engines.local.cuda import kernels_environment
from consumers.engines.local.protocol import (
    LENGTH_BYTES,
    FromChild,
    Shutdown,
    ToChild,
    decode_from_child,
    encode,
)
from pipeline.config import Config, to_environment
from pipeline.process.python import module_command, with_import_root
from pipeline.wire.validation import UNREADABLE

log = logging.getLogger(__name__)

_QUIET: Final = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


class Child:
    """A running child. Create it with `start`, and always await `end`. `last_line` is the last line of its log."""

    def __init__(self, process: Process, name: str) -> None:
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise ValueError("The child process needs three pipes.")
        self._process = process
        self._stdin, self._stdout, self._stderr = process.stdin, process.stdout, process.stderr
        self._name = name
        self.last_line = ""
        self._unsent: list[bytes] | None = None
        self._listening = asyncio.create_task(self._listen(), name=f"{name} child's log")

    @classmethod
    async def start(cls, config: Config, model_path: str, name: str, *, blas: str = "") -> Self:
        """Start a child with the settings and the Python path of this process.

        Args:
            config: the settings.
            model_path: where the model is.
            name: the engine's, for the log.
            blas: the library that the child loads before MLX; empty for none.
        """
        environment = os.environ | _QUIET | threads_environment(config.mlx_threads) | kernels_environment()
        environment = with_import_root(environment | to_environment(config))
        command = [*module_command("consumers.engines.local.child"), model_path, blas]
        return cls(
            await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=environment),
            name,
        )

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def send(self, frame: ToChild) -> None:
        """Queue a frame. If the child has ended, `receive` returns None.

        The first frame is written at once. Those that follow in the same turn of the event loop are written together,
        so that requests that arrive together cost one write and wake the child once.
        """
        data = encode(frame)
        if self._unsent is not None:
            self._unsent.append(data)
        elif not self._stdin.is_closing():
            self._stdin.write(data)
            self._unsent = []
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        unsent, self._unsent = self._unsent, None
        if unsent and not self._stdin.is_closing():
            self._stdin.write(b"".join(unsent))

    async def receive(self) -> FromChild | None:
        """The next frame, or None after the child has ended. Cancelling may lose a frame; only `end` may follow."""
        try:
            length = await self._stdout.readexactly(LENGTH_BYTES)
            return decode_from_child(await self._stdout.readexactly(int.from_bytes(length, "big")))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        except UNREADABLE:
            log.exception("Lost contact with the engine process %d: it sent a malformed frame.", self.pid)
            self.kill()
            return None

    def kill(self) -> None:
        """Kill the child. `receive` then returns None."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def end(self, grace_s: float) -> str:
        """Ask the child to end, kill it after grace_s seconds, and reap it. Returns how it ended, in words."""
        if grace_s <= 0:
            self.kill()
        self.send(Shutdown())
        self._flush()
        self._stdin.close()
        try:
            async with asyncio.timeout(grace_s if grace_s > 0 else None):
                # A full pipe would block the child.
                while await self._stdout.read(1 << 16):
                    pass
                await self._process.wait()
        except TimeoutError:
            self.kill()
        finally:
            code = await self._process.wait()
            await self._listening
            with contextlib.suppress(ConnectionError):
                await self._stdin.wait_closed()
        return self._manner(code)

    def _manner(self, code: int) -> str:
        if code >= 0:
            return f"exit status {code}"
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"

    async def _listen(self) -> None:
        """Copy the child's log, line by line."""
        rest = b""
        while chunk := await self._stderr.read(1 << 14):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._say(line)
            rest = rest[-(1 << 14) :]
        self._say(rest)

    def _say(self, line: bytes) -> None:
        if text := line.decode(errors="replace").strip():
            self.last_line = text
            log.info("%s[%d] %s", self._name, self.pid, text)

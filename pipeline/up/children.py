"""Processes kept alive: each is started, listened to, started again when it dies, and drained or killed at the end.

A role gets one end of a socket (`pipeline.process.lifecycle` is at the other): its reports come out of it, its drain
time goes in, and when this process dies the role reads the end of file and stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from pipeline.process.lifecycle import REPORT_FD, Order, Report, StartError

LOG_MAX_BYTES = 8 << 20
# A child that does not follow its drain deadline gets this much more before it is killed.
KILL_GRACE_S = 0.5

# A program that knows nothing of a parent is ended by a shell that waits for the end of its standard input, which is
# ours to close. The program takes the shell's place: its pid, its signals and its exit code are its own.
_TIED = 'exec 3<&0; (read -r _ <&3; kill -TERM $$ 2>/dev/null) & exec "$0" "$@" </dev/null 3<&-'

_log = logging.getLogger(__name__)
_report_decoder = msgspec.json.Decoder(Report)


class LaunchError(StartError):
    """A process could not be started; the message says why and what to do."""


class Backoff:
    """How long to wait before a process that died is started again. One writer: its `Kept`.

    The wait doubles from `first_s` to `cap_s`, and is short again for a process that had lived for `stable_s`.
    """

    def __init__(self, *, first_s: float = 0.2, cap_s: float = 10.0, stable_s: float = 30.0) -> None:
        self._first_s = first_s
        self._cap_s = cap_s
        self._stable_s = stable_s
        self._deaths = 0

    def died(self, *, lived_s: float) -> float:
        """Seconds to wait, after a life of lived_s."""
        self._deaths = 1 if lived_s >= self._stable_s else self._deaths + 1
        return float(min(self._cap_s, self._first_s * 2 ** min(self._deaths - 1, 32)))


class Process:
    """One running process, the leader of a session of its own, and the line to it where it has one."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        line: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None,
    ) -> None:
        self._process = process
        self._line = line

    @property
    def pid(self) -> int:
        """Its process id, which is its session's too."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._process.returncode

    async def wait(self, on_report: Callable[[Report], None]) -> int:
        """Pass on its reports until it ends; returns its exit code. What it had started ends with it."""
        listener = asyncio.create_task(self._listen(on_report))
        try:
            code = await self._process.wait()
            await asyncio.wait([listener], timeout=1.0)
            return code
        finally:
            listener.cancel()
            self.kill()
            if self._line is not None:
                self._line[1].close()
            if self._process.stdin is not None:
                self._process.stdin.close()

    def drain(self, drain_s: float) -> None:
        """Ask it to finish what it holds within drain_s seconds and to end."""
        if self._line is not None and not self._line[1].is_closing():
            self._line[1].write(msgspec.json.encode(Order(drain_s)) + b"\n")
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def kill(self) -> None:
        """End it and everything it has started, at once. After its end it is harmless."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    async def _listen(self, on_report: Callable[[Report], None]) -> None:
        if self._line is None:
            return
        try:
            while line := await self._line[0].readline():
                on_report(_report_decoder.decode(line))
        except (OSError, ValueError, msgspec.DecodeError) as error:
            _log.warning("process %d reports nonsense, or no more: %s", self.pid, error)


async def spawn(command: Sequence[str], environ: Mapping[str, str], log: Path) -> Process:
    """Start command with a line to it; what it prints is appended to log.

    Raises:
        LaunchError: there is no such program, or the log cannot be written.
    """
    ours, theirs = socket.socketpair()
    try:
        with theirs, open_log(log) as output:
            process = await asyncio.create_subprocess_exec(
                *command,
                env={**environ, REPORT_FD: str(theirs.fileno())},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(theirs.fileno(),),
                # The terminal's Ctrl-C is for the one who starts children: it stops them in order.
                start_new_session=True,
            )
        ours.setblocking(False)
        return Process(process, await asyncio.open_connection(sock=ours))
    except OSError as error:
        ours.close()
        raise LaunchError(f"cannot start {command[0]}: {error.strerror}") from None


async def spawn_tied(
    command: Sequence[str], environ: Mapping[str, str], log: Path, *, keep_open: tuple[int, ...] = ()
) -> Process:
    """Start a program that is not ours, so that it ends when this process does, whatever ends it.

    Args:
        command: the program and its arguments.
        environ: its environment.
        log: gets what it prints.
        keep_open: file descriptors that it inherits.

    Raises:
        LaunchError: the log cannot be written.
    """
    try:
        with open_log(log) as output:
            return Process(
                await asyncio.create_subprocess_exec(
                    *("/bin/sh", "-c", _TIED, *command),
                    env=dict(environ),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    pass_fds=keep_open,
                    start_new_session=True,
                )
            )
    except OSError as error:
        raise LaunchError(f"cannot start {command[0]}: {error.strerror}") from None


def open_log(path: Path) -> Any:
    """The log at path, opened for appending bytes; one that has grown too large is put aside first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > LOG_MAX_BYTES:
        path.replace(path.with_suffix(".old.log"))
    return path.open("ab")


def last_line(log: Path) -> str:
    """The last line in a log, shortened; empty where there is none."""
    try:
        lines = log.read_bytes()[-4096:].decode(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1][-300:] if lines else ""


class Kept:
    """A process that is kept alive until it is stopped.

    Args:
        name: what people call it.
        launch: starts it. A LaunchError counts as a death.
        on_report: called with this object and each report.
        on_death: called with this object and how it died, and when it is started again.
        first: the process, where it has been started already.
    """

    def __init__(
        self,
        name: str,
        launch: Callable[[], Coroutine[Any, Any, Process]],
        on_report: Callable[[Kept, Report], None],
        on_death: Callable[[Kept, str], None],
        *,
        first: Process | None = None,
    ) -> None:
        self.name = name
        self.restarts = 0
        self._launch = launch
        self._launching: asyncio.Task[Process] | None = None
        self._on_report = on_report
        self._on_death = on_death
        self._process = first
        self._backoff = Backoff()
        self._stopping = asyncio.Event()
        self._ended = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """The id of the running process."""
        return self._process.pid if self._process is not None else None

    @property
    def stopping(self) -> bool:
        """Whether it has been told to stop: its end is no accident then."""
        return self._stopping.is_set()

    async def run(self) -> None:
        """Keep it alive until `stop`. Cancelling kills it."""
        try:
            while not self._stopping.is_set():
                started_at = time.monotonic()
                reason = await self._live()
                if self._stopping.is_set():
                    break
                delay_s = self._backoff.died(lived_s=time.monotonic() - started_at)
                self.restarts += 1
                self._on_death(self, f"{reason}; again in {delay_s:.1f} s")
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay_s):
                        await self._stopping.wait()
        finally:
            self.kill()
            self._ended.set()

    async def stop(self, *, drain_s: float) -> None:
        """Drain it within drain_s seconds, or kill it. Never started, or stopped before, is harmless."""
        if self._process is None:
            self.kill()
            return
        self._stopping.set()
        self._process.drain(drain_s)
        try:
            async with asyncio.timeout(drain_s + KILL_GRACE_S):
                await self._ended.wait()
        except TimeoutError:
            _log.warning("%s did not end in time: killed", self.name)
            self.kill()

    def kill(self) -> None:
        """End it at once, for good."""
        self._stopping.set()
        if self._launching is not None:
            self._launching.cancel()
        if self._process is not None:
            self._process.kill()

    async def _live(self) -> str:
        """One life of the process; returns how it ended."""
        try:
            if self._process is None:
                self._process = await self._launched()
            code = await self._process.wait(partial(self._on_report, self))
        except LaunchError as error:
            return str(error)
        finally:
            self._process = None
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"

    async def _launched(self) -> Process:
        """Start it; to be stopped meanwhile is a LaunchError like any other."""
        self._launching = asyncio.create_task(self._launch())
        try:
            return await self._launching
        except asyncio.CancelledError:
            if self._stopping.is_set() and self._launching.cancelled():
                raise LaunchError("stopped while starting") from None
            raise
        finally:
            self._launching.cancel()
            self._launching = None

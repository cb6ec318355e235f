"""Child processes: each is started, restarted when it dies, and drained or killed at the end.

A role inherits one end of a socket pair (`pipeline.process.lifecycle` uses it). It sends its reports through the socket
and receives its drain time. When this process dies, the role reads the end of file and stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from pipeline.aio import Background, wait_set
from pipeline.core.backoff import Backoff
from pipeline.process.lifecycle import REPORT_FD, Order, Report, StartError
from pipeline.wire.validation import UNREADABLE

LOG_MAX_BYTES = 8 << 20
_BOUND_EVERY_S = 5.0
# How long a child can exceed its drain time before it is killed.
KILL_GRACE_S = 0.5

# Ends a program that does not watch its parent. A subshell waits for the end of standard input, which closes when this
# process ends, and then stops the program. The program replaces the outer shell, so pid, signals and exit code are its
# own.
_TIED = 'exec 3<&0; (read -r _ <&3; kill -TERM $$ 2>/dev/null) & exec "$0" "$@" </dev/null 3<&-'

_log = logging.getLogger(__name__)
_report_decoder = msgspec.json.Decoder(Report)


# The pauses before a restart. A process that has run for `_STABLE_S` starts with the first one again.
_FIRST_PAUSE_S, _MOST_PAUSE_S, _STABLE_S = 0.2, 10.0, 30.0
# A process that is restarted has this long to stop.
_RESTART_STOP_S = 3.0
# How long to wait for the last reports of a process that has ended.
_LAST_REPORTS_S = 1.0
# How long to wait for the end of a process that was killed.
_KILLED_S = 1.0


class LaunchError(StartError):
    """A process could not be started. The message has the reason and what to do."""


class Process:
    """A running process, which leads a session of its own, and the socket to it if it has one."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        line: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None,
    ) -> None:
        self._process = process
        self._line = line

    @property
    def pid(self) -> int:
        """The process id, which is also the id of its session and its process group."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        return self._process.returncode

    async def wait(self, on_report: Callable[[Report], None]) -> int:
        """Pass on reports until the process ends, kill the processes that it started, and return its exit code.

        Cancelling kills the process and waits for its end.
        """
        listener = Background()
        listener.start(self._listen(on_report), what=f"listening to process {self.pid}")
        try:
            code = await self._process.wait()
            await listener.join(_LAST_REPORTS_S)
            return code
        except asyncio.CancelledError:
            await self.end()
            raise
        finally:
            listener.cancel()
            self.kill()
            if self._line is not None:
                self._line[1].close()
            if self._process.stdin is not None:
                self._process.stdin.close()

    def drain(self, drain_s: float) -> None:
        """Ask the process to finish its work within drain_s seconds and to end."""
        if self._line is not None and not self._line[1].is_closing():
            self._line[1].write(msgspec.json.encode(Order(drain_s)) + b"\n")
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def kill(self) -> None:
        """Kill the process and everything that it started. Calling this after its end is safe."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    async def end(self) -> None:
        """Kill the process and everything that it started, and wait until it has ended."""
        self.kill()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), _KILLED_S)

    async def _listen(self, on_report: Callable[[Report], None]) -> None:
        if self._line is None:
            return
        try:
            while line := await self._line[0].readline():
                on_report(_report_decoder.decode(line))
        except ConnectionResetError:
            _log.debug("Process %d has ended without reading its order to end.", self.pid)
        except (OSError, ValueError, *UNREADABLE) as error:
            what = error.strerror if isinstance(error, OSError) and error.strerror else error
            _log.warning("Lost contact with process %d: %s", self.pid, what)


async def spawn(command: Sequence[str], environ: Mapping[str, str], log: Path) -> Process:
    """Start a role with a socket to it. Its output is appended to log.

    Raises:
        LaunchError: the program does not exist, or the log cannot be written.
    """
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with theirs:
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            with open_log(log) as output:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    env={**environ, REPORT_FD: str(theirs.fileno())},
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=(theirs.fileno(),),
                    # Ctrl-C at the terminal reaches only this process, which stops its children in order.
                    start_new_session=True,
                )
        except BaseException as error:
            writer.close()
            if isinstance(error, OSError):
                raise LaunchError(f"Cannot start {command[0]}: {error.strerror}.") from None
            raise
    return Process(process, (reader, writer))


async def spawn_tied(
    command: Sequence[str], environ: Mapping[str, str], log: Path, *, keep_open: tuple[int, ...] = ()
) -> Process:
    """Start a program that is not a role. It ends when this process ends, even if this process is killed.

    Args:
        command: the program and its arguments.
        environ: its environment.
        log: the file that its output is appended to.
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
        raise LaunchError(f"Cannot start {command[0]}: {error.strerror}.") from None


def open_log(path: Path) -> Any:
    """Open the log at path for appending bytes, bounded first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bound(path)
    return path.open("ab")


def bound(log: Path) -> None:
    """Put the content of a log aside, as `.old.log`, if it is larger than `LOG_MAX_BYTES`.

    The log is copied and emptied: the processes that append to it keep it open. What they write in between is lost.
    """
    if log.exists() and log.stat().st_size > LOG_MAX_BYTES:
        shutil.copyfile(log, log.with_suffix(".old.log"))
        os.truncate(log, 0)


async def keep_bounded(folder: Path, *, every_s: float = _BOUND_EVERY_S) -> None:
    """Bound the logs in a folder from time to time, until cancelled."""
    while True:
        await asyncio.sleep(every_s)
        await asyncio.to_thread(_bound_all, folder)


def _bound_all(folder: Path) -> None:
    for log in folder.glob("*.log"):
        if not log.name.endswith(".old.log"):
            try:
                bound(log)
            except OSError as error:
                _log.warning("The log %s was not put aside: %s", log, error.strerror)


def last_line(log: Path) -> str:
    """Return the end of the last line in a log; empty if there is none."""
    try:
        lines = log.read_bytes()[-4096:].decode(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1][-300:] if lines else ""


class Kept:
    """A process that is restarted whenever it ends, until it is stopped.

    Args:
        name: the name on the screen and in logs.
        launch: starts the process. A LaunchError counts as an end.
        on_report: called with this object and each report.
        on_death: called with this object and a text: how the process ended, and when it restarts.
        first: the process, if it is running already.
        most_pause_s: the longest pause before a restart; by default 10 s.
    """

    def __init__(
        self,
        name: str,
        launch: Callable[[], Coroutine[Any, Any, Process]],
        on_report: Callable[[Kept, Report], None],
        on_death: Callable[[Kept, str], None],
        *,
        first: Process | None = None,
        most_pause_s: float | None = None,
    ) -> None:
        self.name = name
        self.restarts = 0
        self._launch = launch
        self._launching: asyncio.Task[Process] | None = None
        self._on_report = on_report
        self._on_death = on_death
        self._process = first
        self._backoff = Backoff(_FIRST_PAUSE_S, most_pause_s or _MOST_PAUSE_S)
        self._why = ""
        self._stopping = asyncio.Event()
        self._ended = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """The id of the running process; None if none runs."""
        return self._process.pid if self._process is not None else None

    @property
    def stopping(self) -> bool:
        """Whether `stop` or `kill` was called."""
        return self._stopping.is_set()

    async def run(self) -> None:
        """Keep the process alive until `stop` or `kill`. Cancelling kills it."""
        loop = asyncio.get_running_loop()
        try:
            while not self._stopping.is_set():
                started_at = loop.time()
                reason = await self._live()
                if self._stopping.is_set():
                    break
                pause_s = self.died(lived_s=loop.time() - started_at)
                self._on_death(self, f"{reason.rstrip('.')}; restarting in {pause_s:.1f} s")
                await wait_set(self._stopping, pause_s)
        finally:
            self.kill()
            self._ended.set()

    def died(self, *, lived_s: float) -> float:
        """Count a restart. Return the pause before it, in seconds, after a life of lived_s seconds."""
        self.restarts += 1
        if lived_s >= _STABLE_S:
            self._backoff.succeeded()
        return self._backoff.failed()

    async def stop(self, *, drain_s: float) -> None:
        """Drain the process within drain_s seconds, or kill it. Calling this before `run` or twice is safe."""
        if self._process is None:
            self.kill()
            return
        self._stopping.set()
        self._process.drain(drain_s)
        if not await wait_set(self._ended, drain_s + KILL_GRACE_S):
            _log.warning("%s did not stop within %.1f s; killing it", self.name, drain_s + KILL_GRACE_S)
            self.kill()

    async def restart(self, why: str) -> None:
        """End the process, which `run` then starts again; `on_death` is called with why."""
        process = self._process
        if process is None or self._stopping.is_set():
            return
        self._why = why
        process.drain(_RESTART_STOP_S)
        await asyncio.sleep(_RESTART_STOP_S)
        if self._process is process:
            process.kill()

    def kill(self) -> None:
        """Kill the process and do not restart it."""
        self._stopping.set()
        if self._launching is not None:
            self._launching.cancel()
        if self._process is not None:
            self._process.kill()

    async def _live(self) -> str:
        """Run the process once and return how it ended."""
        try:
            if self._process is None:
                self._process = await self._launched()
            code = await self._process.wait(partial(self._on_report, self))
        except LaunchError as error:
            return str(error)
        finally:
            self._process = None
        if self._why:
            why, self._why = self._why, ""
            return why
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"

    async def _launched(self) -> Process:
        """Start the process. A stop in the meantime raises LaunchError."""
        self._launching = asyncio.create_task(self._launch())
        try:
            return await self._launching
        except asyncio.CancelledError:
            if self._stopping.is_set() and self._launching.cancelled():
                raise LaunchError("Stopped while starting.") from None
            raise
        finally:
            self._launching.cancel()
            self._launching = None

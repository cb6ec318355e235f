"""The lifecycle of a process: its signals, drain deadline, reports to the parent, log and exit code.

A role is `async def main(config: Config, lifecycle: Lifecycle) -> None`, and `run` runs it. A parent process passes a
socket whose number is in `HEADRACE_REPORT_FD`. The child writes a JSON line for each change of its state. The parent
can write `{"drain_s": 7.5}` to stop the child; the end of file means that the parent has ended.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Literal

import msgspec

from pipeline.aio import wait_set
from pipeline.config import Config, ConfigError
from pipeline.process.files import raise_limit
from pipeline.process.terminal import leave_terminal, visible_answer
from pipeline.wire.errors import HeadraceError

REPORT_FD = "HEADRACE_REPORT_FD"

State = Literal["loading", "ready", "draining", "down"]
Main = Callable[[Config, "Lifecycle"], Awaitable[None]]

# The drain time, in seconds, when the parent has ended. The broker has probably ended with it.
ORPHAN_DRAIN_S = 3.0
# A role watches its drain deadline itself. If it exceeds it by this many seconds, it is cancelled.
OVERRUN_S = 1.0

_log = logging.getLogger(__name__)


class StartError(Exception):
    """A process cannot start or continue. The message has the reason and what to do."""


class Report(msgspec.Struct, omit_defaults=True):
    """The state of a process. `facts` are for programs (a URL, a model), `detail` is for the screen.

    The fact `incurable` means that the process cannot start, and that a restart does not help.
    """

    state: State
    detail: str = ""
    facts: dict[str, Any] = msgspec.field(default_factory=dict)


class Order(msgspec.Struct):
    """The parent's order to drain within `drain_s` seconds."""

    drain_s: float


_order_decoder = msgspec.json.Decoder(Order)


class Lifecycle:
    """The state of one process. Signal handlers and the parent's orders write it; the role reads it.

    Attributes:
        name: the role.
        stopping: set when the role must drain: accept no new work, finish its work, return.
        drain_deadline: the time of the event loop by which draining must end; None until `stopping` is set.
    """

    def __init__(self, name: str, *, drain_timeout_s: float) -> None:
        self.name = name
        self.stopping = asyncio.Event()
        self.drain_deadline: float | None = None
        self._drain_timeout_s = drain_timeout_s
        self._deadline_moved = asyncio.Event()
        self._parent: asyncio.StreamWriter | None = None
        self._main: asyncio.Task[int] | None = None
        self._abort_code: int | None = None
        self._signalled = False

    def report(self, state: State, detail: str = "", **facts: Any) -> None:
        """Report the state of the process to the parent, or to the log if there is no parent."""
        _log.log(
            logging.DEBUG if self._parent is not None else logging.INFO,
            "%s%s",
            state,
            f": {detail}" if detail else "",
        )
        if self._parent is not None and not self._parent.is_closing():
            self._parent.write(msgspec.json.encode(Report(state, detail, facts)) + b"\n")

    def stop(self, *, drain_s: float | None = None) -> None:
        """Begin to drain. Calling this before `serve` or twice is safe; the earliest deadline applies."""
        now = asyncio.get_running_loop().time()
        deadline = now + (self._drain_timeout_s if drain_s is None else drain_s)
        if self.drain_deadline is None or deadline < self.drain_deadline:
            self.drain_deadline = deadline
            self._deadline_moved.set()
        if not self.stopping.is_set():
            self.stopping.set()
            self.report("draining")

    def abort(self, code: int) -> None:
        """Cancel the role. The process exits with code."""
        self.stop(drain_s=0)
        if self._abort_code is None:
            self._abort_code = code
        if self._main is not None:
            self._main.cancel()

    def drain_left_s(self) -> float:
        """Return the seconds left for draining, at least 0; the whole drain time before `stop`."""
        if self.drain_deadline is None:
            return self._drain_timeout_s
        return max(0.0, self.drain_deadline - asyncio.get_running_loop().time())

    def on_signal(self, number: int) -> None:
        """Drain at the first signal, abort at the second."""
        if self._signalled:
            self.abort(128 + number)
        self._signalled = True
        self.stop()

    def on_hangup(self) -> None:
        """Drain because the terminal was closed. Several signals can tell of that, so another one changes nothing."""
        leave_terminal()
        self.stop()

    async def serve(self, main: Main, config: Config) -> int:
        """Run main until it returns, and return the exit code of the process."""
        reader = await self._connect_parent()
        async with asyncio.TaskGroup() as group:
            self._main = group.create_task(self._run(main, config), name=self.name)
            helpers = [group.create_task(self._enforce_deadline())]
            if reader is not None:
                helpers.append(group.create_task(self._listen(reader)))
            if self._abort_code is not None:
                self._main.cancel()
            await asyncio.wait([self._main])
            for helper in helpers:
                helper.cancel()
        self.report("down")
        if self._parent is not None:
            self._parent.close()
        if self._main.cancelled():
            return self._abort_code or 0
        return self._main.result()

    async def _run(self, main: Main, config: Config) -> int:
        try:
            await main(config, self)
        except asyncio.CancelledError:
            if self._abort_code is None:
                raise
            return self._abort_code
        except (ConfigError, HeadraceError, StartError) as error:
            if self._parent is not None:
                _log.error("%s", error)
                self.report("down", str(error), incurable=isinstance(error, ConfigError | StartError))
            else:
                # A person at a terminal reads it, not a log.
                sys.stderr.write(f"headrace: {error}\n")
            return 1
        except Exception:
            _log.exception("%s failed", self.name)
            return 1
        return 0

    async def _connect_parent(self) -> asyncio.StreamReader | None:
        line = _inherited_socket(os.environ)
        if line is None:
            return None
        reader, self._parent = await asyncio.open_connection(sock=line)
        return reader

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        """Follow the parent's orders until the end of file, and then stop."""
        try:
            while line := await reader.readline():
                order = _order_decoder.decode(line)
                self.stop(drain_s=order.drain_s)
        except (OSError, ValueError) as error:
            _log.debug("Lost the connection to the parent process: %s", error)
        if not self.stopping.is_set():
            _log.warning("The parent process has ended. Stopping.")
        self.stop(drain_s=ORPHAN_DRAIN_S)

    async def _enforce_deadline(self) -> None:
        """Abort a role that exceeds its drain deadline."""
        await self.stopping.wait()
        while await wait_set(self._deadline_moved, self.drain_left_s() + OVERRUN_S):
            self._deadline_moved.clear()
        if self._abort_code is None:
            _log.warning("Draining took too long. Stopping now; unfinished requests return to the queue.")
            self.abort(1)


_STOPS = (signal.SIGTERM, signal.SIGINT)


def ignores_hangup() -> bool:
    """Whether this process was started with SIGHUP ignored, as under nohup. It stays so, also in what it starts."""
    return signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def run(
    main: Main, config: Config, name: str, *, log_level: str | None = None, drain_timeout_s: float | None = None
) -> int:
    """Run a role in this process until it returns or is stopped.

    Args:
        main: the role.
        config: its settings.
        name: its name in logs.
        log_level: replaces the configured one.
        drain_timeout_s: replaces the configured one.

    Returns:
        0 after draining; 1 if main failed or exceeded its drain deadline; 128 + signal after a second signal.
    """
    configure_logging(log_level or config.log_level, name)
    raise_limit()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_live(main, config, name, drain_timeout_s or config.drain_timeout_s))


async def _live(main: Main, config: Config, name: str, drain_timeout_s: float) -> int:
    lifecycle = Lifecycle(name, drain_timeout_s=drain_timeout_s)
    loop = asyncio.get_running_loop()
    for number in _STOPS:
        loop.add_signal_handler(number, lifecycle.on_signal, number)
    if not ignores_hangup():
        loop.add_signal_handler(signal.SIGHUP, lifecycle.on_hangup)
    try:
        return await lifecycle.serve(main, config)
    finally:
        # The handlers end with the loop. Without the mask, a later signal would kill a process that has drained.
        signal.pthread_sigmask(signal.SIG_BLOCK, (*_STOPS, signal.SIGHUP))


def end_quickly() -> None:
    """Have Python search for no garbage at the end of this process: the system takes its memory back as a whole.

    A stop waits for one process after another, and each search takes 50 to 300 ms.
    """
    atexit.register(gc.freeze)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return the loop factory of uvloop if it is installed; None, for asyncio's own loop, otherwise."""
    try:
        import uvloop  # noqa: PLC0415 - absent on some platforms
    except ImportError:
        return None
    return uvloop.new_event_loop


def _inherited_socket(environ: MutableMapping[str, str]) -> socket.socket | None:
    """The socket to the parent. Its variable is removed from environ, so that no child process inherits it."""
    number = environ.pop(REPORT_FD, "")
    if not number:
        return None
    try:
        line = socket.socket(fileno=int(number))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{REPORT_FD}={number} is not an inherited socket: {error}. Unset it.") from None
    line.set_inheritable(False)
    line.setblocking(False)
    return line


def without_private(environ: Mapping[str, str]) -> dict[str, str]:
    """Return environ without the variable that passes the socket to a child; it is not a setting."""
    return {key: value for key, value in environ.items() if key != REPORT_FD}


class OneLineFormatter(logging.Formatter):
    """Formats each record as one line, with its traceback, so that logs can be searched, and read on a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record with each line break replaced by ` | `, and control characters escaped."""
        return " | ".join(visible_answer(line) for line in super().format(record).splitlines() if line.strip())


def configure_logging(level: str, name: str) -> None:
    """Log records of level and above to stderr, one line each, with name in each line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLineFormatter(f"%(asctime)s %(levelname)s {name} %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # httpx logs every request at `info`.
    logging.getLogger("httpx").setLevel(logging.WARNING)

"""How a process of headrace lives: its signals, its drain deadline, its word to the parent, its log and its exit code.

A role is `async def main(config: Config, lifecycle: Lifecycle) -> None`; `run` is all that its process does. The
parent, where there is one, is at the other end of a socket named by `HEADRACE_REPORT_FD`: the child writes one JSON
line for each change of its state; the parent may write `{"drain_s": 7.5}`, and its end of file means that it is gone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Literal

import msgspec

from pipeline.config import Config, ConfigError
from pipeline.wire.errors import HeadraceError

REPORT_FD = "HEADRACE_REPORT_FD"

State = Literal["loading", "ready", "draining", "down"]
Main = Callable[[Config, "Lifecycle"], Awaitable[None]]

# What a role may still finish when its parent is gone, and with it most likely the broker.
ORPHAN_DRAIN_S = 3.0
# Between the drain deadline, which a role watches itself, and the end of its patience with one that does not.
OVERRUN_S = 1.0

_log = logging.getLogger(__name__)


class StartError(Exception):
    """A process cannot start, or cannot go on; the message is for people: what happened and what to do next."""


class Report(msgspec.Struct, omit_defaults=True):
    """What a process says of itself. `facts` are for programs (a URL, a model), `detail` is for people."""

    state: State
    detail: str = ""
    facts: dict[str, Any] = msgspec.field(default_factory=dict)


class Order(msgspec.Struct):
    """What a parent says to its child: how many seconds it has for draining, counted from now."""

    drain_s: float


_order_decoder = msgspec.json.Decoder(Order)


class Lifecycle:
    """The life of one process. Its writers are the signal handlers and the line to the parent; a role reads it.

    Attributes:
        name: the role.
        stopping: set when the role is to drain: take nothing new, finish what it holds, return.
        drain_deadline: the event loop's time at which draining has to be over; None until `stopping` is set.
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
        """Tell the parent, or where there is none the log, what state the process is in."""
        _log.log(
            logging.DEBUG if self._parent is not None else logging.INFO,
            "%s%s",
            state,
            f": {detail}" if detail else "",
        )
        if self._parent is not None and not self._parent.is_closing():
            self._parent.write(msgspec.json.encode(Report(state, detail, facts)) + b"\n")

    def stop(self, *, drain_s: float | None = None) -> None:
        """Begin to drain. Before the role has begun, or twice, is harmless; the earliest deadline holds."""
        now = asyncio.get_running_loop().time()
        deadline = now + (self._drain_timeout_s if drain_s is None else drain_s)
        if self.drain_deadline is None or deadline < self.drain_deadline:
            self.drain_deadline = deadline
            self._deadline_moved.set()
        if not self.stopping.is_set():
            self.stopping.set()
            self.report("draining")

    def abort(self, code: int) -> None:
        """Stop at once: the role is cancelled and the process exits with code."""
        self.stop(drain_s=0)
        if self._abort_code is None:
            self._abort_code = code
        if self._main is not None:
            self._main.cancel()

    def drain_left_s(self) -> float:
        """Seconds left for draining: 0 when it is over, the whole drain time while nobody has asked to stop."""
        if self.drain_deadline is None:
            return self._drain_timeout_s
        return max(0.0, self.drain_deadline - asyncio.get_running_loop().time())

    def on_signal(self, number: int) -> None:
        """The first signal drains, the second one stops at once."""
        if self._signalled:
            self.abort(128 + number)
        self._signalled = True
        self.stop()

    async def serve(self, main: Main, config: Config) -> int:
        """Run main to its end and return the process's exit code."""
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
            _log.error("%s", error)
            return 1
        except Exception:
            _log.exception("%s has failed", self.name)
            return 1
        return 0

    async def _connect_parent(self) -> asyncio.StreamReader | None:
        line = _inherited_socket(os.environ)
        if line is None:
            return None
        reader, self._parent = await asyncio.open_connection(sock=line)
        return reader

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        """Follow the parent's orders until it is gone, and then stop."""
        try:
            while line := await reader.readline():
                order = _order_decoder.decode(line)
                self.stop(drain_s=order.drain_s)
        except (OSError, ValueError) as error:
            _log.debug("the line to the parent broke: %s", error)
        if not self.stopping.is_set():
            _log.warning("the parent process is gone: stopping")
        self.stop(drain_s=ORPHAN_DRAIN_S)

    async def _enforce_deadline(self) -> None:
        """Abort a role that goes on past its drain deadline."""
        await self.stopping.wait()
        moved = True
        while moved:
            self._deadline_moved.clear()
            try:
                async with asyncio.timeout(self.drain_left_s() + OVERRUN_S):
                    await self._deadline_moved.wait()
            except TimeoutError:
                moved = False
        if self._abort_code is None:
            _log.warning("not drained in time: stopping at once, what is left goes back to the queue")
            self.abort(1)


_STOPS = (signal.SIGTERM, signal.SIGINT)


def run(
    main: Main, config: Config, name: str, *, log_level: str | None = None, drain_timeout_s: float | None = None
) -> int:
    """Be the process of one role until it ends by itself or is told to stop.

    Args:
        main: the role.
        config: its settings.
        name: what it is called in logs.
        log_level: instead of the configured one.
        drain_timeout_s: instead of the configured one.

    Returns:
        0 after draining; 1 where main failed or did not drain in time; 128 + signal after a second signal.
    """
    configure_logging(log_level or config.log_level, name)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_live(main, config, name, drain_timeout_s or config.drain_timeout_s))


async def _live(main: Main, config: Config, name: str, drain_timeout_s: float) -> int:
    lifecycle = Lifecycle(name, drain_timeout_s=drain_timeout_s)
    loop = asyncio.get_running_loop()
    for number in _STOPS:
        loop.add_signal_handler(number, lifecycle.on_signal, number)
    try:
        return await lifecycle.serve(main, config)
    finally:
        # The handlers end with the loop: a signal that came later would kill a process that has ended in order.
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """A loop of uvloop where it is installed, asyncio's own loop elsewhere."""
    try:
        import uvloop  # noqa: PLC0415 - absent on some platforms
    except ImportError:
        return None
    return uvloop.new_event_loop


def _inherited_socket(environ: MutableMapping[str, str]) -> socket.socket | None:
    """The socket to the parent, taken out of environ so that no child of this process finds it there."""
    number = environ.pop(REPORT_FD, "")
    if not number:
        return None
    try:
        line = socket.socket(fileno=int(number))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{REPORT_FD}={number} is no inherited socket: {error}") from None
    line.set_inheritable(False)
    line.setblocking(False)
    return line


def without_private(environ: Mapping[str, str]) -> dict[str, str]:
    """Environ without what is between parent and child and is no setting."""
    return {key: value for key, value in environ.items() if key != REPORT_FD}


class OneLineFormatter(logging.Formatter):
    """Every record is one line, tracebacks and line breaks in messages included, so that a log can be searched."""

    def format(self, record: logging.LogRecord) -> str:
        """The record, its line breaks written as ` | `."""
        return " | ".join(line for line in super().format(record).splitlines() if line.strip())


def configure_logging(level: str, name: str) -> None:
    """Log to stderr, one line a record, from level on; name stands in every line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLineFormatter(f"%(asctime)s %(levelname)s {name} %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Every request of an HTTP client is a line at `info`, which would bury everything else.
    logging.getLogger("httpx").setLevel(logging.WARNING)

"""The processes of one run: a broker, a stand-in for Ollama and every role. They can be killed, frozen and restarted.

Only processes that were started here are touched, and they all end with this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from pipeline.config import ENV_PREFIX, Config, to_environment
from pipeline.process.lifecycle import Report
from pipeline.up.children import Process, spawn, spawn_tied
from pipeline.up.reach import jetstream_answers, ollama_version
from pipeline.up.server import find_conf, find_server

START_TIMEOUT_S = 60.0
_RESTART_PAUSE_S = 0.1
_LOOK_EVERY_S = 0.02
BROKER, STANDIN = "broker", "stand-in"


class Member:
    """One process. It is restarted when it ends, until it is held down or the run is over.

    Attributes:
        ready: set while it serves.
        ready_at: when it last began to serve, unix seconds.
        surprises: how it ended when the run had neither killed nor drained it.
    """

    def __init__(
        self,
        name: str,
        launch: Callable[[Member], Awaitable[Process]],
        answers: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        self.name = name
        self.ready = asyncio.Event()
        self.ready_at = 0.0
        self.surprises: list[str] = []
        self._launch = launch
        self._answers = answers
        self._process: Process | None = None
        self._expected = False
        self._up = asyncio.Event()
        self._up.set()

    @property
    def pid(self) -> int | None:
        """The id of the running process, or None."""
        return self._process.pid if self._process is not None else None

    async def keep(self) -> None:
        """Keep it running until this is cancelled. Then kill it."""
        try:
            while True:
                await self._up.wait()
                self._expected = False
                code = await self._live()
                if not self._expected:
                    self.surprises.append(f"{self.name} ended with {code}")
                await asyncio.sleep(_RESTART_PAUSE_S)
        finally:
            if self._process is not None:
                self._signal_group(signal.SIGCONT)
                self._process.kill()
                await self._process.wait(lambda _: None)

    async def _live(self) -> int:
        """Run it once. Returns the exit code."""
        self._process = await self._launch(self)
        probing = asyncio.create_task(self._probe())
        try:
            code = await self._process.wait(self._on_report)
        finally:
            probing.cancel()
        self.ready.clear()
        self._process = None
        return code

    async def _probe(self) -> None:
        """Wait until a program that sends no reports answers."""
        if self._answers is not None:
            while not await self._answers():  # noqa: ASYNC110 - it sends no event
                await asyncio.sleep(_LOOK_EVERY_S)
            self._serves()

    def _serves(self) -> None:
        self.ready_at = time.time()
        self.ready.set()

    def kill(self) -> None:
        """End it as a crash does. Its own children must notice by themselves."""
        self._expected = True
        self.ready.clear()
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def drain(self, drain_s: float) -> None:
        """Ask it to drain and end."""
        self._expected = True
        self.ready.clear()
        if self._process is not None:
            self._process.drain(drain_s)

    def freeze(self) -> None:
        """Suspend it and its children."""
        self._signal_group(signal.SIGSTOP)

    def thaw(self) -> None:
        """Resume it."""
        self._signal_group(signal.SIGCONT)

    def hold_down(self) -> None:
        """Do not restart it for now."""
        self._up.clear()

    def let_up(self) -> None:
        """Restart it."""
        self._up.set()

    def kill_child(self) -> bool:
        """Kill its child, the engine process. Returns whether it had one."""
        for pid in _children(self.pid):
            os.kill(pid, signal.SIGKILL)
            # It reports when it serves again.
            self.ready.clear()
            return True
        return False

    def _signal_group(self, number: signal.Signals) -> None:
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    def _on_report(self, report: Report) -> None:
        if report.state == "ready" and not self.ready.is_set():
            self._serves()
        elif report.state in ("loading", "down"):
            self.ready.clear()


def _children(pid: int | None) -> Iterator[int]:
    """The direct children of a process on Linux; elsewhere none."""
    with contextlib.suppress(OSError, ValueError):
        yield from map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


class Fleet:
    """All members of one run. `config` has the settings of the roles, with the broker and Ollama of this fleet."""

    def __init__(self, folder: Path, config: Config, *, workers: int) -> None:
        self.folder = folder
        self._port, self._ollama_port = _free_port(), _free_port()
        self.config = msgspec.structs.replace(
            config,
            nats_url=f"nats://127.0.0.1:{self._port}",
            ollama_host=f"http://127.0.0.1:{self._ollama_port}",
            state_dir=str(folder / "state"),
        )
        self.workers = [f"mlx-{number + 1}" for number in range(workers)]
        roles = dict.fromkeys(self.workers, "mlx") | {n: n for n in ("ollama", "router", "monitor", "gateway")}
        self.members = {
            BROKER: Member(BROKER, self._launch_broker, self._broker_answers),
            STANDIN: Member(STANDIN, self._launch_standin, self._ollama_answers),
        }
        self.members |= {name: Member(name, self._role(kind)) for name, kind in roles.items()}

    @property
    def url(self) -> str:
        """The URL of the broker."""
        return self.config.nats_url

    def __getitem__(self, name: str) -> Member:
        return self.members[name]

    async def until_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until every member serves.

        Raises:
            TimeoutError: a member does not serve in time.
        """
        async with asyncio.timeout(timeout_s):
            await asyncio.gather(*(member.ready.wait() for member in self.members.values()))

    @property
    def surprises(self) -> list[str]:
        """The processes that ended by themselves."""
        return [surprise for member in self.members.values() for surprise in member.surprises]

    def _role(self, kind: str) -> Callable[[Member], Awaitable[Process]]:
        async def launch(member: Member) -> Process:
            command = (sys.executable, "-m", "pipeline.cli", "run", kind)
            return await spawn(command, self._environ(), self._log(member.name))

        return launch

    async def _launch_broker(self, _: Member) -> Process:
        store = self.folder / "store"
        store.mkdir(exist_ok=True)
        options = ("-c", find_conf(), "--port", self._port, "--store_dir", store)
        return await spawn_tied([str(find_server()), *map(str, options)], os.environ, self._log(BROKER))

    async def _broker_answers(self) -> bool:
        return await jetstream_answers(self.url)

    async def _launch_standin(self, _: Member) -> Process:
        command = (sys.executable, "-m", "consumers.standin", "--port", str(self._ollama_port))
        return await spawn_tied(command, self._environ(), self._log(STANDIN))

    async def _ollama_answers(self) -> bool:
        return await ollama_version(self.config.ollama_host) is not None

    def _environ(self) -> dict[str, str]:
        root = str(Path(__file__).resolve().parents[2])
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(ENV_PREFIX)}
        path = os.pathsep.join(filter(None, [root, inherited.get("PYTHONPATH", "")]))
        return inherited | to_environment(self.config) | {"PYTHONPATH": path}

    def _log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"


@asynccontextmanager
async def running(folder: Path, config: Config, *, workers: int = 2) -> AsyncIterator[Fleet]:
    """A serving fleet for the duration of the block."""
    fleet = Fleet(folder, config, workers=workers)
    broker = asyncio.create_task(fleet[BROKER].keep())
    tasks = [broker]
    try:
        await asyncio.wait_for(fleet[BROKER].ready.wait(), START_TIMEOUT_S)
        tasks += [asyncio.create_task(m.keep()) for name, m in fleet.members.items() if name != BROKER]
        await fleet.until_ready()
        yield fleet
    finally:
        for task in reversed(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

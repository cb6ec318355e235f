"""`headrace up`: runs the broker and every role on this machine as child processes, and stops them in order."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Coroutine, Sequence
from functools import partial
from importlib import util
from pathlib import Path
from socket import socket
from typing import IO, Any

import msgspec

from pipeline.aio import Background
from pipeline.broker import connection
from pipeline.config import ENV_PREFIX, FILE_VARIABLE, NO_OLLAMA, Config, to_environment
from pipeline.core.cores import divide, usable_cores
from pipeline.machine import cpu_count, cpu_quota
from pipeline.process.lifecycle import Lifecycle, Report, run
from pipeline.process.python import module_command, with_import_root
from pipeline.up import instance
from pipeline.up.brokers import prepare_broker, start_broker
from pipeline.up.children import Kept, LaunchError, Process, keep_bounded, last_line, spawn, spawn_tied
from pipeline.up.instance import Instance
from pipeline.up.model import DEMO_MODEL, ModelFound, find_model
from pipeline.up.ports import check_ports, held_port
from pipeline.up.reach import (
    NATS_PORT,
    check_nats_urls,
    ollama_answers,
    ollama_shares_cpu,
    ollama_url,
    ollama_version,
    shares_cpu,
)
from pipeline.up.screen import Screen, shown
from pipeline.up.second import Second, second_engine
from pipeline.up.server import LOCK_PATIENCE_S, Broker, most_stored, state_lock
from pipeline.up.storekeeper import Storekeeper

BROKER = "broker"
OLLAMA = "ollama"
OPENAI = "openai"
STANDIN = "stand-in"
GATEWAY = "gateway"
# The groups stop one after another: first the roles that let requests in, last the broker, which the others need.
_EDGE = ((GATEWAY,), ("batches", "router"))
STOP_ORDER = (*_EDGE, ("mlx", OLLAMA), ("monitor",), (STANDIN,), (BROKER,))
# The roles that let requests in can use this share of the drain time, the engines the rest.
_EDGE_SHARE = 0.5
# The server writes each request before it acknowledges it, so it stops quickly.
_BROKER_STOP_S = 2.0
# The longest pause before the broker is started again: everything else waits for it.
_BROKER_PAUSE_S = 2.0
# The time beyond the drain time in which `up` kills processes that exceed it and stops the broker.
OVERHEAD_S = 4.0

STANDIN_COMMAND = module_command("consumers.standin")
# The stand-in loads its model while everything else on the machine starts as well. The first time, it also unpacks it.
_STANDIN_START_S = 120.0


class RoleProcess(msgspec.Struct, frozen=True):
    """A role's name and the command that starts it. `openai` is the only server of OpenAI's API that it is told of."""

    name: str
    command: tuple[str, ...]
    openai: str = ""


ROLES = tuple(
    RoleProcess(name, (*module_command("pipeline.cli"), "run", name))
    for name in (GATEWAY, "monitor", "router", "batches", "mlx", OLLAMA)
)


def openai_roles(urls: Sequence[str]) -> list[RoleProcess]:
    """The workers of servers of OpenAI's API: `openai`, `openai-2` and so on."""
    command = (*module_command("pipeline.cli"), "run", OPENAI)
    return [
        RoleProcess(OPENAI if number == 1 else f"{OPENAI}-{number}", command, url) for number, url in enumerate(urls, 1)
    ]


class Local:
    """The processes of one `headrace up`.

    Args:
        config: the settings. `nats_url` is used only if `own_broker` is false.
        own_broker: whether to start the embedded broker.
        screen: the output at the terminal.
        roles: the processes to run beside the broker.
        ready_file: written when everything is ready, removed at the end.
        model_named: whether the user named the model. Then the demo model does not replace it.

    Attributes:
        gguf: the model's GGUF file, if there is one. Known before the roles start.
    """

    def __init__(
        self,
        config: Config,
        *,
        own_broker: bool,
        screen: Screen,
        roles: Sequence[RoleProcess] = ROLES,
        ready_file: Path | None = None,
        model_named: bool = False,
    ) -> None:
        self._model_named = model_named
        self._config = config
        self._own_broker = own_broker
        self._screen = screen
        self._servers = openai_roles(config.openai)
        self._roles = [*roles, *self._servers]
        self._ready_file = ready_file
        self.gguf: Path | None = None
        self._dir = instance.state_dir(config)
        self._kept: dict[str, Kept] = {}
        self._beside = Background()
        self._unready = {role.name for role in self._roles}
        self._all_ready = asyncio.Event()
        self._given_up = asyncio.Event()
        self._trouble = ""
        self._standin_ready = asyncio.Event()
        self._standin_port: socket | None = None
        self._http: str | None = None

    async def serve(self, lifecycle: Lifecycle) -> None:
        """Start everything, run until `lifecycle.stopping`, and stop everything. Cancelling kills everything.

        Raises:
            LaunchError: the state folder is in use, a port is taken, the streams cannot be created, the model that
                the user named cannot be got or loaded, or another role cannot start, and a restart does not help.
        """
        with state_lock(self._dir) as lock:
            await self._check_ports()
            if not await self._get_model(lifecycle):
                self._screen.stopped()
                return
            broker = self._own(lock)
            started = await self._reach(broker)
            async with asyncio.TaskGroup() as group:
                bounding = group.create_task(keep_bounded(self._dir / "logs"))
                try:
                    if started is not None:
                        self._keep_broker(group, broker, started)
                    await self._run(lifecycle, group)
                finally:
                    bounding.cancel()
                    self._kill_all()
            if self._trouble:
                raise LaunchError(self._trouble)

    async def _check_ports(self) -> None:
        run_file = self._dir / instance.RUN_FILE
        # An `up` that was killed leaves the file, and its roles end a moment after it.
        patience_s = LOCK_PATIENCE_S if run_file.exists() else 0.0
        run_file.unlink(missing_ok=True)
        gateway = any(role.name == GATEWAY for role in self._roles)
        await check_ports(self._config, broker=self._own_broker, gateway=gateway, patience_s=patience_s)

    def _own(self, lock: IO[str]) -> Broker:
        """The embedded broker, not started."""
        return Broker(
            self._dir,
            lock=lock,
            log=self._log(BROKER),
            port=self._config.nats_port,
            # Tools look at the default port of NATS first, so the instance of the default state folder uses it.
            preferred_port=0 if self._config.state_dir else NATS_PORT,
            locked=bool(self._config.http_keys) and not self._config.nats_open,
        )

    async def _reach(self, own: Broker) -> Process | None:
        """Start the embedded broker and return its process, or prepare that of `nats_url` and return None."""
        started = None
        if self._own_broker:
            started = await self._launch_broker(own)
            self._config = msgspec.structs.replace(self._config, nats_url=own.url)
        else:
            await prepare_broker(self._config.nats_url, self._config)
        self._screen.broker(self._config.nats_url, own=self._own_broker)
        return started

    def _kill_all(self) -> None:
        self._beside.cancel()
        for kept in self._kept.values():
            kept.kill()
        if self._standin_port is not None:
            self._standin_port.close()

    async def _run(self, lifecycle: Lifecycle, group: asyncio.TaskGroup) -> None:
        await self._find_ollama(group)
        for role in self._roles:
            self._keep(group, Kept(role.name, partial(self._launch, role), self._on_report, self._on_death))
        if not self._roles:
            self._all_ready.set()
        await _first(self._all_ready.wait(), lifecycle.stopping.wait(), self._given_up.wait())
        if not lifecycle.stopping.is_set() and not self._trouble:
            here = Instance(self._config.nats_url, self._http, os.getpid())
            files = [self._dir / instance.RUN_FILE, *([self._ready_file] if self._ready_file else [])]
            with instance.announced(here, *files):
                self._screen.serving(here, self._dir)
                await lifecycle.stopping.wait()
        if not self._trouble:
            self._screen.stopping()
        await self._stop(self._config.drain_timeout_s)
        if not self._trouble:
            self._screen.stopped()

    async def _get_model(self, lifecycle: Lifecycle) -> bool:
        """Get the model of the MLX role. Return False if the command was stopped meanwhile."""
        if self._config.engine == "simulated" or "mlx" not in {role.name for role in self._roles}:
            return True
        getting = asyncio.create_task(find_model(self._environ(), self._log("models"), self._screen.fetching))
        try:
            await _first(_ended(getting), lifecycle.stopping.wait())
        finally:
            getting.cancel()
            self._screen.fetched()
        if not getting.done():
            return False
        self._use(getting.result())
        return True

    def _use(self, found: ModelFound) -> None:
        if found.trouble and self._model_named:
            raise LaunchError(found.trouble)
        self._screen.model(", ".join(found.names) or found.name or DEMO_MODEL, trouble=found.trouble)
        self.gguf = found.gguf
        if found.trouble or found.name == DEMO_MODEL:
            self._config = msgspec.structs.replace(self._config, model=DEMO_MODEL)

    def _keep(self, group: asyncio.TaskGroup, kept: Kept) -> None:
        self._kept[kept.name] = kept
        group.create_task(kept.run(), name=kept.name)

    def _keep_broker(self, group: asyncio.TaskGroup, broker: Broker, started: Process) -> None:
        launch = partial(self._launch_broker, broker)
        kept = Kept(BROKER, launch, self._on_report, self._on_death, first=started, most_pause_s=_BROKER_PAUSE_S)
        self._keep(group, kept)
        self._watch_store(broker, kept)

    async def _launch_broker(self, broker: Broker) -> Process:
        server = await start_broker(broker, self._config, self._log(BROKER), self._screen.mended)
        if BROKER in self._kept:
            self._on_report(self._kept[BROKER], Report("ready", shown(broker.url)))
        return server

    def _watch_store(self, broker: Broker, kept: Kept) -> None:
        """Report on the broker's store, and restart the broker when that is what the store needs."""

        def restart(why: str) -> None:
            self._beside.start(kept.restart(why), what="restarting the broker")

        # The screen shows when the broker ends and when it is back.
        logging.getLogger(connection.__name__).setLevel(logging.ERROR)
        log, most = self._log(BROKER), most_stored()
        keeper = Storekeeper(self._config, broker.folder, log, most, restart, self._screen.store)
        self._beside.start(keeper.run(), what="watching the broker's store")

    async def _find_ollama(self, group: asyncio.TaskGroup) -> None:
        """Select the Ollama server that answers, or else start the stand-in, or use none."""
        wanted = self._config.ollama_host != NO_OLLAMA
        url = ollama_url(self._config.ollama_host) if wanted else NO_OLLAMA
        version = await ollama_version(url) if wanted else None
        has_llama = util.find_spec("xllamacpp") is not None
        second = second_engine(self._config, version=version, gguf=self.gguf, has_llama=has_llama)
        if second.standin is not None:
            self._standin_port = held_port()
            port = self._standin_port.getsockname()[1]
            url = f"http://127.0.0.1:{port}"
            self._unready.add(STANDIN)
            launch = partial(self._launch_standin, port, url, second)
            self._keep(group, Kept(STANDIN, launch, self._on_report, self._on_death))
        elif version is None:
            # Without a server, the Ollama worker does not get ready; do not wait for it.
            self._unready.discard(OLLAMA)
            if not wanted:
                self._roles = [role for role in self._roles if role.name != OLLAMA]
        self._config = msgspec.structs.replace(self._config, ollama_host=url)
        shares = STANDIN in self._kept or (version is not None and await ollama_shares_cpu(url))
        shares = shares or any(map(shares_cpu, self._config.openai))
        self._config = divided(self._config, second_shares=shares)
        self._screen.ollama(url, second.said)
        self._screen.openai(self._config.openai)

    async def _launch(self, role: RoleProcess) -> Process:
        if role.name == OLLAMA and STANDIN in self._kept:
            await self._standin_ready.wait()
        config = msgspec.structs.replace(self._config, openai=[role.openai] if role.openai else [])
        return await spawn(role.command, self._environ(config), self._log(role.name))

    async def _launch_standin(self, port: int, url: str, second: Second) -> Process:
        command = (*STANDIN_COMMAND, "--port", str(port), "--held", *(second.standin or ()))
        # The demo model runs there in the same way as in the MLX role, on the other share of the cores.
        config = msgspec.structs.replace(self._config, mlx_threads=self._config.ollama_threads)
        process = await spawn_tied(command, self._environ(config), self._log(STANDIN))
        try:
            async with asyncio.timeout(_STANDIN_START_S):
                while process.returncode is None and not await ollama_answers(url):  # noqa: ASYNC110 - a server does not tell
                    await asyncio.sleep(0.1)
        except BaseException as error:
            await process.end()
            if isinstance(error, TimeoutError):
                raise LaunchError(f"The stand-in did not answer at {url} within {_STANDIN_START_S:.0f} s.") from None
            raise
        if process.returncode is None:
            self._on_report(self._kept[STANDIN], Report("ready", f"{url}, {second.runs}"))
        return process

    def _environ(self, config: Config | None = None) -> dict[str, str]:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(ENV_PREFIX)}
        # A child reads no settings file: this process has, and the file may change.
        return with_import_root({**inherited, **to_environment(config or self._config), FILE_VARIABLE: ""})

    def _log(self, name: str) -> Path:
        return self._dir / "logs" / f"{name}.log"

    def _on_report(self, kept: Kept, report: Report) -> None:
        if kept.stopping:
            return
        if report.facts.get("incurable") and kept.name in self._unready:
            # A role that has been ready before is restarted: what stops it now may pass.
            self._trouble = self._trouble or report.detail
            self._given_up.set()
            return
        # A server's worker is down until the server answers and has a model for users; do not wait for that.
        if report.state == "ready" or (kept.name in self._beside_mlx and report.state == "down"):
            self._unready.discard(kept.name)
            self._note_http(report)
            if kept.name == STANDIN:
                self._standin_ready.set()
            if not self._unready:
                self._all_ready.set()
        self._screen.report(kept.name, report)

    @property
    def _beside_mlx(self) -> tuple[str, ...]:
        """The workers of the engines beside MLX."""
        return OLLAMA, *(role.name for role in self._servers)

    def _on_death(self, kept: Kept, how: str) -> None:
        if self._trouble:
            return
        said = last_line(self._log(kept.name))
        self._screen.death(kept.name, f"{how} (last line of its log: {said})" if said else how)

    def _note_http(self, report: Report) -> None:
        """Remember the address of the gateway; a restarted gateway gets the same port."""
        if url := report.facts.get("http"):
            self._http = str(url)
            port = int(self._http.rsplit(":", 1)[1].rstrip("/"))
            self._config = msgspec.structs.replace(self._config, http_port=port)

    async def _stop(self, drain_s: float) -> None:
        """Stop one group after another within drain_s seconds, and then the broker."""
        now = asyncio.get_running_loop().time
        begun_at = now()
        order = [(*names, *self._beside_mlx) if OLLAMA in names else names for names in STOP_ORDER]
        others = tuple(name for name in self._kept if not any(name in names for names in order))
        for names in (others, *order):
            share = _EDGE_SHARE if names in _EDGE else 1.0
            left_s = max(0.0, begun_at + drain_s * share - now())
            if names == (BROKER,):
                left_s = _BROKER_STOP_S
                self._beside.cancel()
                await self._beside.join(_BROKER_STOP_S)
            group = [self._kept[name] for name in names if name in self._kept]
            await asyncio.gather(*(kept.stop(drain_s=left_s) for kept in group))


def up(
    config: Config,
    *,
    own_broker: bool,
    roles: Sequence[RoleProcess] = ROLES,
    ready_file: Path | None = None,
    model_named: bool = False,
    settings_file: Path | None = None,
) -> int:
    """Run `headrace up` in this process and return its exit code, as `lifecycle.run` does.

    Raises:
        ConfigError: `ollama_host` is not an address, or `nats_url` not the URL of a NATS server.
        LaunchError: the ready file cannot be written.
    """
    # These raise before anything is started.
    if config.ollama_host != NO_OLLAMA:
        ollama_url(config.ollama_host)
    if not own_broker:
        check_nats_urls(config.nats_url)
    if ready_file is not None:
        _check_ready_file(ready_file)
    screen = Screen(config)
    if settings_file is not None:
        screen.settings(settings_file)

    async def main(config: Config, lifecycle: Lifecycle) -> None:
        local = Local(
            config,
            own_broker=own_broker,
            screen=screen,
            roles=roles,
            ready_file=ready_file,
            model_named=model_named,
        )
        await local.serve(lifecycle)

    return run(main, config, "up", log_level="warning", drain_timeout_s=config.drain_timeout_s + OVERHEAD_S)


def _check_ready_file(path: Path) -> None:
    try:
        instance.check_writable(path)
    except OSError as error:
        raise LaunchError(f"Cannot write the ready file {path}: {error.strerror}.") from None


async def _ended(task: asyncio.Task[Any]) -> None:
    """Wait for a task without raising what it raises, and without cancelling it."""
    await asyncio.wait([task])


def divided(config: Config, *, second_shares: bool) -> Config:
    """The settings with the threads of both engines, where MLX runs on a CPU; the user's numbers stay.

    Args:
        config: the settings.
        second_shares: whether the second engine uses this machine's CPU.
    """
    if sys.platform != "linux" or config.engine == "simulated":
        return config
    cores = usable_cores(cpu_count(), cpu_quota())
    threads = divide(cores, mlx=config.mlx_threads, second=config.ollama_threads, second_shares=second_shares)
    return msgspec.structs.replace(config, mlx_threads=threads.mlx, ollama_threads=threads.second)


async def _first(*waits: Coroutine[Any, Any, object]) -> None:
    """Wait until one of several coroutines ends."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()

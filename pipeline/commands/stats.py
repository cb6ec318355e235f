"""`headrace stats`: the statistics of the queue, as tables or JSON."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from pipeline.broker.jetstream import Bus
from pipeline.commands import run_client, say_json
from pipeline.core.pauses import described
from pipeline.core.statistics import LaneStatistics, QueueStatistics, ServerState
from pipeline.process.terminal import visible
from pipeline.wire.messages import Load
from pipeline.wire.pauses import Pause
from pipeline.wire.subjects import QUEUE_STATS, Priority

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_WATCH_EVERY_S = 1.0
_NAMES = {"mlx": "MLX", "ollama": "Ollama"}
_LEVEL_STYLES = {"normal": "green", "busy": "yellow", "saturated": "red"}


def stats(url: str, *, as_json: bool, watch: bool) -> int:
    """Print the statistics once, or repeatedly until interrupted. Return the exit code."""
    show = _print_json if as_json else _print_tables
    return run_client(partial(show, watch=watch), url, name="headrace stats")


async def _print_json(bus: Bus, *, watch: bool) -> int:
    say_json((await bus.request(QUEUE_STATS)).data)
    while watch:
        await asyncio.sleep(_WATCH_EVERY_S)
        say_json((await bus.request(QUEUE_STATS)).data)
    return 0


async def _print_tables(bus: Bus, *, watch: bool) -> int:
    from rich.console import Console  # noqa: PLC0415 - not needed for JSON
    from rich.live import Live  # noqa: PLC0415

    console = Console(highlight=False)
    if not (watch and console.is_terminal):
        console.print(await _fetched(bus))
        while watch:
            await asyncio.sleep(_WATCH_EVERY_S)
            console.print()
            console.print(await _fetched(bus))
        return 0
    with Live(await _fetched(bus), console=console, auto_refresh=False) as live:
        while True:
            await asyncio.sleep(_WATCH_EVERY_S)
            live.update(await _fetched(bus), refresh=True)


async def queue_statistics(bus: Bus) -> QueueStatistics:
    """The statistics, from the monitor.

    Raises:
        Unreachable: no monitor answers.
    """
    return msgspec.json.decode((await bus.request(QUEUE_STATS)).data, type=QueueStatistics)


async def _fetched(bus: Bus) -> RenderableType:
    return render(await queue_statistics(bus))


def render(statistics: QueueStatistics) -> RenderableType:
    """Return tables of lanes and engines, a line for each engine, and a line for everything else."""
    from rich.console import Group  # noqa: PLC0415 - as above
    from rich.markup import escape  # noqa: PLC0415

    lanes = _table("lane", *_COUNTS)
    times = _table("lane", *(f"{what} {share}" for what in ("wait ms", "TTFT ms") for share in ("p50", "p95", "p99")))
    for priority in Priority:
        lane: LaneStatistics = getattr(statistics, priority)
        lanes.add_row(priority, *(str(getattr(lane, name)) for name in _COUNTS))
        times.add_row(
            priority, *(f"{value:.0f}" for q in (lane.wait_ms, lane.ttft_ms) for value in (q.p50, q.p95, q.p99))
        )
    engines = _table("engine", "level", "saturation", "slots", "tokens/s", "wait ms high/medium/low")
    reasons = []
    for name, load in statistics.engines.items():
        wait = load.predicted_wait_ms
        engines.add_row(
            name,
            f"[{_LEVEL_STYLES[load.level]}]{load.level}[/]" if load.available else "[red]away[/]",
            f"{load.saturation:.2f}",
            f"{load.slots.used}/{load.slots.total}",
            f"{load.tokens_per_s:.0f}",
            f"{wait.high:.0f} / {wait.medium:.0f} / {wait.low:.0f}",
        )
        reasons.append(escape(visible(engine_line(name, load))))
    reasons += [f"[yellow]{escape(visible(pause_line(pause)))}[/]" for pause in statistics.paused]
    if statistics.paused_tenants:
        reasons.append(f"[yellow]Pauses of tenants: {statistics.paused_tenants}. `headrace paused` lists them.[/]")
    reasons += [f"[red]{escape(visible(model_line(*each)))}[/]" for each in statistics.cannot_load.items()]
    reasons += [escape(visible(server_line(server))) for server in statistics.servers if server.dialect != "ollama"]
    errors = ", ".join(f"{code} {count}" for code, count in statistics.errors.items()) or "none"
    rest = f"Counted for {statistics.uptime_s:.0f} s. Dead letters: {statistics.dead}. Errors: {errors}."
    store = statistics.store
    if store is not None and store.state != "ok":
        style = "red" if store.refuses else "yellow"
        reasons.insert(0, f"[{style}]Store: {store.state}.[/] {escape(visible(store.reason))}")
    return Group(lanes, "", times, "", engines, "", *reasons, escape(visible(rest)))


def pause_line(pause: Pause, *, ended: bool = False) -> str:
    """Return a sentence about a pause or its end: `Lane low: paused by ada at 12:30 on 26 Nov (the demo).`"""
    what = described(pause.priority, pause.tenant)
    when = datetime.fromtimestamp(pause.at, UTC).astimezone().strftime("%H:%M on %d %b")
    why = f" ({pause.reason})" if pause.reason else ""
    who = ("resumed" if ended else "paused") + (f" by {pause.by}" if pause.by else "")
    return f"{what[:1].upper()}{what[1:]}: {who} at {when}{why}."


def engine_line(name: str, load: Load) -> str:
    """Return a sentence about an engine's load: `MLX: saturated (all slots in use).`"""
    state = load.level if load.available else "away"
    reason = f" ({load.reason})" if load.reason else ""
    return f"{_NAMES.get(name, name)}: {state}{reason}."


def model_line(name: str, why: str) -> str:
    """Return a sentence about a model: `Model coder cannot be loaded: its file is incomplete.`"""
    return f"Model {name} cannot be loaded: {why}"


def server_line(server: ServerState) -> str:
    """Return a sentence about a server: `http://127.0.0.1:8000 (openai): ready, 1 of 4 slots in use.`"""
    said = f"{server.slots.used} of {server.slots.total} slots in use" if server.state == "ready" else server.reason
    return f"{server.server} ({server.dialect}): {server.state}{f', {said}' if said else ''}".rstrip(".") + "."


def _table(*columns: str) -> Table:
    from rich.table import Table  # noqa: PLC0415 - as above

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column in ("lane", "engine", "level") else "right")
    return table


_COUNTS = ("queued", "running", "done", "failed", "spilled", "cancelled", "expired")

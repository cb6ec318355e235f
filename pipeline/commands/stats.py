"""`headrace stats`: the queue's statistics as a table, or as the JSON that the pipeline gives."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec

from pipeline.bus import Bus
from pipeline.commands import run_client, say
from pipeline.core.statistics import LaneStatistics, QueueStatistics
from pipeline.subjects import QUEUE_STATS, Priority

if TYPE_CHECKING:
    from rich.console import RenderableType

_WATCH_EVERY_S = 1.0
_LEVEL_STYLES = {"normal": "green", "busy": "yellow", "saturated": "red"}


def stats(url: str, *, as_json: bool, watch: bool) -> int:
    """Print the statistics once, or until interrupted."""
    return run_client(_stats(url, as_json=as_json, watch=watch))


async def _stats(url: str, *, as_json: bool, watch: bool) -> int:
    async with Bus.connect(url, name="headrace stats") as bus:
        if as_json:
            while True:
                say((await bus.request(QUEUE_STATS)).data.decode())
                if not watch:
                    return 0
                await asyncio.sleep(_WATCH_EVERY_S)
        from rich.console import Console  # noqa: PLC0415 - not needed for JSON
        from rich.live import Live  # noqa: PLC0415

        console = Console(highlight=False)
        if not watch:
            console.print(await _table(bus))
            return 0
        with Live(await _table(bus), console=console, auto_refresh=False) as live:
            while True:
                await asyncio.sleep(_WATCH_EVERY_S)
                live.update(await _table(bus), refresh=True)


async def _table(bus: Bus) -> RenderableType:
    answer = await bus.request(QUEUE_STATS)
    return render(msgspec.json.decode(answer.data, type=QueueStatistics))


def render(statistics: QueueStatistics) -> RenderableType:
    """The statistics as tables: lanes, engines, and a line of the rest."""
    from rich.console import Group  # noqa: PLC0415 - as above
    from rich.table import Table  # noqa: PLC0415

    lanes = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("priority", *_COUNTS, "wait p50/p95/p99 ms", "TTFT p50/p95/p99 ms"):
        lanes.add_column(column, justify="left" if column == "priority" else "right")
    for priority in Priority:
        lane: LaneStatistics = getattr(statistics, priority)
        counts = (str(getattr(lane, name)) for name in _COUNTS)
        times = (f"{q.p50:.0f} / {q.p95:.0f} / {q.p99:.0f}" for q in (lane.wait_ms, lane.ttft_ms))
        lanes.add_row(priority, *counts, *times)
    engines = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("engine", "level", "saturation", "slots", "tokens/s", "wait high/medium/low ms", "because"):
        engines.add_column(column)
    for name, load in statistics.engines.items():
        wait = load.predicted_wait_ms
        engines.add_row(
            name,
            f"[{_LEVEL_STYLES[load.level]}]{load.level}[/]",
            f"{load.saturation:.2f}",
            f"{load.slots.used}/{load.slots.total}",
            f"{load.tokens_per_s:.0f}",
            f"{wait.high:.0f} / {wait.medium:.0f} / {wait.low:.0f}",
            load.reason,
        )
    errors = ", ".join(f"{code} {count}" for code, count in statistics.errors.items()) or "none"
    rest = f"up {statistics.uptime_s:.0f} s   dead letters {statistics.dead}   errors {errors}"
    return Group(lanes, "", engines, "", rest)


_COUNTS = ("queued", "running", "done", "failed", "spilled", "cancelled", "expired")

"""The output of `headrace demo`: live tables on a terminal, plain lines elsewhere, and the summary at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from pipeline.commands.ledger import Ledger, PriorityTotals
from pipeline.process.terminal import visible
from pipeline.wire.messages import Load
from pipeline.wire.subjects import Priority

_PLAIN_EVERY_S = 2.0
_BAR_CHARS = 30
_RECENT_S = 5.0
_SUMMARY_COLUMNS = ("by MLX", "Ollama", "spilled", "wait ms p50", "p95", "first text ms p50", "p95", "errors")
_LEVEL_STYLES = {"normal": "green", "busy": "yellow", "saturated": "red"}

Levels = Sequence[tuple[float, str, str]]


class View:
    """The terminal of one demonstration. Inside its context, the tables are live."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._live: Live | None = None
        self._shown_at = 0.0
        self._fullest = 1

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def note(self, text: str) -> None:
        """Print a line above the tables."""
        self._console.print(text)

    def update(
        self, ledger: Ledger, loads: Mapping[str, Load], levels: Levels, elapsed_s: float, seconds: float
    ) -> None:
        """Show the present state; without a terminal, at most every two seconds."""
        if self._live is not None:
            self._live.update(self._tables(ledger, loads, levels, elapsed_s, seconds), refresh=True)
        elif time.monotonic() - self._shown_at >= _PLAIN_EVERY_S:
            self._shown_at = time.monotonic()
            self._console.print(_plain(ledger, loads, elapsed_s), soft_wrap=True)

    def summary(self, ledger: Ledger, levels: Levels, seconds: float) -> None:
        """Print the totals, and whether a request was lost or answered twice."""
        table = _table("priority", "sent", *_SUMMARY_COLUMNS)
        for priority in Priority:
            table.add_row(*_summary_cells(ledger.totals(priority)))
        self._console.print(f"\n[bold]{len(ledger.entries)} requests[/] were sent in {seconds:g} s.\n")
        self._console.print(table)
        mlx = [f"{level} at {at:.0f} s" for at, engine, level in levels if engine == "mlx"]
        self._console.print(f"\nMLX was {', '.join(mlx)}.")
        if ledger.is_whole():
            self._console.print("[green]Every request got exactly one last message.[/]")
        else:
            self._console.print(
                f"[red]{ledger.outstanding()} requests got no last message, or some got more than one.[/]"
            )

    def _tables(
        self, ledger: Ledger, loads: Mapping[str, Load], levels: Levels, elapsed_s: float, seconds: float
    ) -> RenderableType:
        engines = _table("engine", "level", "saturation", "slots", "tokens/s", "reason")
        for name, load in sorted(loads.items()):
            engines.add_row(
                name,
                f"[{_LEVEL_STYLES[load.level]}]{load.level}[/]" if load.available else "[red]away[/]",
                f"{load.saturation:.2f}",
                f"{load.slots.used}/{load.slots.total}",
                f"{load.tokens_per_s:.0f}",
                escape(visible(load.reason, keep="")),
            )
        lanes = _table("lane", "waiting or running", "sent", "answered", "spilled", "first text ms p50, last 5 s")
        waiting = {priority: ledger.outstanding(priority) for priority in Priority}
        self._fullest = max(self._fullest, *waiting.values())
        for priority in Priority:
            totals = ledger.totals(priority)
            recent = ledger.totals(priority, since=time.monotonic() - _RECENT_S)
            bar = "█" * round(_BAR_CHARS * waiting[priority] / self._fullest)
            lanes.add_row(
                priority,
                f"{bar:<{_BAR_CHARS}} {waiting[priority]:>4}",
                str(totals.sent),
                str(sum(totals.answered.values())),
                str(totals.spilled),
                f"{recent.ttft_ms.p50:.0f}" if recent.answered else "",
            )
        changes = "   ".join(f"{at:.0f} s {engine} {level}" for at, engine, level in levels[-6:])
        phase = "sending" if elapsed_s < seconds else "waiting for the remaining answers"
        return Group(f"[bold]{elapsed_s:.0f} of {seconds:g} s[/], {phase}\n", engines, "", lanes, "", changes)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column)
    return table


def _plain(ledger: Ledger, loads: Mapping[str, Load], elapsed_s: float) -> str:
    parts = [f"{elapsed_s:5.1f} s"]
    parts += [f"{name} {load.level} {load.saturation:.2f}" for name, load in sorted(loads.items())]
    for priority in Priority:
        totals = ledger.totals(priority)
        waiting, done = ledger.outstanding(priority), sum(totals.answered.values())
        parts.append(f"{priority}: {waiting} waiting, {done} answered, {totals.spilled} spilled")
    high = ledger.totals(Priority.HIGH, since=time.monotonic() - _RECENT_S)
    if high.answered:
        parts.append(f"high: first text {high.ttft_ms.p50:.0f} ms")
    return " | ".join(parts)


def _summary_cells(totals: PriorityTotals) -> list[str]:
    times = (totals.wait_ms.p50, totals.wait_ms.p95, totals.ttft_ms.p50, totals.ttft_ms.p95)
    return [
        totals.priority,
        str(totals.sent),
        str(totals.answered.get("mlx", 0)),
        str(totals.answered.get("ollama", 0)),
        str(totals.spilled),
        *(f"{value:.0f}" for value in times),
        ", ".join(f"{code} {count}" for code, count in totals.errors.items()) or "none",
    ]

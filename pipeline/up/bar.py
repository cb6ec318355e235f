"""The progress of a model that is being fetched: one changing bar on a terminal, a line every two seconds elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from pipeline.process.lifecycle import Report

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

_LINE_EVERY_S = 2.0


class FetchBar:
    """The bar of one fetch. Its only writer is the command that shows it.

    Args:
        console: where it is shown.
        label: the word at the beginning of each line.
    """

    def __init__(self, console: Console, label: str) -> None:
        self._console = console
        self._label = label
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._what = ""
        self._line_at = 0.0
        self.shown = False

    def update(self, report: Report) -> None:
        """Show a report of `consumers.models`: its facts are `what`, and the bytes `done` and `total`."""
        self.shown = True
        if self._console.is_terminal:
            self._draw(report.facts)
        elif time.monotonic() - self._line_at >= _LINE_EVERY_S or report.facts.get("what") != self._what:
            self._line_at, self._what = time.monotonic(), str(report.facts.get("what"))
            self._console.print(f"  {self._label:<9} {report.detail}", markup=False)

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _draw(self, facts: dict[str, Any]) -> None:
        from rich import progress  # noqa: PLC0415 - `run ROLE` has no screen

        what, total = str(facts.get("what")), facts.get("total") or None
        if self._progress is None:
            columns = (
                progress.TextColumn(f"  [bold]{self._label:<9}[/] {{task.description}}"),
                progress.BarColumn(),
                progress.DownloadColumn(),
                progress.TimeElapsedColumn(),
            )
            self._progress = progress.Progress(*columns, console=self._console, transient=True)
            self._progress.start()
        if what != self._what or self._task is None:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._what, self._task = what, self._progress.add_task(what, total=total)
        self._progress.update(self._task, completed=facts.get("done") or 0, total=total)

"""Gets a model for a process: for a role in a thread, with reports; for a command with a progress bar."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from consumers.models.getting import LocalModel, described, get, pull
from consumers.models.names import served_name_of
from consumers.models.several import wanted_models
from consumers.models.store import Store
from consumers.models.watched import Headway
from pipeline.config import Config
from pipeline.process.lifecycle import Lifecycle, Report

_MB: Final = 1e6
_PULL_EVERY_S: Final = 0.1


class GettingStopped(Exception):
    """The process must stop, and the getting of its model was given up."""


async def obtain(config: Config, lifecycle: Lifecycle, *, every_s: float) -> LocalModel:
    """Return the model of the settings. The progress is reported every so many seconds.

    Raises:
        ModelError: as `getting.get`.
        GettingStopped: the process must stop.
    """
    if config.engine == "simulated":
        return LocalModel(served_name_of(config.model), "")
    loop = asyncio.get_running_loop()
    view = _View(every_s)

    def note(step: Headway) -> None:
        if lifecycle.stopping.is_set():
            raise GettingStopped
        if (report := view.report(step)) is not None:
            loop.call_soon_threadsafe(partial(lifecycle.report, report.state, report.detail, **report.facts))

    return await asyncio.to_thread(get, config.model, Store(config.models_dir), note, offline=config.offline)


def pulled(name: str, config: Config, on_progress: Callable[[Report], None]) -> str:
    """Fetch a model into the store, for `headrace pull`. Returns its name.

    Raises:
        ModelError: as `getting.pull`.
    """
    view = _View(_PULL_EVERY_S)

    def note(step: Headway) -> None:
        if (report := view.report(step)) is not None:
            on_progress(report)

    return pull(name, Store(config.models_dir), note).name


def about(config: Config) -> tuple[bool, str, str]:
    """Describe the models of the settings, as `described` does one, for `headrace doctor`."""
    store = Store(config.models_dir)
    found = [described(model.place, store, offline=config.offline) for model in wanted_models(config)]
    advice = next((each[2] for each in found if each[2]), "")
    return all(each[0] for each in found), "; ".join(each[1] for each in found), advice


class _View:
    """The steps as reports, at most one for each so many seconds, and one for each new kind of step."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._what = ""
        self._began_at = self._shown_at = 0.0

    def report(self, step: Headway) -> Report | None:
        """The report of a step, or None if it is too early for one."""
        now = time.monotonic()
        if step.what == self._what and now - self._shown_at < self._every_s:
            return None
        if step.what != self._what:
            self._what, self._began_at = step.what, now
        self._shown_at = now
        size = f"{step.done / _MB:.1f} of {step.total / _MB:.1f} MB, " if step.total else ""
        text = f"{step.what}: {size}{now - self._began_at:.0f} s"
        return Report("loading", text, {"what": step.what, "done": step.done, "total": step.total})

"""The terminal output of `headrace up`: progress, the addresses and commands to try, and then what happens.

On a terminal, progress is one line that changes; elsewhere, it is a line every two seconds.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from pipeline.config import Config
from pipeline.process.lifecycle import Report
from pipeline.process.terminal import visible
from pipeline.up.bar import FetchBar
from pipeline.up.instance import Instance
from pipeline.up.model import DEMO_MODEL
from pipeline.up.reach import NATS_PORT
from pipeline.wire.messages import StoreReport

if TYPE_CHECKING:
    from rich.status import Status

_PROGRESS_EVERY_S = 2.0


class Screen:
    """The terminal of one `headrace up`. Its only writer is `Local`."""

    def __init__(self, config: Config, *, out: TextIO | None = None) -> None:
        from rich.console import Console  # noqa: PLC0415 - `run ROLE` has no screen

        self._config = config
        self._console = Console(file=cast("TextIO", _Lasting(out or sys.stdout)), highlight=False, soft_wrap=True)
        self._bar = FetchBar(self._console, "model")
        self._model = config.model
        self._status: Status | None = None
        self._loading = ""
        self._places: dict[str, str] = {}
        self._states: dict[str, Report] = {}
        self._shown_at = 0.0
        self._began_at = time.monotonic()
        self._died: set[str] = set()

    def settings(self, file: Path) -> None:
        """Show which settings file was read."""
        self._line("settings", str(file.absolute()))

    def broker(self, url: str, *, own: bool) -> None:
        """Show the broker's address."""
        self._places["broker"] = f"{shown(url)}  ({'embedded nats-server' if own else 'not started by this command'})"
        self._line("broker", self._places["broker"])

    def fetching(self, report: Report) -> None:
        """Show the progress of the model that is being fetched."""
        self._bar.update(report)

    def fetched(self) -> None:
        """Show that the model is no longer being fetched."""
        self._bar.close()

    def model(self, name: str, *, trouble: str) -> None:
        """Note the model that is used. With a trouble, it is the demo model in place of the default one."""
        if trouble:
            advice = f"Using the demo model, a toy. `{command_name()} pull {self._config.model}` fetches it."
            self._line("model", f"{trouble} {advice}", style="yellow")
        elif self._bar.shown:
            self._line("model", f"{name} is ready")
        self._model = name

    def ollama(self, url: str, said: str) -> None:
        """Note which second engine is used, for the overview."""
        self._places["ollama"] = f"{url}  ({said})"

    def openai(self, urls: Sequence[str]) -> None:
        """Note which servers of OpenAI's API are used, for the overview."""
        self._places["openai"] = ", ".join(urls)

    def report(self, name: str, report: Report) -> None:
        """Show a report of a process."""
        before = self._states.get(name)
        self._states[name] = report
        failed = before.facts.get("cannot_load", {}) if before is not None else {}
        for model, why in report.facts.get("cannot_load", {}).items():
            if failed.get(model) != why:
                self._line(name, f"model {model} cannot be loaded: {why}", style="yellow")
        if name == self._loading and report.state != "loading":
            self._end_progress()
        if report.state == "ready" and (before is None or before.state != "ready"):
            self._line(name, f"ready{' again' if name in self._died else ''}  {report.detail}".rstrip())
        elif report.state == "loading":
            self._progress(name, report)
        elif report.state == "down" and report.detail:
            self._line(name, report.detail, style="yellow")

    def death(self, name: str, how: str) -> None:
        """Show that a process ended and is restarted."""
        self._states.pop(name, None)
        self._died.add(name)
        self._line(name, how, style="yellow")

    def store(self, report: StoreReport) -> None:
        """Show that the state of the broker's store changed."""
        if report.state == "ok":
            self._line("store", "has room again")
        else:
            self._line("store", report.reason, style="red" if report.refuses else "yellow")

    def mended(self, said: str) -> None:
        """Show what was damaged in the broker's store, and what was done."""
        self._line("store", said, style="yellow")

    def serving(self, here: Instance, state_dir: Path) -> None:
        """Show that everything is ready, with the addresses and commands to try."""
        self._end_progress()
        self._console.print(f"\n[bold]headrace is ready[/] after {time.monotonic() - self._began_at:.1f} s.\n")
        for name, text in self._overview(here, state_dir):
            self._line(name, text)
        self._console.print("\nTry it in another terminal:\n")
        for command in self._commands(here, state_dir):
            self._console.print(f"  [cyan]{_escape(command)}[/]")
        self._console.print(
            "\nPress Ctrl-C to finish the running requests and stop. Press it again to stop immediately."
        )

    def stopping(self) -> None:
        """Show that draining begins."""
        self._end_progress()
        self._console.print(
            f"\nFinishing the running requests, for at most {self._config.drain_timeout_s:g} s. "
            "Queued requests are kept and resume at the next start."
        )

    def stopped(self) -> None:
        """Show that everything has stopped."""
        self._console.print("Stopped.")

    def _overview(self, here: Instance, state_dir: Path) -> list[tuple[str, str]]:
        return [
            ("broker", self._places["broker"]),
            ("mlx", self._engine()),
            ("ollama", self._places.get("ollama", "none")),
            *([("openai", self._places["openai"])] if self._places.get("openai") else []),
            ("dashboard", f"{here.http}   (OpenAI base URL: {here.http}/v1)" if here.http else "none"),
            ("state", f"{state_dir}  (logs in logs/)"),
        ]

    def _engine(self) -> str:
        said = self._states.get("mlx", Report("down")).detail
        if self._config.engine == "simulated":
            return "simulated  (no model runs; the answers are filler text)"
        text = said if self._model in said else f"{self._model}  {said}".rstrip()
        if self._model == DEMO_MODEL:
            text += "  (a toy; --model NAME_OR_PATH selects a real model)"
        return text

    def _commands(self, here: Instance, state_dir: Path) -> list[str]:
        question = "'What is the capital of Japan?'"
        where = f" --state-dir {shlex.quote(str(state_dir))}" if self._config.state_dir else ""
        server = "" if here.nats == f"nats://127.0.0.1:{NATS_PORT}" else f" -s {here.nats}"
        headrace = command_name()
        commands = [f"{headrace} send{where} {question}", f"{headrace} stats{where} --watch"]
        if shown(here.nats) == here.nats:
            commands.append(f"nats{server} req --timeout 2m llm.ask.high {question}")
        return commands

    def _progress(self, name: str, report: Report) -> None:
        text = f"{name}: loading  {report.detail}".rstrip()
        if self._console.is_terminal:
            self._loading = name
            if self._status is None:
                self._status = self._console.status(_escape(text))
                self._status.start()
            self._status.update(_escape(text))
        elif time.monotonic() - self._shown_at >= _PROGRESS_EVERY_S:
            self._shown_at = time.monotonic()
            self._line(name, f"loading  {report.detail}".rstrip())

    def _end_progress(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _line(self, name: str, text: str, *, style: str = "") -> None:
        self._console.print(f"  [bold]{name:<9}[/] {_escape(text)}", style=style or None)


class _Lasting:
    """An output whose faults are of no account: the terminal may be closed, or the disk full, and the pipeline runs on.

    A reader that leaves (BrokenPipeError) still ends the command.
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._out, name)

    def write(self, text: str) -> int:
        """Write what can be written."""
        try:
            return self._out.write(text)
        except BrokenPipeError:
            raise
        except OSError:
            return len(text)

    def flush(self) -> None:
        """Flush what can be written."""
        try:
            self._out.flush()
        except BrokenPipeError:
            raise
        except OSError:
            pass


def shown(url: str) -> str:
    """Return a broker's URL, or several, without credentials."""
    return ",".join(re.sub(r"^([a-z]+://)?.*@", r"\1", part) for part in url.split(","))


def command_name() -> str:
    """Return the command that started headrace, so that the commands on the screen can be copied."""
    if shutil.which("headrace"):
        return "headrace"
    started = Path(sys.argv[0])
    return f"{Path(sys.executable).name} -m pipeline.cli" if started.suffix == ".py" else shlex.quote(str(started))


def _escape(text: str) -> str:
    from rich.markup import escape  # noqa: PLC0415 - as above

    return escape(visible(text, keep=""))

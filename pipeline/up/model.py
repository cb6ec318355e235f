"""The model of `headrace up`: a child process gets it before the roles start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from pipeline.process.lifecycle import Report
from pipeline.process.python import module_command
from pipeline.up.children import last_line, spawn

MODELS_COMMAND = module_command("consumers.models")
DEMO_MODEL = "headrace-demo"


class ModelFound(NamedTuple):
    """What became of getting the model.

    Attributes:
        name: of the default one, in answers; empty if there is none.
        names: of all models.
        gguf: the GGUF file of the same weights, if there is one.
        trouble: why there is none, as a sentence.
    """

    name: str
    gguf: Path | None = None
    trouble: str = ""
    names: tuple[str, ...] = ()


async def find_model(environ: Mapping[str, str], log: Path, on_progress: Callable[[Report], None]) -> ModelFound:
    """Get the model that the settings in environ name. Cancelling ends the getting at once.

    Raises:
        LaunchError: the process that gets it cannot be started.
    """
    said: dict[str, Report] = {}

    def on_report(report: Report) -> None:
        if report.state == "loading":
            on_progress(report)
        elif report.detail:
            said[report.state] = report

    process = await spawn(MODELS_COMMAND, environ, log)
    code = await process.wait(on_report)
    if (ready := said.get("ready")) is not None:
        file = ready.facts.get("gguf")
        return ModelFound(ready.detail, Path(file) if file else None, names=tuple(ready.facts.get("names", ())))
    if (down := said.get("down")) is not None:
        return ModelFound("", trouble=down.detail)
    return ModelFound("", trouble=f"The process that gets the model ended with code {code}: {last_line(log)}")

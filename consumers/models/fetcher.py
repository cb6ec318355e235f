"""Models for a worker of MLX: each is fetched by a process of its own, `consumers.models.pulling`."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from consumers.models import names
from consumers.models.known import KNOWN
from pipeline.config import Config, to_environment
from pipeline.process.lifecycle import Report
from pipeline.process.python import module_command, with_import_root
from pipeline.wire.errors import ErrorCode, HeadraceError, quoted
from pipeline.wire.fetches import FetchStep

_END_GRACE_S: Final = 5.0
_LATEST: Final = ":latest"
_decoder: Final = msgspec.json.Decoder(Report)


class StoreFetcher:
    """Fetches models into the store, as `Fetcher`.

    Args:
        config: the settings of the worker.
        serve: called with the name of a stored model. Returns the name under which the engine answers with it, or, as
            the second, why it does not.
    """

    def __init__(self, config: Config, serve: Callable[[str], Awaitable[tuple[str, str]]]) -> None:
        self._config = config
        self._serve = serve

    def fetchable(self, name: str) -> str:
        """As `Fetcher.fetchable`: a known model, a repository on the hub, or the address of a GGUF file."""
        model = name.removesuffix(_LATEST)
        if not names.is_fetchable(model):
            known = ", ".join(KNOWN)
            message = (
                f"MLX's workers cannot fetch model {quoted(name)}. They fetch {known}, repositories on the Hugging "
                "Face hub (owner/name), and GGUF files by their address. All other names need an Ollama server beside "
                "headrace."
            )
            raise HeadraceError(ErrorCode.MODEL_NOT_FOUND, message, param="model")
        return model

    async def fetch(self, model: str, note: Callable[[FetchStep], None]) -> str:
        """As `Fetcher.fetch`."""
        note(FetchStep("pulling manifest"))
        stored = await self._stored(model, note)
        if stored != model:
            note(FetchStep(f"its name is {stored}"))
        served, trouble = await self._serve(stored)
        if not served:
            note(FetchStep(f"{stored} is stored, and not served: {trouble}"))
        return served

    async def _stored(self, model: str, note: Callable[[FetchStep], None]) -> str:
        """Store the model. Returns its name."""
        process = await asyncio.create_subprocess_exec(
            *module_command("consumers.models.pulling"),
            model,
            stdin=DEVNULL,
            stdout=PIPE,
            env=with_import_root(os.environ | to_environment(self._config)),
        )
        killed = f"The process that fetched {quoted(model)} was killed. Pull again."
        last = Report("down", killed)
        step: FetchStep | None = None
        try:
            assert process.stdout is not None  # noqa: S101 - it is a pipe
            async for line in process.stdout:
                last = _decoder.decode(line)
                if last.state == "loading":
                    now_at = step_of(model, last)
                    if step is not None and step.status != now_at.status:
                        note(_complete(step))
                    step = now_at
                    note(step)
        finally:
            await _end(process)
        if last.state != "ready":
            # A report of progress is the last one of a process that was killed.
            raise HeadraceError(ErrorCode.ENGINE_FAILED, last.detail if last.state == "down" else killed)
        if step is not None:
            note(_complete(step))
        return last.detail


def step_of(model: str, report: Report) -> FetchStep:
    """A report of progress in the form that Ollama's clients read.

    They show a bar for a step with a digest, and text for any other. The digest is that of the name, as in `/api/tags`.
    """
    what, done, total = str(report.facts["what"]), int(report.facts["done"]), int(report.facts["total"])
    if total and what.startswith("fetching"):
        digest = hashlib.sha256(model.encode()).hexdigest()
        return FetchStep(f"pulling {digest[:12]}", f"sha256:{digest}", total, min(done, total))
    return FetchStep(what, "", total, min(done, total))


def _complete(step: FetchStep) -> FetchStep:
    """The same step at its end: the reports come from time to time, and rarely at the last byte."""
    return msgspec.structs.replace(step, completed=step.total)


async def _end(process: Process) -> None:
    """Wait for a process that has ended, or end it: first so that it ends what it has started."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        try:
            async with asyncio.timeout(_END_GRACE_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

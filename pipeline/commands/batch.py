"""`headrace batch`: run the lines of a file, show how far they are, and write the results beside the file."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pipeline.aio import Background
from pipeline.broker.batches import BatchStore
from pipeline.broker.connection import BusError
from pipeline.broker.files import Files, FileTraits
from pipeline.broker.jetstream import Bus
from pipeline.commands import run_client, say, tell
from pipeline.commands.stats import pause_line, queue_statistics
from pipeline.core.batch_lines import read_line
from pipeline.gateway.batches import order_of
from pipeline.process.terminal import visible
from pipeline.wire.batches import (
    MAX_FILE_BYTES,
    BatchCall,
    BatchObject,
    BatchOrder,
    BatchStatus,
    LineFault,
    is_stored_id,
)
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.subjects import Priority

_LOOK_EVERY_S = 0.5
# How often to ask whether an operator has paused the lane.
_PAUSED_EVERY_S = 2.0
# Where there is no terminal, a line is written this often.
_LINE_EVERY_S = 5.0
_FIRST_LINE_BYTES = 8 << 20


class BatchJob(msgspec.Struct, frozen=True, kw_only=True):
    """What to run: a file, or a batch that runs already. The endpoint is that of the first line, unless it is given."""

    source: str
    endpoint: str | None = None
    window: str = "24h"


class Results(msgspec.Struct, frozen=True):
    """Where the results are written."""

    output: Path
    errors: Path

    @classmethod
    def beside(cls, source: str) -> Results:
        """The files for a source `x.jsonl`: `x.output.jsonl` and `x.errors.jsonl`; for a batch's id in this folder."""
        stem = source.removesuffix(".jsonl")
        return cls(Path(f"{stem}.output.jsonl"), Path(f"{stem}.errors.jsonl"))


class _NotABatch(Exception):
    """A file that cannot be run as a batch, and why."""


def batch(job: BatchJob, url: str) -> int:
    """Run a batch. Return 0 if every line was answered, else 1. Interrupting leaves the batch running."""
    if job.source.startswith("batch_") and not Path(job.source).exists():
        return run_client(partial(_follow, job.source), url, name="headrace batch")
    try:
        with Path(job.source).open("rb") as content:
            endpoint = job.endpoint or _endpoint_of(content)
    except _NotABatch as error:
        tell(f"headrace: {job.source}: {error}")
        return 1
    except OSError as error:
        tell(f"headrace: Cannot read {job.source}: {error.strerror}.")
        return 1
    with Path(job.source).open("rb") as content:
        return run_client(partial(_begin, job, endpoint, content), url, name="headrace batch")


def _endpoint_of(content: IO[bytes]) -> str:
    """The endpoint of the first line; raises _NotABatch if the file cannot be that of a batch."""
    if os.fstat(content.fileno()).st_size > MAX_FILE_BYTES:
        raise _NotABatch(f"The file has more than {MAX_FILE_BYTES} bytes. Split it.")
    number, first = 0, b""
    while not first:
        if not (read := content.readline(_FIRST_LINE_BYTES)):
            raise _NotABatch("The file has no lines.")
        number, first = number + 1, read.strip()
    line = read_line(first)
    if isinstance(line, LineFault):
        raise _NotABatch(f"line {number}: {line.message}")
    return line.url


async def _begin(job: BatchJob, endpoint: str, content: IO[bytes], bus: Bus) -> int:
    if refusal := await _refusal_of_store(bus):
        tell(f"headrace: {refusal}")
        return 1
    await bus.sample_clock()
    now, store = int(bus.clock.wall()), BatchStore(bus)
    traits = FileTraits(job.source.rpartition("/")[2], "batch", now)
    file = await Files(bus).put(f"file-{secrets.token_hex(12)}", content, traits)
    try:
        order = order_of(BatchCall(file.id, endpoint, job.window), file, now, "")
    except HeadraceError as error:
        tell(f"headrace: {error}")
        return 1
    await store.create(order)
    tell(f"{order.id} is stored. It runs on if this command is interrupted; `headrace batch {order.id}` follows it.")
    return await _shown(order, Results.beside(job.source), bus)


async def _refusal_of_store(bus: Bus) -> str:
    """Why the broker takes no new files, or nothing. What is left of a full disk is for accepted requests."""
    try:
        store = (await queue_statistics(bus)).store
    except BusError:
        return ""  # without a monitor a batch is stored, and waits
    if store is None or not store.refuses:
        return ""
    return f"{ErrorCode.QUEUE_FULL if store.state == 'full' else ErrorCode.UNAVAILABLE}: {store.reason}"


async def _follow(batch_id: str, bus: Bus) -> int:
    order = await BatchStore(bus).order(batch_id) if is_stored_id(batch_id) else None
    if order is None:
        tell(f'headrace: There is no file and no batch "{batch_id}".')
        return 1
    return await _shown(order, Results.beside(batch_id), bus)


async def _shown(order: BatchOrder, results: Results, bus: Bus) -> int:
    with BatchBar() as bar:
        beside = Background()
        beside.start(_tell_pause(bus, bar), what="asking whether the lane is paused")
        try:
            ended = await _followed(BatchStore(bus), order, bar)
        finally:
            beside.cancel()
    return await _written(ended, results, bus)


async def _tell_pause(bus: Bus, bar: BatchBar) -> None:
    """Show, once, that an operator has paused the lane of all lines. Cancel it when the batch has ended."""
    while True:
        with contextlib.suppress(BusError):
            for pause in (await queue_statistics(bus)).paused:
                if pause.priority is Priority.LOW:
                    bar.note(visible(pause_line(pause)))
                    return
        await asyncio.sleep(_PAUSED_EVERY_S)


async def _followed(store: BatchStore, order: BatchOrder, bar: BatchBar) -> BatchObject:
    while True:
        try:
            shown = await store.show(order)
        except BusError:
            shown = None  # `run_client` ends a command whose broker stays away
        if shown is not None:
            bar.update(shown)
            if shown.status.is_final:
                return shown
        await asyncio.sleep(_LOOK_EVERY_S)


async def _written(ended: BatchObject, results: Results, bus: Bus) -> int:
    for fault in ended.errors.data if ended.errors else ():
        tell(f"headrace: {f'line {fault.line}: ' if fault.line else ''}{fault.message}")
    files = Files(bus)
    for file_id, path in ((ended.output_file_id, results.output), (ended.error_file_id, results.errors)):
        if file_id is not None and (found := await files.find(file_id)) is not None:
            try:
                with path.open("wb") as target:
                    async for piece in files.read(found):
                        await asyncio.to_thread(target.write, piece)
            except OSError as error:
                tell(f"headrace: {path}: {error.strerror}. `headrace batch {ended.id}` writes it again.")
                return 1
            say(str(path))
    counts = ended.request_counts
    tell(
        f"{ended.id}: {ended.status}. {counts.completed} of {counts.total} lines were answered, {counts.failed} failed."
    )
    return int(ended.status is not BatchStatus.COMPLETED or counts.failed > 0)


class BatchBar:
    """How far a batch is: a bar on a terminal, a line every few seconds elsewhere. Its only writer is the command."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._is_terminal = console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not self._is_terminal)
        self._task: TaskID | None = None
        self._line_at = time.monotonic()

    def __enter__(self) -> Self:
        """Show the bar."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Remove it."""
        self._progress.stop()

    def note(self, text: str) -> None:
        """Write a line above the bar."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def update(self, shown: BatchObject) -> None:
        """Show a state of the batch."""
        counts = shown.request_counts
        done, said = counts.completed + counts.failed, str(shown.status).replace("_", " ")
        if self._is_terminal:
            if self._task is None:
                self._task = self._progress.add_task(said)
            self._progress.update(self._task, description=said, completed=done, total=counts.total or None)
        elif time.monotonic() - self._line_at >= _LINE_EVERY_S:
            self._line_at = time.monotonic()
            tell(f"{said}: {done} of {counts.total}")

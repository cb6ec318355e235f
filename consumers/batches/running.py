"""One batch: its input is checked, its lines are fed to LOW, their results are written, and the files are made."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import msgspec

from consumers.batches.composing import Unrun, compose
from consumers.batches.lines import LineCaller, LineEnd, Unanswered
from pipeline.broker.batches import BatchStore, decode_batch
from pipeline.broker.connection import TooLarge
from pipeline.broker.files import FileIncomplete, Files, StoredFile
from pipeline.config import Config
from pipeline.core.batch_lines import Checking, Cutter, LinesEnded
from pipeline.process.role import Role
from pipeline.wire.batches import BatchObject, BatchOrder, BatchPart, BatchStatus, LineFault, RequestCounts, faulty

log = logging.getLogger(__name__)

# The counts of a running batch are stored this often.
_REPORT_EVERY_S = 1.0
# While a batch is being cancelled, its lines in the queue are cancelled this often: one may just have been fed.
_CANCEL_EVERY_S = 1.0
# The most lines of one batch in the queue, whatever the settings are: the bound of `batch_lines`. After a restart, this
# many of the lines without a result can be in the queue, and no later one.
_MOST_IN_QUEUE = 1000


class BatchRun:
    """Runs one batch to its end. What it knows comes from the broker, so another process can continue it.

    A line is fed only after the results of earlier ones are written: at most `batch_lines` lines are fed and have no
    result, and they are the first ones of those without a result.

    Args:
        me: the role's connection.
        config: the settings.
        order: the batch.
        leads: whether this process may act now.

    Attributes:
        cancelled: set once the batch was cancelled.
    """

    def __init__(self, me: Role, config: Config, order: BatchOrder, leads: Callable[[], bool]) -> None:
        self.cancelled = asyncio.Event()
        self._clock = me.bus.clock
        self._config = config
        self._order = order
        self._store = BatchStore(me.bus)
        self._files = Files(me.bus)
        self._caller = LineCaller(me, config, order, leads, self._is_over)
        self._batch: BatchObject = order.begun()
        self._state = self._store.journal(order.id, BatchPart.STATE)
        self._journals = {part: self._store.journal(order.id, part) for part in (BatchPart.OUTPUT, BatchPart.ERROR)}
        self._ledger = LinesEnded(0)
        self._writing = asyncio.Lock()
        self._stating = asyncio.Lock()

    async def run(self) -> None:
        """Run the batch until it has ended.

        Raises:
            BusError: the broker did not answer, or another process runs the batch. A new run continues.
        """
        if (stored := await self._state.latest()) is not None:
            self._batch = decode_batch(stored)
        if not self._batch.status.is_final:
            try:
                await self._carry(resumed=stored is not None)
            except FileIncomplete as error:
                await self._give_up(error)
        for journal in self._journals.values():
            await journal.clear()

    async def _carry(self, *, resumed: bool) -> None:
        file = await self._files.find(self._order.input_file_id)
        if file is None:
            raise FileIncomplete(f"File {self._order.input_file_id} does not exist any more.")
        if await self._store.is_cancelled(self._order.id):
            self.cancelled.set()
        if self._batch.status is BatchStatus.VALIDATING:
            resumed = False
            if not await self._check(file):
                return
        await self._recall()
        if self._batch.status is not BatchStatus.FINALIZING:
            await self._feed(file, resumed=resumed)
        await self._finish(file)

    # ---- checking

    async def _check(self, file: StoredFile) -> bool:
        """Check the input file. Returns whether the batch can run."""
        checking = Checking(self._order.endpoint, self._config.max_body_bytes)
        async with aclosing(self._lines(file)) as lines:
            async for number, data in lines:
                if not checking.add(number, data):
                    break
        checking.end()
        if checking.faults:
            await self._fail(checking.faults)
            return False
        counts = RequestCounts(checking.lines)
        await self._change(status=BatchStatus.IN_PROGRESS, in_progress_at=self._now(), request_counts=counts)
        return True

    async def _fail(self, faults: list[LineFault]) -> None:
        self._batch = faulty(self._batch, faults, self._now())
        await self._change()

    async def _lines(self, file: StoredFile) -> AsyncGenerator[tuple[int, bytes]]:
        cutter = Cutter(self._config.max_body_bytes)
        async with aclosing(self._files.read(file)) as chunks:
            async for chunk in chunks:
                for line in cutter.feed(chunk):
                    yield line
        for line in cutter.end():
            yield line

    async def _recall(self) -> None:
        """Read which lines have a result."""
        self._ledger = LinesEnded(self._batch.request_counts.total)
        for part, journal in self._journals.items():
            async for number, _ in journal.entries():
                self._ledger.add(number, failed=part is BatchPart.ERROR)

    # ---- feeding

    async def _feed(self, file: StoredFile, *, resumed: bool) -> None:
        """Feed the lines without a result, and wait until each has one or cannot get one any more."""
        room = asyncio.Semaphore(self._config.batch_lines)
        async with asyncio.TaskGroup() as group:
            beside = [group.create_task(self._report()), group.create_task(self._heed_cancel())]
            lost: FileIncomplete | None = None
            try:
                await self._feed_lines(file, group, room, resumed=resumed)
            except FileIncomplete as error:
                lost = error
            for _ in range(self._config.batch_lines):
                await room.acquire()
            for task in beside:
                task.cancel()
        if lost is not None:
            raise lost

    async def _feed_lines(
        self, file: StoredFile, group: asyncio.TaskGroup, room: asyncio.Semaphore, *, resumed: bool
    ) -> None:
        fed = 0
        async with aclosing(self._lines(file)) as lines:
            async for number, data in lines:
                if self._ledger.has(number):
                    continue
                await room.acquire()
                fed_before = resumed and fed < _MOST_IN_QUEUE
                if self._is_over() and not fed_before:
                    room.release()
                    break
                group.create_task(self._line(number, data, room, fed_before=fed_before))
                fed += 1

    def _is_over(self) -> bool:
        """Whether no further line is fed."""
        return self.cancelled.is_set() or self._clock.wall() >= self._batch.expires_at

    async def _line(self, number: int, data: bytes, room: asyncio.Semaphore, *, fed_before: bool) -> None:
        try:
            ended = await self._caller.call(number, data, fed_before=fed_before)
        except Unanswered:
            pass
        else:
            try:
                await self._write(ended, number)
            except TooLarge as error:
                await self._write(self._caller.oversized(number, data, error.size, error.most), number)
        room.release()

    async def _write(self, ended: LineEnd, number: int) -> None:
        part = BatchPart.ERROR if ended.failed else BatchPart.OUTPUT
        async with self._writing:
            await self._journals[part].append(msgspec.json.encode(ended.result) + b"\n", number)
            self._ledger.add(number, failed=ended.failed)

    async def _report(self) -> None:
        """Store the counts while they change."""
        while True:
            await asyncio.sleep(_REPORT_EVERY_S)
            if self._ledger.counts != self._batch.request_counts:
                await self._change(request_counts=msgspec.structs.replace(self._ledger.counts))

    async def _heed_cancel(self) -> None:
        await self.cancelled.wait()
        await self._change(status=BatchStatus.CANCELLING, cancelling_at=self._batch.cancelling_at or self._now())
        while True:
            await self._caller.cancel_all()
            await asyncio.sleep(_CANCEL_EVERY_S)

    # ---- the end

    async def _finish(self, file: StoredFile) -> None:
        """Make the files, and store the last state."""
        if self._batch.status is not BatchStatus.FINALIZING:
            counts = msgspec.structs.replace(self._ledger.counts)
            await self._change(status=BatchStatus.FINALIZING, finalizing_at=self._now(), request_counts=counts)
        was_cancelled = self._batch.cancelling_at is not None
        unrun = Unrun(self._lines(file), self._order, self._ledger, was_cancelled=was_cancelled)
        files = await self._compose(None if self._ledger.complete else unrun)
        counts = msgspec.structs.replace(self._ledger.counts)
        counts.failed += unrun.count
        status, at = BatchStatus.COMPLETED, "completed_at"
        if was_cancelled:
            status, at = BatchStatus.CANCELLED, "cancelled_at"
        elif unrun.count:
            status, at = BatchStatus.EXPIRED, "expired_at"
        await self._change(status=status, request_counts=counts, **files, **{at: self._now()})
        log.info("Batch %s: %s, %d completed, %d failed", self._order.id, status, counts.completed, counts.failed)

    async def _compose(self, unrun: Unrun | None) -> dict[str, str | None]:
        output = await compose(self._files, self._order, BatchPart.OUTPUT, self._journals[BatchPart.OUTPUT])
        error = await compose(self._files, self._order, BatchPart.ERROR, self._journals[BatchPart.ERROR], unrun)
        return {"output_file_id": output, "error_file_id": error}

    async def _give_up(self, lost: FileIncomplete) -> None:
        """The input file is gone: the lines that were not run cannot be read. The results of the others are kept."""
        await self._recall()
        files = await self._compose(None)
        self._batch = faulty(self._batch, [LineFault("file_not_found", str(lost))], self._now())
        await self._change(request_counts=self._ledger.counts, **files)

    # ---- the state

    async def _change(self, **changes: Any) -> None:
        async with self._stating:
            self._batch = msgspec.structs.replace(self._batch, **changes)
            await self._state.replace(msgspec.json.encode(self._batch))

    def _now(self) -> int:
        return int(self._clock.wall())

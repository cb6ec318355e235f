"""Which batches run: the process that leads takes them in the order of their creation, a few at a time."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from functools import partial

from consumers.batches.running import BatchRun
from pipeline.aio import wait_set
from pipeline.broker.batches import BatchStore
from pipeline.broker.candidate import Candidate
from pipeline.broker.connection import BusError, Message
from pipeline.broker.files import Files
from pipeline.config import Config
from pipeline.core.backoff import Backoff
from pipeline.process.lifecycle import Lifecycle
from pipeline.process.role import Role
from pipeline.wire.batches import BatchOrder, BatchPart, part_subject
from pipeline.wire.subjects import LEADER_BATCHES

log = logging.getLogger(__name__)

# So many batches run at once. Others wait: each run has its own lines in the queue.
MOST_RUNS = 8
# An order that was not heard of is found within this time.
_LOOK_EVERY_S = 5.0
# Before a run that failed is begun again, at first and at most. It continues where it was.
_AGAIN_S = 0.5
_AGAIN_MOST_S = 30.0
# What an upload that was broken off has left is removed once it has been idle for so long; it is looked for as often.
_UNFINISHED_S = 3600.0


class Batches:
    """Runs the batches while this process leads. Its only writer is its own loop.

    Args:
        me: the role's connection.
        config: the settings.

    Attributes:
        candidate: whether this process leads.
    """

    def __init__(self, me: Role, config: Config) -> None:
        self.candidate = Candidate(me.bus, config, me.name, self._on_change, LEADER_BATCHES)
        self._me = me
        self._config = config
        self._store = BatchStore(me.bus)
        self._waiting: deque[BatchOrder] = deque()
        self._runs: dict[str, BatchRun] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._next = 1
        self._tidies_at = 0.0
        self._holds = False
        self._wake = asyncio.Event()
        self._told = asyncio.Event()

    async def run(self, lifecycle: Lifecycle) -> None:
        """Run until lifecycle asks to stop. Lines that are in the queue stay there; the next process gathers them."""
        await self._me.bus.subscribe(part_subject("*", BatchPart.ORDER), self._on_order)
        await self._me.bus.subscribe(part_subject("*", BatchPart.CANCEL), self._on_cancel)
        self._me.bus.on_reconnect(self._wake.set)
        tasks = [asyncio.create_task(work) for work in (self.candidate.run(), self._serve(), self._report(lifecycle))]
        stopping = asyncio.create_task(lifecycle.stopping.wait())
        try:
            done, _ = await asyncio.wait([*tasks[:2], stopping], return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stopping}:
                task.result()
        finally:
            self._drop()
            for task in (*tasks, stopping):
                task.cancel()
            await asyncio.gather(*tasks, stopping, return_exceptions=True)

    async def _report(self, lifecycle: Lifecycle) -> None:
        await self._told.wait()
        lifecycle.report("ready", "" if self._holds else "standing by: another process has the lease, or just had it")

    async def _on_change(self, holds: bool) -> None:  # noqa: FBT001 - the one fact
        self._holds = holds
        self._drop()
        self._told.set()
        self._wake.set()

    def _drop(self) -> None:
        """Stop all runs, and forget them: another process may continue them."""
        for task in self._tasks.values():
            task.cancel()
        self._tasks, self._runs, self._waiting, self._next = {}, {}, deque(), 1

    async def _on_order(self, _: Message) -> None:
        self._wake.set()

    async def _on_cancel(self, message: Message) -> None:
        if (run := self._runs.get(message.subject.split(".")[-2])) is not None:
            run.cancelled.set()

    async def _serve(self) -> None:
        while True:
            self._wake.clear()
            if self._holds:
                try:
                    await self._discover()
                    await self._heed_cancels()
                    await self._tidy()
                except BusError as error:
                    log.info("The batches cannot be read now: %s", error)
                self._begin()
            await wait_set(self._wake, _LOOK_EVERY_S)

    async def _discover(self) -> None:
        waiting, start = self._waiting, self._next
        found = [new async for new in self._store.orders(start)]
        if found and waiting is self._waiting:  # else the lease changed hands meanwhile
            self._next = found[-1].sequence + 1
            waiting.extend(new.order for new in found)

    async def _heed_cancels(self) -> None:
        """A cancel that was not heard, because the connection was lost."""
        for batch_id, run in list(self._runs.items()):
            if not run.cancelled.is_set() and await self._store.is_cancelled(batch_id):
                run.cancelled.set()

    async def _tidy(self) -> None:
        """Without this, uploads that were broken off could fill the store of files."""
        now = self._me.bus.clock.now()
        if now < self._tidies_at:
            return
        if removed := await Files(self._me.bus).remove_unfinished(_UNFINISHED_S):
            log.info("Removed what %d uploads that were broken off had left.", removed)
        self._tidies_at = now + _UNFINISHED_S

    def _begin(self) -> None:
        while self._waiting and len(self._tasks) < MOST_RUNS:
            order = self._waiting.popleft()
            task = asyncio.create_task(self._carry(order), name=f"batch {order.id}")
            self._tasks[order.id] = task
            task.add_done_callback(partial(self._on_done, order.id))

    def _on_done(self, batch_id: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(batch_id) is task:
            del self._tasks[batch_id]
            self._runs.pop(batch_id, None)
        self._wake.set()

    async def _carry(self, order: BatchOrder) -> None:
        """Run one batch to its end. A run that fails is begun again, and continues where it was."""
        backoff = Backoff(_AGAIN_S, _AGAIN_MOST_S)
        while True:
            began_at = self._me.bus.clock.now()
            run = self._runs[order.id] = BatchRun(self._me, self._config, order, self.candidate.leads)
            try:
                await run.run()
            except* BusError as group:
                log.info("Batch %s pauses: %s", order.id, group.exceptions[0])
            except* Exception:
                log.exception("Batch %s failed. It is begun again.", order.id)
            else:
                return
            if self._me.bus.clock.now() - began_at >= _AGAIN_MOST_S:
                backoff.succeeded()
            await asyncio.sleep(backoff.failed())

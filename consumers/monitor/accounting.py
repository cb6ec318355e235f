"""The accounts of use: the monitor that leads counts the notes on requests that ended, and answers for the sums."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from pipeline.broker.connection import BusError
from pipeline.broker.jetstream import Bus, Fenced
from pipeline.broker.topology import USED_DUPLICATE_WINDOW_S
from pipeline.broker.usage import BookStore, NoteFeed
from pipeline.core.usage import Accounts
from pipeline.wire.messages import encode
from pipeline.wire.subjects import (
    QUEUE_USAGE,
    QUEUE_USAGE_OF_TENANT,
    STREAM_USED,
    USED,
    usage_tenant,
)

log = logging.getLogger(__name__)

# Sums are stored this often while requests end. Notes that are not in them yet are counted again after a crash.
_STORE_EVERY_S = 1.0
_RETRY_AFTER_S = 1.0
# Notes that are counted are removed in steps of this time.
_STEP_S = 60.0


@dataclass(slots=True)
class UsageKeeper:
    """Keeps the accounts while this monitor leads. Their one writer; the fence refuses a second one.

    Args:
        bus: the connection.
        leads: whether this monitor acts.
    """

    bus: Bus
    leads: Callable[[], bool]
    _feed: NoteFeed = field(init=False)
    _store: BookStore = field(init=False)
    _accounts: Accounts | None = field(init=False, default=None)
    _lock: asyncio.Lock = field(init=False, default_factory=asyncio.Lock)
    _steps: deque[tuple[float, int]] = field(init=False, default_factory=deque)
    _stored_at: float = field(init=False, default=float("-inf"))
    _stop: Callable[[], Awaitable[None]] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._feed, self._store = NoteFeed(self.bus), BookStore(self.bus)

    async def start(self) -> None:
        """Begin to reply; twice is harmless. Each monitor is in a queue group of its own, as in `QueueAnswers`."""
        self._accounts = None
        self._feed.wake()
        if self._stop is None:
            self._stop = await self.bus.serve(
                "headrace-usage",
                "Requests and tokens of each tenant and key",
                {QUEUE_USAGE: self._answer, QUEUE_USAGE_OF_TENANT: self._answer},
                queue=self.bus.new_inbox(),
            )

    async def stop(self) -> None:
        """Stop replying; twice is harmless."""
        stop, self._stop = self._stop, None
        if stop is not None:
            await stop()

    async def run(self) -> None:
        """Count notes until cancelled. Nothing is read and written while another monitor leads."""
        await self._feed.start()
        while True:
            await self._feed.news()
            if not self.leads():
                self._accounts = None
                continue
            try:
                await self._counted()
                await self._keep()
            except Fenced:
                log.info("Another monitor has stored accounts of use. Reading them again.")
                self._accounts = None
                self._feed.wake()
            except BusError as error:
                log.info("The accounts of use are counted later: %s", error)
                await asyncio.sleep(_RETRY_AFTER_S)
                self._feed.wake()

    async def _answer(self, subject: str, _body: bytes) -> bytes:
        accounts, tenant = await self._counted(), usage_tenant(subject)
        at = self.bus.clock.wall()
        return encode(accounts.report(at, lambda each: tenant is None or each.tenant == tenant))

    async def _counted(self) -> Accounts:
        """The accounts with every note that is stored now.

        Raises:
            Unreachable: the broker does not answer.
        """
        async with self._lock:
            accounts = self._accounts
            if accounts is None:
                accounts = Accounts(await self._store.newest(), window_s=USED_DUPLICATE_WINDOW_S)
                if (await self.bus.stream_state(STREAM_USED)).last_seq < accounts.through:
                    accounts.restart()
                self._accounts = accounts
            # From the first message that is left: those that are counted tell which requests are known.
            async for stored in self._feed.after(accounts.read):
                accounts.add(stored)
                if not self._steps or stored.at > self._steps[-1][0] + _STEP_S:
                    self._steps.append((stored.at, stored.sequence))
            return accounts

    async def _keep(self) -> None:
        """Store the books that changed, and then remove the notes that are in them and too old to come again.

        Raises:
            Fenced: another monitor has stored them.
            BusError: they were not stored.
        """
        pause_s = self._stored_at + _STORE_EVERY_S - self.bus.clock.now()
        if pause_s > 0:
            await asyncio.sleep(pause_s)
        async with self._lock:
            accounts = self._accounts
            for book in accounts.unstored() if accounts is not None else ():
                if accounts is None or not self.leads():
                    return
                through = book.through
                await self._store.write(book)
                accounts.stored(book, through)
            self._stored_at = self.bus.clock.now()
            await self._remove_old(0 if accounts is None else accounts.through)

    async def _remove_old(self, through: int) -> None:
        old = self.bus.clock.wall() - USED_DUPLICATE_WINDOW_S - _STEP_S
        up_to = 0
        while self._steps and self._steps[0][0] < old and self._steps[0][1] <= through:
            up_to = self._steps.popleft()[1]
        if up_to:
            await self.bus.purge(STREAM_USED, USED, up_to=up_to)

"""Late-bound pulling from the durable consumers of a stream: one request at a time, no polling, no hoarding.

`take` asks one consumer and does not wait. `wait` stands on several consumers at once; the first request to come
withdraws the others. A request that raced with the withdrawal is surplus: its worker keeps it if it has room, and gives
it back if not. Which consumer to ask first is not decided here (`pipeline.core.scheduler`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pipeline.bus import Bus, Delivery, Message, Subscription, Unreachable

log = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 2.0
_NO_WAIT = msgspec.json.encode({"batch": 1, "no_wait": True})
_EMPTY = "404"
_EXPIRED = "408"


class _Round:
    """The pulls under one inbox that end with the first answer."""

    def __init__(self, inbox: str) -> None:
        self.inbox = inbox
        self.first: asyncio.Future[Delivery | None] = asyncio.get_running_loop().create_future()
        self._taken = False

    def settle(self, delivery: Delivery | None) -> bool:
        """End the round with delivery, unless it has ended."""
        if self.first.done():
            return False
        self.first.set_result(delivery)
        return True

    def take(self) -> Delivery | None:
        """What the round ended with, once; it ends here if it has not."""
        if not self.first.done():
            self.first.cancel()
        if self._taken or self.first.cancelled():
            return None
        self._taken = True
        return self.first.result()


@dataclass(slots=True)
class Puller:
    """Pulls from the durable consumers of one stream. One user at a time: the worker's pull loop.

    Args:
        bus: the connection.
        stream: which stream.
        on_surplus: called with a request that came when none was asked for any more.
        stands_s: how long a pull stands at the broker before it is asked again. To a process that is stopped in the
            middle of everything requests are handed for so long.
    """

    bus: Bus
    stream: str
    on_surplus: Callable[[Delivery], Coroutine[Any, Any, None]]
    stands_s: float
    _inbox: str = field(init=False)
    _rounds: int = field(init=False, default=0)
    _round: _Round | None = field(init=False, default=None)
    _subscription: Subscription = field(init=False)
    _loose_ends: set[asyncio.Task[None]] = field(init=False, default_factory=set)

    async def start(self) -> None:
        """Listen for answers. Call once, before the first pull."""
        self._inbox = self.bus.new_inbox()
        self._subscription = await self.bus.subscribe(f"{self._inbox}.*", self._on_message)
        self.bus.on_reconnect(self._on_reconnect)

    async def take(self, consumer: str) -> Delivery | None:
        """One request of consumer; None where it is empty, or where the broker does not answer.

        Cancelling is safe: a request that still comes is surplus.
        """
        self._rounds += 1
        pull = self._begin(f"{self._inbox}.{self._rounds}")
        try:
            await self._ask(consumer, _NO_WAIT, pull.inbox)
            await asyncio.wait({pull.first}, timeout=_ANSWER_TIMEOUT_S)
            return pull.take()
        finally:
            self._end(pull)

    async def wait(self, consumers: Sequence[str], unless: Coroutine[Any, Any, None]) -> Delivery | None:
        """The first request to come to any of the consumers; None when the pulls expired or `unless` ended without one.

        Cancelling is safe: the pulls are withdrawn, and a request that still comes is surplus.
        """
        # An inbox of its own: removing the interest in it withdraws all that stands.
        pull = self._begin(self.bus.new_inbox())
        stop = asyncio.ensure_future(unless)
        standing = msgspec.json.encode({"batch": 1, "expires": int(self.stands_s * 1e9)})
        try:
            subscription = await self.bus.subscribe(f"{pull.inbox}.*", self._on_message)
            try:
                for consumer in consumers:
                    await self._ask(consumer, standing, f"{pull.inbox}.{consumer}")
                await self._until_over(pull, stop)
                return pull.take()
            finally:
                self._later(self.bus.drain(subscription))
        finally:
            stop.cancel()
            self._end(pull)

    async def close(self) -> None:
        """Wait until everything is withdrawn at the broker, and what still came has been handed on as surplus."""
        await self.bus.drain(self._subscription)
        while self._loose_ends:
            await asyncio.gather(*self._loose_ends, return_exceptions=True)

    async def _until_over(self, pull: _Round, stop: asyncio.Future[None]) -> None:
        """Ends as well when not even the pulls' expiry is heard of, for then nobody serves them."""
        ends: set[asyncio.Future[Any]] = {pull.first, stop}
        timeout_s = self.stands_s + _ANSWER_TIMEOUT_S
        done, _ = await asyncio.wait(ends, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            log.warning("pulls from %s went unheard; asking again", self.stream)

    async def _ask(self, consumer: str, body: bytes, inbox: str) -> None:
        try:
            await self.bus.publish(f"$JS.API.CONSUMER.MSG.NEXT.{self.stream}.{consumer}", body, reply=inbox)
        except Unreachable:
            if self._round is not None:
                self._round.settle(None)

    def _begin(self, inbox: str) -> _Round:
        self._round = _Round(inbox)
        return self._round

    def _end(self, pull: _Round) -> None:
        """No answer of this round is waited for any more; one that came while it was being cancelled is surplus."""
        if self._round is pull:
            self._round = None
        if delivery := pull.take():
            self._later(self.on_surplus(delivery))

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        """Do work without waiting for it: a withdrawn subscription is listened to until the broker has confirmed it."""
        task = asyncio.get_running_loop().create_task(work)
        self._loose_ends.add(task)
        task.add_done_callback(self._loose_ends.discard)

    async def _on_message(self, message: Message) -> None:
        pull = self._round
        if message.is_delivery:
            delivery = self.bus.delivery(message)
            if pull is None or not pull.settle(delivery):
                await self.on_surplus(delivery)
        elif pull is not None and message.subject.startswith(pull.inbox):  # a status may come late
            if message.status not in (_EMPTY, _EXPIRED):
                log.warning("pull from %s refused: %s %s", self.stream, message.status, message.description)
            pull.settle(None)

    def _on_reconnect(self) -> None:
        if self._round is not None:
            self._round.settle(None)

"""Late-bound pulling from the durable consumers of a stream: one request for each free slot, no polling, no hoarding.

`take` asks one consumer and does not wait. `gather` asks several consumers for a number of requests each, and passes
each request on as it arrives. `wait` opens a pull request on several consumers at once, until the first
request arrives. If slots remain free, the other pull requests stay open. Otherwise they are cancelled. A request that
arrives when none is awaited, because it raced with another one or with the cancellation, is surplus: it is passed to
`on_surplus`. `pipeline.core.scheduler` decides which consumer is asked first.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pipeline.aio import Background, wait_set
from pipeline.broker.connection import Delivery, Message, Subscription, Unreachable
from pipeline.broker.jetstream import Bus

log = logging.getLogger(__name__)

# A pull that the broker serves is answered within this time, or within this time after it has expired.
_ANSWER_TIMEOUT_S = 2.0
_EMPTY = "404"
_EXPIRED = "408"


class _Round:
    """One wait for the first answer to the pulls under an inbox."""

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
        """The delivery that ended the round, once. If the round is still open, it ends here with none."""
        if not self.first.done():
            self.first.cancel()
        if self._taken or self.first.cancelled():
            return None
        self._taken = True
        return self.first.result()


@dataclass(slots=True, eq=False)
class _Gathering:
    """Consumers that were asked for requests that are there now.

    Attributes:
        prefix: of the inboxes of the pulls; the consumer's name follows.
        left: how many requests each consumer may still deliver.
        on_delivery: called with each of them.
        empty: the consumers that had fewer requests than they were asked for.
        over: set when no consumer has anything more to say.
    """

    prefix: str
    left: dict[str, int]
    on_delivery: Callable[[Delivery], None]
    empty: set[str] = field(default_factory=set)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def took(self, delivery: Delivery) -> bool:
        """Pass a request on, if it was asked for."""
        consumer = delivery.consumer
        if consumer not in self.left:
            return False
        self.left[consumer] -= 1
        if not delivery.pending and self.left[consumer]:
            self.ended(consumer)
        elif not self.left[consumer]:
            self._forget(consumer)
        self.on_delivery(delivery)
        return True

    def ended(self, consumer: str) -> None:
        """A consumer has no more requests, or refused the pull."""
        if consumer in self.left:
            self.empty.add(consumer)
            self._forget(consumer)

    def _forget(self, consumer: str) -> None:
        del self.left[consumer]
        if not self.left:
            self.over.set()


@dataclass(slots=True, eq=False)
class _Standing:
    """Open pulls under one inbox. Removing the interest in it cancels them all at the broker.

    Attributes:
        on: the consumers with an open pull, and until when it is answered, monotonic seconds. A cluster that has lost
            the server with the pull does not answer it.
        round: the wait that the next answer ends, or None.
    """

    inbox: str
    subscription: Subscription | None = None
    on: dict[str, float] = field(default_factory=dict)
    round: _Round | None = None


@dataclass(slots=True)
class Puller:
    """Pulls from the durable consumers of one stream. One user at a time: a pull loop.

    Args:
        bus: the connection.
        stream: the stream's name.
        on_surplus: called with a request that arrives when none is awaited.
        stands_s: how long a pull stays open at the broker. The broker delivers to a stopped process for this long.

    Attributes:
        refused: whether the broker refused the latest pull, or was not reached.
    """

    bus: Bus
    stream: str
    on_surplus: Callable[[Delivery], Coroutine[Any, Any, None]]
    stands_s: float
    refused: bool = field(init=False, default=False)
    _until_it_expires: bytes = field(init=False)
    _inbox: str = field(init=False)
    _rounds: int = field(init=False, default=0)
    _gathering: _Gathering | None = field(init=False, default=None)
    _standing: _Standing | None = field(init=False, default=None)
    _subscription: Subscription = field(init=False)
    _loose_ends: Background = field(init=False, default_factory=Background)

    def __post_init__(self) -> None:
        self._until_it_expires = msgspec.json.encode({"batch": 1, "expires": int(self.stands_s * 1e9)})

    async def start(self) -> None:
        """Subscribe to answers. Call once, before the first pull."""
        self._inbox = self.bus.new_inbox()
        self._subscription = await self.bus.subscribe(f"{self._inbox}.*", self._on_taken)
        self.bus.on_reconnect(self._on_reconnect)

    async def take(self, consumer: str) -> Delivery | None:
        """One request of consumer; None if it is empty, or if the broker does not answer within two seconds.

        Cancelling is safe: a request that still arrives is surplus.
        """
        found: list[Delivery] = []
        try:
            await self.gather({consumer: 1}, found.append)
        except BaseException:
            for delivery in found:
                self._pass_on(delivery)
            raise
        return found[0] if found else None

    async def gather(self, wanted: Mapping[str, int], on_delivery: Callable[[Delivery], None]) -> set[str]:
        """Ask consumers for up to so many requests each, all at once. Ends within two seconds.

        Cancelling is safe: a request that still arrives is surplus.

        Args:
            wanted: how many requests of each consumer.
            on_delivery: called with each request as it arrives.

        Returns:
            The consumers that had fewer.
        """
        self._rounds += 1
        gathering = self._gathering = _Gathering(f"{self._inbox}.{self._rounds}-", dict(wanted), on_delivery)
        try:
            for consumer, count in wanted.items():
                no_wait = msgspec.json.encode({"batch": count, "no_wait": True})
                if not await self._ask(consumer, no_wait, gathering.prefix + consumer):
                    gathering.ended(consumer)
            await wait_set(gathering.over, _ANSWER_TIMEOUT_S)
            return gathering.empty
        finally:
            self._gathering = None

    async def wait(
        self,
        consumers: Sequence[str],
        unless: Coroutine[Any, Any, None],
        wakes: Coroutine[Any, Any, object] | None = None,
        *,
        keep: Callable[[], bool] = lambda: False,
    ) -> Delivery | None:
        """The first request to arrive from any of the consumers; None if a pull expires or `unless` ends before.

        None as well if no pull is answered two seconds after it has expired: then no broker serves it.
        Cancelling is safe: the pulls are cancelled, and a request that still arrives is surplus.

        Args:
            consumers: their names.
            unless: ends the wait when it ends.
            wakes: ends the wait as well: there is something to ask for elsewhere.
            keep: whether the other pulls stay open when a request has arrived, one of them has expired, or `wakes` has
                ended, until the next `wait` or `withdraw`.
        """
        stop = asyncio.ensure_future(unless)
        woken = None if wakes is None else asyncio.ensure_future(wakes)
        standing = self._standing = self._standing or _Standing(self.bus.new_inbox())
        pull = standing.round = _Round(standing.inbox)
        kept = self.refused = False
        try:
            await self._stand(standing, consumers)
            ends: list[asyncio.Future[Any]] = [pull.first, stop, *([] if woken is None else [woken])]
            await self._until_over(ends, limited=bool(standing.on))
            over = pull.first.done() or (woken is not None and woken.done() and not stop.done())
            kept = over and not self.refused and keep()
            return pull.take()
        finally:
            stop.cancel()
            if woken is not None:
                woken.cancel()
            standing.round = None
            if not kept:
                self.withdraw()
            self._end(pull)

    def stands_on(self, consumer: str) -> bool:
        """Whether a pull is open on consumer: the broker delivers its next request without being asked."""
        return self._standing is not None and self._standing.on.get(consumer, 0.0) > self.bus.clock.now()

    def withdraw(self) -> None:
        """Cancel the open pulls. A request that is already on its way is surplus."""
        standing, self._standing = self._standing, None
        if standing is not None and standing.subscription is not None:
            # Messages are still handled until the broker has confirmed.
            self._loose_ends.start(self.bus.drain(standing.subscription), what="cancelling open pulls")

    def interrupt(self) -> None:
        """Cancel the open pulls, and end a wait for them with none."""
        standing = self._standing
        self.withdraw()
        if standing is not None and standing.round is not None:
            standing.round.settle(None)

    async def close(self) -> None:
        """Wait until the broker has cancelled all pulls, and each request that still arrived was passed on."""
        self.withdraw()
        await self.bus.drain(self._subscription)
        await self._loose_ends.join()

    async def _stand(self, standing: _Standing, consumers: Sequence[str]) -> None:
        if standing.subscription is None:

            async def on_message(message: Message) -> None:
                await self._on_stood(standing, message)

            standing.subscription = await self.bus.subscribe(f"{standing.inbox}.*", on_message)
        for consumer in consumers:
            now = self.bus.clock.now()
            if standing.on.get(consumer, 0.0) <= now:
                standing.on[consumer] = now + self.stands_s + _ANSWER_TIMEOUT_S
                asked = await self._ask(consumer, self._until_it_expires, f"{standing.inbox}.{consumer}")
                if not asked and standing.round is not None:
                    standing.round.settle(None)

    async def _until_over(self, ends: Sequence[asyncio.Future[Any]], *, limited: bool) -> None:
        timeout_s = self.stands_s + _ANSWER_TIMEOUT_S if limited else None
        done, _ = await asyncio.wait(ends, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            log.warning("The broker has not answered pulls from %s; asking again", self.stream)

    async def _ask(self, consumer: str, body: bytes, inbox: str) -> bool:
        """Send a pull. Returns whether it was sent."""
        try:
            await self.bus.publish(f"$JS.API.CONSUMER.MSG.NEXT.{self.stream}.{consumer}", body, reply=inbox)
        except Unreachable:
            self.refused = True
            return False
        return True

    def _end(self, pull: _Round) -> None:
        """Await this round no longer. A request that arrived while it was being cancelled is surplus."""
        if delivery := pull.take():
            self._pass_on(delivery)

    def _pass_on(self, delivery: Delivery) -> None:
        self._loose_ends.start(self.on_surplus(delivery), what=f"surplus from {delivery.consumer}")

    async def _on_taken(self, message: Message) -> None:
        gathering = self._gathering
        if message.is_delivery:
            delivery = self.bus.delivery(message)
            if gathering is None or not gathering.took(delivery):
                await self.on_surplus(delivery)
        elif gathering is not None and message.subject.startswith(gathering.prefix):  # not of an earlier pull
            self._hear_refusal(message)
            gathering.ended(message.subject.removeprefix(gathering.prefix))

    async def _on_stood(self, standing: _Standing, message: Message) -> None:
        if message.is_delivery:
            delivery = self.bus.delivery(message)
            standing.on.pop(delivery.consumer, None)
            if standing.round is None or not standing.round.settle(delivery):
                await self.on_surplus(delivery)
        elif standing is self._standing:
            standing.on.pop(message.subject.removeprefix(f"{standing.inbox}."), None)
            self._hear_refusal(message)
            if standing.round is not None:
                standing.round.settle(None)

    def _hear_refusal(self, message: Message) -> None:
        if message.status not in (_EMPTY, _EXPIRED):
            self.refused = True
            log.warning("The broker refused a pull from %s: %s %s", self.stream, message.status, message.description)

    def _on_reconnect(self) -> None:
        if self._gathering is not None:
            self._gathering.over.set()
        if self._standing is not None:
            self._standing.on.clear()
            if self._standing.round is not None:
                self._standing.round.settle(None)

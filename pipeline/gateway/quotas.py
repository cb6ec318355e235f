"""The quotas of API keys at one gateway: refusals, headers of responses, and what other gateways and accounts tell.

Each gateway counts the accounts of use as they are stored, whichever gateway stored the request, and hears of the
requests that the others let in. After a restart it reads what the keys have used from the accounts.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from contextlib import aclosing
from datetime import UTC, datetime

import msgspec

from pipeline.aio import Background
from pipeline.broker.connection import BusError, Message
from pipeline.broker.jetstream import Bus
from pipeline.broker.topology import USED_DUPLICATE_WINDOW_S
from pipeline.broker.usage import BookStore, NoteFeed
from pipeline.config import HttpKey
from pipeline.core.quotas import MINUTE_S, Estimate, KeyLimits, QuotaRefusal, Quotas
from pipeline.core.usage import KnownNotes, StoredNotes
from pipeline.gateway.intake import Intake
from pipeline.gateway.statuses import HttpError
from pipeline.wire.answers import Success
from pipeline.wire.errors import ErrorCode
from pipeline.wire.messages import encode
from pipeline.wire.requests import ChatRequest, Request
from pipeline.wire.subjects import RESERVED, STREAM_USED
from pipeline.wire.usage import Period, ReservationNotice

log = logging.getLogger(__name__)

_RETRY_AFTER_S = 1.0
# UTF-8 bytes of a text for each token, and the tokens around a message.
_BYTES_PER_TOKEN = 4
_TOKENS_PER_MESSAGE = 4
# Tokens of an answer whose request sets no limit.
_UNLIMITED_COMPLETION = 256
_notice_decoder = msgspec.json.Decoder(ReservationNotice)


def limits_of(key: HttpKey | None) -> KeyLimits | None:
    """The limits of a key; None if it has none."""
    if key is None:
        return None
    limits = KeyLimits(key.requests_per_minute, key.tokens_per_minute, key.tokens_per_day)
    return limits if any(limits) else None


def estimate_of(request: Request) -> Estimate:
    """What a request is expected to use: its text at four bytes a token, and the longest answer that it permits."""
    if not isinstance(request, ChatRequest):
        return Estimate(sum(len(text.encode(errors="replace")) for text in request.texts) // _BYTES_PER_TOKEN + 1)
    said = sum(len(message.text().encode(errors="replace")) for message in request.chat)
    said += len(msgspec.json.encode(request.tools)) if request.tools else 0
    prompt = said // _BYTES_PER_TOKEN + _TOKENS_PER_MESSAGE * len(request.chat)
    return Estimate(prompt, _UNLIMITED_COMPLETION if request.stated_limit is None else request.stated_limit)


class KeyQuotas:
    """Keeps the quotas of one gateway.

    Args:
        bus: the connection.
        keys: the API keys.
    """

    def __init__(self, bus: Bus, keys: Sequence[HttpKey]) -> None:
        self._bus = bus
        self._quotas = Quotas()
        self._feed, self._books = NoteFeed(bus), BookStore(bus)
        self._limited: dict[str, KeyLimits] = {}
        self._through = 0
        self._outdated = asyncio.Event()  # the accounts are to be read from their start
        self._outdated.set()
        self._known = KnownNotes(USED_DUPLICATE_WINDOW_S)
        self._gateway = secrets.token_hex(8)
        self._tasks = Background()
        self.use(keys)

    def use(self, keys: Sequence[HttpKey]) -> None:
        """Apply the limits of these keys from now on. What was used and reserved stays."""
        before = self._limited
        self._limited = {key.name: limits for key in keys if (limits := limits_of(key)) is not None}
        if not self._limited.keys() <= before.keys():
            self._outdated.set()
            self._feed.wake()

    async def start(self) -> None:
        """Begin to listen. Call once."""
        await self._bus.subscribe(RESERVED, self._on_notice)
        await self._feed.start()
        self._bus.on_reconnect(self._on_reconnect)
        self._feed.wake()
        self._tasks.start(self._follow(), what="following the accounts of use")

    def stop(self) -> None:
        """Stop following the accounts."""
        self._tasks.cancel()

    def reserve(self, calls: Sequence[tuple[Request, Intake]]) -> None:
        """Reserve what the choices of one call are expected to use.

        Raises:
            HttpError: 429, if they do not fit in the limits of their key. Then nothing is reserved.
        """
        limits = self._limited.get(calls[0][1].key)
        if limits is None:
            return
        now, reserved = self._bus.clock.wall(), list[ReservationNotice]()
        for request, intake in calls:
            name, estimate = intake.outgoing.name, estimate_of(request)
            notice = ReservationNotice(intake.key, name, self._gateway, *estimate, counts=not reserved)
            refusal = self._quotas.reserve(intake.key, limits, name, estimate, now, counts=notice.counts)
            if refusal is not None:
                for each in reserved:
                    self._quotas.release(each.key, each.id)
                raise _refused(refusal)
            reserved.append(notice)
        for notice in reserved:
            self._tell(notice)

    def check_day(self, key: HttpKey | None) -> None:
        """See that a key may have a batch run. Its lines count in the day, and are not refused one by one.

        Raises:
            HttpError: 429, if the tokens of the day are used up.
        """
        limits, now = (None if key is None else self._limited.get(key.name)), self._bus.clock.wall()
        if key is not None and limits is not None and self._quotas.day_is_over_limit(key.name, limits, now):
            most, left_s = limits.tokens_per_day, Period.DAY.end_of(now) - now
            raise _refused(QuotaRefusal("tokens_per_day", most, most, 1, left_s, exhausted=True))

    def release(self, intake: Intake) -> None:
        """The request was not stored."""
        if intake.key in self._limited:
            self._quotas.release(intake.key, intake.outgoing.name)
            self._tell(ReservationNotice(intake.key, intake.outgoing.name, self._gateway, released=True))

    def ended(self, intake: Intake, last: Success | None = None) -> None:
        """The request has ended, with an answer or another last message that the client does not have yet."""
        if intake.key not in self._limited:
            return
        name, used = intake.outgoing.name, None if last is None else _used(last)
        self._quotas.ended(intake.key, name, self._bus.clock.wall(), used)
        if used is not None:
            self._tell(ReservationNotice(intake.key, name, self._gateway, *used, counts=False, ended=True))

    def headers(self, key: HttpKey | None, *, anthropic: bool = False) -> dict[str, str]:
        """The headers of a response to a key with limits, by OpenAI's names, or by Anthropic's."""
        limits = None if key is None else self._limited.get(key.name)
        if limits is None or key is None:
            return {}
        now, headers = self._bus.clock.wall(), dict[str, str]()
        for what, standing in self._quotas.standing(key.name, limits, now).items():
            remaining = str(standing.remaining)
            headers[f"x-ratelimit-limit-{what}"] = str(standing.limit)
            headers[f"x-ratelimit-remaining-{what}"] = remaining
            headers[f"x-ratelimit-reset-{what}"] = f"{standing.reset_s:.3f}s"
            if anthropic:
                reset = datetime.fromtimestamp(now + standing.reset_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
                headers[f"anthropic-ratelimit-{what}-limit"] = str(standing.limit)
                headers[f"anthropic-ratelimit-{what}-remaining"] = remaining
                headers[f"anthropic-ratelimit-{what}-reset"] = reset
        return headers

    def _tell(self, notice: ReservationNotice) -> None:
        self._tasks.start(self._publish(notice), what="telling the other gateways of a reservation")

    async def _publish(self, notice: ReservationNotice) -> None:
        try:
            await self._bus.publish(RESERVED, encode(notice))
        except BusError as error:
            log.debug("A reservation was not published: %s", error)

    async def _on_notice(self, message: Message) -> None:
        notice = _notice_decoder.decode(message.data)
        if notice.gateway == self._gateway or notice.key not in self._limited:
            return
        if notice.released:
            self._quotas.release(notice.key, notice.id)
            return
        estimate, now = Estimate(notice.prompt, notice.completion), self._bus.clock.wall()
        if notice.ended:
            self._quotas.ended(notice.key, notice.id, now, estimate)
        else:
            self._quotas.heard(notice.key, notice.id, estimate, now, counts=notice.counts)

    def _on_reconnect(self) -> None:
        """The broker may have another stream of notes than before."""
        self._outdated.set()

    async def _follow(self) -> None:
        while True:
            await self._feed.news()
            if not self._limited:
                continue
            try:
                await self._catch_up()
            except BusError as error:
                log.info("The accounts of use are read later: %s", error)
                await asyncio.sleep(_RETRY_AFTER_S)
                self._feed.wake()

    async def _catch_up(self) -> None:
        """Count the accounts that are new.

        Raises:
            Unreachable: the broker does not answer.
        """
        while self._outdated.is_set():
            await self._begin()
        async with aclosing(self._feed.after(self._through)) as found:
            async for stored in found:
                if self._outdated.is_set():
                    return
                self._count(stored, today=True)

    async def _begin(self) -> None:
        """Read what the keys have used today, and in the last minute."""
        self._outdated.clear()
        try:
            await self._read()
        except BaseException:
            self._outdated.set()
            raise

    async def _read(self) -> None:
        day = next((book for book in await self._books.newest() if book.period is Period.DAY), None)
        counted = 0 if day is None else day.through
        if (await self._bus.stream_state(STREAM_USED)).last_seq < counted:
            counted = 0  # the stream is a new one
        # What is older than the last minute, and counted, is only known from then on.
        oldest = await self._feed.first_since(self._bus.clock.wall() - USED_DUPLICATE_WINDOW_S)
        start = counted if oldest is None else min(counted, oldest - 1)
        notes = [stored async for stored in self._feed.after(start)]
        # From here on nothing waits, so that no request sees half of it.
        self._quotas.forget_used()
        self._through, self._known = start, KnownNotes(USED_DUPLICATE_WINDOW_S)
        for each in () if day is None else day.sums:
            if each.key in self._limited:
                self._quotas.learn(each.key, day.start if day else 0, each.tokens.total, self._bus.clock.wall())
        for stored in notes:
            self._count(stored, today=stored.sequence > counted)

    def _count(self, stored: StoredNotes, *, today: bool) -> None:
        self._through, now = stored.sequence, self._bus.clock.wall()
        new = self._known.new(stored.of(lambda note: note.key in self._limited))
        if today or stored.at > now - MINUTE_S:
            for note in new.notes.values():
                self._quotas.settle(note, stored.at, now, today=today)


def _used(last: Success) -> Estimate:
    return Estimate(last.usage.prompt_tokens, last.usage.total_tokens - last.usage.prompt_tokens)


def _refused(refusal: QuotaRefusal) -> HttpError:
    unit, _, period = refusal.limit.partition("_per_")
    code = ErrorCode.RATE_LIMIT_EXCEEDED
    if refusal.limit == "tokens_per_day" and refusal.exhausted:
        code = ErrorCode.INSUFFICIENT_QUOTA
    again = "" if code is ErrorCode.INSUFFICIENT_QUOTA else f" Retry in {refusal.retry_after_s:.2f} s."
    return HttpError(
        429,
        code,
        f"The limit of this API key is {refusal.most} {unit} per {period}: {refusal.used} are used or reserved, and "
        f"this request needs {refusal.asked}.{again or ' The day ends at midnight UTC.'}",
        retry_after_s=refusal.retry_after_s,
    )

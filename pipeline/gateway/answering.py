"""The response to one call for an answer: publishes the request, follows its record, sends it whole or as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.types import Send

from pipeline.broker.asker import Asker, Outgoing, RecordEntry, RecordReader, whole
from pipeline.broker.connection import BusError
from pipeline.broker.peers import Peers
from pipeline.gateway.dialects.shapes import Asked, as_chunk, expected
from pipeline.gateway.hangups import HangUps
from pipeline.gateway.intake import Intake, with_charge
from pipeline.gateway.metrics import Metrics
from pipeline.gateway.quotas import KeyQuotas
from pipeline.gateway.responses import JSON, KEEP_ALIVE_S, SSE_HEADERS, End, Live, Registry, finish, more, send_whole
from pipeline.gateway.statuses import HttpError, error_of, headers_of, status_of
from pipeline.gateway.turns import Turns
from pipeline.gateway.waiting import SPACE, STATUS_S, said, status_part
from pipeline.wire.answers import Chunk, Completion, EmbeddingList, ErrorAnswer, ErrorBody, Status, Success
from pipeline.wire.errors import ErrorCode, HeadraceError

# The pipeline ends a request at its deadline. After this grace the gateway ends one that the pipeline has not ended.
_DEADLINE_GRACE_S = 1.0


@dataclass(slots=True)
class AnswerContext:
    """What all answers of one gateway share."""

    client: Asker
    peers: Peers
    metrics: Metrics
    registry: Registry
    hang_ups: HangUps
    quotas: KeyQuotas
    turns: Turns = field(default_factory=Turns)

    async def submit(self, intake: Intake) -> RecordReader:
        """As `Asker.submit`. The error of a full lane has the lane's predicted wait as `Retry-After`."""
        stored = False
        try:
            async with self.turns.turn(intake.priority):
                record = await self.client.submit(self._charged(intake), on_abandoned=self._abandoned(intake))
            stored = True
            return record
        except HeadraceError as error:
            if error.code is not ErrorCode.QUEUE_FULL:
                raise
            load = self.peers.load("mlx")
            eta_s = 1.0 if load is None else load.predicted_wait_ms.of(intake.priority) / 1000
            raise HttpError(503, error.code, error.message, retry_after_s=eta_s) from None
        finally:
            if not stored:
                self.quotas.release(intake)

    def _charged(self, intake: Intake) -> Outgoing:
        return with_charge(intake, self.client.secret)

    def _abandoned(self, intake: Intake) -> Callable[[], Awaitable[None]]:
        return partial(self.hang_ups.gone, intake.outgoing.name, keep=intake.outgoing.given_id)


class Answering(Live):
    """The response to one call for an answer. If the client disconnects, its request is cancelled.

    A request under an id that the client chose is kept for a grace, so that the client can come back to it.

    Args:
        context: shared with the other responses.
        asked: the request as it was read, with the shape of its responses.
        intake: the request as it is published.
    """

    def __init__(self, context: AnswerContext, asked: Asked, intake: Intake) -> None:
        super().__init__(context.registry)
        self._context = context
        self._shape = asked.shape
        self._stream = asked.stream
        self._intake = intake
        self._id = asked.shape.request_id = intake.outgoing.id
        self._name = intake.outgoing.name
        self._accepted = False

    async def write(self, send: Send) -> None:
        """Publish the request, follow its record, and send the response."""
        timeout_s = self._intake.timeout_s
        try:
            async with asyncio.timeout(None if timeout_s is None else timeout_s + _DEADLINE_GRACE_S):
                await self._follow(send)
        except TimeoutError:
            await self._gone(keep=False)
            message = f"The deadline of request {self._id} passed before the answer was complete."
            await self._fail(send, HeadraceError(ErrorCode.DEADLINE_EXCEEDED, message))
        except HeadraceError as error:
            self._settle()
            await self._fail(send, error)
        else:
            self._settle()

    def _settle(self) -> None:
        """The request has ended: what is reserved for it is about to be replaced by its account."""
        self._context.quotas.ended(self._intake)

    async def _follow(self, send: Send) -> None:
        async with self._context.hang_ups.following(self._name), await self._context.submit(self._intake) as record:
            self._accepted = True
            await (self._write_stream if self._stream else self._write_whole)(record, send)

    async def ended(self, why: End, send: Send) -> None:
        """If the client is gone, cancel the request. If the gateway stops, tell the client where to read the answer."""
        if why is End.GONE:
            self._context.metrics.count("headrace_http_gone_total")
            await self._gone(keep=self._intake.outgoing.given_id)
            return
        message = (
            f"The gateway is stopping. Request {self._id} continues: "
            f"read its answer at /queue/requests/{self._id}/events."
        )
        await self._fail(send, HeadraceError(ErrorCode.UNAVAILABLE, message))

    async def _write_whole(self, record: RecordReader, send: Send) -> None:
        answer = (await (self._spaced(record, send) if self._intake.spaces else whole(record))).answer
        if isinstance(answer, ErrorAnswer):
            raise error_of(answer.error)
        if isinstance(answer, Success):
            self._context.quotas.ended(self._intake, answer)
            body = self._shape.whole(answer)
            await (finish(send, body) if self.begun else send_whole(send, 200, body, self._headers()))

    async def _spaced(self, record: RecordReader, send: Send) -> RecordEntry:
        """The last message of the record. Meanwhile white space is sent."""
        ending = asyncio.ensure_future(whole(record))
        try:
            while not (await asyncio.wait({ending}, timeout=KEEP_ALIVE_S))[0]:
                await self.begin(send, {"content-type": JSON, **self._headers()})
                await more(send, SPACE)
            return await ending
        finally:
            ending.cancel()

    async def _write_stream(self, record: RecordReader, send: Send) -> None:
        streamed = False
        while True:
            entry = await self._next(record, send)
            match entry.answer:
                case Chunk() as chunk:
                    streamed = True
                    if part := self._shape.part(chunk):
                        await self.begin(send, self._stream_headers())
                        await more(send, part)
                case Completion() | EmbeddingList() as answer:
                    completion = expected(answer, Completion)
                    self._context.quotas.ended(self._intake, completion)
                    await self.begin(send, self._stream_headers())
                    if not streamed:
                        # The request was first sent without `stream`, so its record has no chunks.
                        await more(send, self._shape.part(as_chunk(completion)))
                    await finish(send, self._shape.end(completion))
                    return
                case ErrorAnswer() as failed:
                    raise error_of(failed.error)
                case Status() as status if self._intake.statuses:
                    await self._alive(send, said(status))
                case _:
                    pass

    async def _next(self, record: RecordReader, send: Send) -> RecordEntry:
        """The record's next message. Meanwhile keep-alives are sent, if the dialect has them."""
        if self._intake.statuses and not self.begun:
            await self._alive(send, await self._standing())
        while True:
            try:
                async with asyncio.timeout(STATUS_S if self._intake.statuses else KEEP_ALIVE_S):
                    return await record.next()
            except TimeoutError:
                await self._alive(send, await self._standing() if self._intake.statuses else None)

    async def _standing(self) -> dict[str, Any] | None:
        """Where the request stands; None if no monitor says it."""
        try:
            return said(await self._context.client.position(self._name))
        except BusError:
            return None

    async def _alive(self, send: Send, status: dict[str, Any] | None) -> None:
        alive = self._shape.keep_alive
        if status is not None:
            alive += status_part(self._shape, status)
        if alive:
            await self.begin(send, self._stream_headers())
            await more(send, alive)

    def _headers(self) -> dict[str, str]:
        # Anthropic's clients read the second name.
        return {"x-request-id": self._id, "request-id": self._id}

    def _stream_headers(self) -> dict[str, str]:
        return {**SSE_HEADERS, "content-type": self._shape.stream_type, **self._headers()}

    async def _fail(self, send: Send, error: HeadraceError) -> None:
        body = ErrorBody.of(error)
        if self.begun:
            await finish(send, self._shape.error_part(body) if self._stream else self._shape.error(body))
        else:
            await send_whole(send, status_of(error), self._shape.error(body), {**headers_of(error), **self._headers()})

    async def _gone(self, *, keep: bool) -> None:
        """Cancel the request, now or after the grace. `Asker.submit` does this for one that is not stored yet."""
        if self._accepted or keep:
            await self._context.hang_ups.gone(self._name, keep=keep)

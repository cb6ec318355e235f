"""The response to one call for an answer: publishes the request, follows its record, sends it whole or as a stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from dataclasses import dataclass, field

from starlette.types import Send

from pipeline.broker.asker import Asker, RecordEntry, RecordReader, whole
from pipeline.broker.connection import BusError
from pipeline.broker.peers import Peers
from pipeline.gateway.dialects.shapes import Asked, as_chunk, expected
from pipeline.gateway.intake import Intake
from pipeline.gateway.metrics import Metrics
from pipeline.gateway.responses import KEEP_ALIVE_S, SSE_HEADERS, End, Live, Registry, finish, more, send_whole
from pipeline.gateway.statuses import HttpError, error_of, headers_of, status_of
from pipeline.gateway.turns import Turns
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import Chunk, Completion, EmbeddingList, ErrorAnswer, ErrorBody, Success

# The pipeline ends a request at its deadline. After this grace the gateway ends one that the pipeline has not ended.
_DEADLINE_GRACE_S = 1.0


@dataclass(slots=True)
class AnswerContext:
    """What all answers of one gateway share. `readers` counts the responses that follow each request."""

    client: Asker
    peers: Peers
    metrics: Metrics
    registry: Registry = field(default_factory=Registry)
    turns: Turns = field(default_factory=Turns)
    readers: Counter[str] = field(default_factory=Counter)

    async def submit(self, intake: Intake) -> RecordReader:
        """As `Asker.submit`. The error of a full lane has the lane's predicted wait as `Retry-After`."""
        try:
            async with self.turns.turn(intake.priority):
                return await self.client.submit(intake.outgoing)
        except HeadraceError as error:
            if error.code is not ErrorCode.QUEUE_FULL:
                raise
            load = self.peers.load("mlx")
            eta_s = 1.0 if load is None else load.predicted_wait_ms.of(intake.priority) / 1000
            raise HttpError(503, error.code, error.message, retry_after_s=eta_s) from None


class Answering(Live):
    """The response to one call for an answer. If the client disconnects, its request is cancelled.

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
        self._accepted = False

    async def write(self, send: Send) -> None:
        """Publish the request, follow its record, and send the response."""
        timeout_s = self._intake.timeout_s
        try:
            async with asyncio.timeout(None if timeout_s is None else timeout_s + _DEADLINE_GRACE_S):
                await self._follow(send)
        except TimeoutError:
            await self._cancel()
            message = f"The deadline of request {self._id} passed before the answer was complete."
            await self._fail(send, HeadraceError(ErrorCode.DEADLINE_EXCEEDED, message))
        except HeadraceError as error:
            await self._fail(send, error)

    async def _follow(self, send: Send) -> None:
        self._context.readers[self._id] += 1
        try:
            async with await self._context.submit(self._intake) as record:
                self._accepted = True
                await (self._write_stream if self._stream else self._write_whole)(record, send)
        finally:
            self._context.readers[self._id] -= 1
            if not self._context.readers[self._id]:
                del self._context.readers[self._id]

    async def ended(self, why: End, send: Send) -> None:
        """If the client is gone, cancel the request. If the gateway stops, tell the client where to read the answer."""
        if why is End.GONE:
            self._context.metrics.count("headrace_http_gone_total")
            await self._cancel()
            return
        message = (
            f"The gateway is stopping. Request {self._id} continues: "
            f"read its answer at /queue/requests/{self._id}/events."
        )
        await self._fail(send, HeadraceError(ErrorCode.UNAVAILABLE, message))

    async def _write_whole(self, record: RecordReader, send: Send) -> None:
        answer = (await whole(record)).answer
        if isinstance(answer, ErrorAnswer):
            raise error_of(answer.error)
        if isinstance(answer, Success):
            await send_whole(send, 200, self._shape.whole(answer), self._headers())

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
                    await self.begin(send, self._stream_headers())
                    if not streamed:
                        # The request was first sent without `stream`, so its record has no chunks.
                        await more(send, self._shape.part(as_chunk(completion)))
                    await finish(send, self._shape.end(completion))
                    return
                case ErrorAnswer() as failed:
                    raise error_of(failed.error)
                case _:
                    pass

    async def _next(self, record: RecordReader, send: Send) -> RecordEntry:
        """The record's next message. Meanwhile keep-alives are sent, if the dialect has them."""
        while True:
            try:
                async with asyncio.timeout(KEEP_ALIVE_S):
                    return await record.next()
            except TimeoutError:
                if alive := self._shape.keep_alive:
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
            await finish(send, self._shape.error_part(body))
        else:
            await send_whole(send, status_of(error), self._shape.error(body), {**headers_of(error), **self._headers()})

    async def _cancel(self) -> None:
        """Cancel the request, unless another response follows it. `Asker.submit` cancels one that is not stored yet."""
        if self._context.readers[self._id] or not self._accepted:
            return
        with contextlib.suppress(BusError):
            await self._context.client.cancel(self._id)

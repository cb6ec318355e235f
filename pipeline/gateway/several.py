"""The response to one call with several choices: each is a request of its own, and they run side by side."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from starlette.types import Send

from pipeline.broker.asker import RecordReader, whole
from pipeline.gateway.answering import AnswerContext, Answering
from pipeline.gateway.dialects.openai import joined
from pipeline.gateway.dialects.shapes import Asked, as_chunk, expected
from pipeline.gateway.intake import Intake
from pipeline.gateway.responses import KEEP_ALIVE_S, finish, more, send_whole
from pipeline.gateway.statuses import error_of
from pipeline.wire.answers import Answer, Chunk, Completion, ErrorAnswer, is_last


class Several(Answering):
    """The response to a call with several choices. The first error ends it, and cancels the other requests.

    Args:
        context: shared with the other responses.
        calls: the requests of the choices, in their order, as they were read and as they are published.
    """

    def __init__(self, context: AnswerContext, calls: Sequence[tuple[Asked, Intake]]) -> None:
        super().__init__(context, *calls[0])
        self._calls = calls
        self._submitted: list[str] = []
        for asked, _ in calls:
            asked.shape.request_id = self._id

    async def _follow(self, send: Send) -> None:
        try:
            async with contextlib.AsyncExitStack() as stack:
                records: list[RecordReader] = []
                for _, intake in self._calls:
                    await stack.enter_async_context(self._context.hang_ups.following(intake.outgoing.name))
                    records.append(await stack.enter_async_context(await self._context.submit(intake)))
                    self._submitted.append(intake.outgoing.name)
                if self._stream:
                    await self._write_streams(records, send)
                else:
                    answers = await self._all(records)
                    await send_whole(send, 200, self._shape.whole(joined(answers)), self._headers())
        except Exception:
            for _, intake in self._calls[len(self._submitted) + 1 :]:
                self._context.quotas.release(intake)
            await self._gone(keep=False)
            raise

    def _settle(self) -> None:
        for _, intake in self._calls:
            self._context.quotas.ended(intake)

    async def _all(self, records: Sequence[RecordReader]) -> list[Completion]:
        answers = [_completion((await whole(record)).answer) for record in records]
        for (_, intake), answer in zip(self._calls, answers, strict=True):
            self._context.quotas.ended(intake, answer)
        return answers

    async def _write_streams(self, records: Sequence[RecordReader], send: Send) -> None:
        news: asyncio.Queue[tuple[int, Answer | Exception]] = asyncio.Queue()
        tasks = [asyncio.create_task(_read(index, record, news)) for index, record in enumerate(records)]
        try:
            await self._write_news(news, send)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _write_news(self, news: asyncio.Queue[tuple[int, Answer | Exception]], send: Send) -> None:
        ended: dict[int, Completion] = {}
        streamed: set[int] = set()
        while len(ended) < len(self._calls):
            try:
                async with asyncio.timeout(KEEP_ALIVE_S):
                    index, answer = await news.get()
            except TimeoutError:
                await self._write_part(send, self._shape.keep_alive)
                continue
            if isinstance(answer, Exception):
                raise answer
            shape = self._calls[index][0].shape
            if isinstance(answer, Chunk):
                streamed.add(index)
                await self._write_part(send, shape.part(answer))
            elif is_last(answer):
                ended[index] = _completion(answer)
                self._context.quotas.ended(self._calls[index][1], ended[index])
                if index not in streamed:
                    await self._write_part(send, shape.part(as_chunk(ended[index])))
        await finish(send, self._shape.end(joined([ended[index] for index in sorted(ended)])))

    async def _write_part(self, send: Send, part: bytes) -> None:
        if part:
            await self.begin(send, self._stream_headers())
            await more(send, part)

    async def _gone(self, *, keep: bool) -> None:
        """Cancel all requests that were stored, now or after the grace."""
        for name in self._submitted:
            await self._context.hang_ups.gone(name, keep=keep)


async def _read(index: int, record: RecordReader, news: asyncio.Queue[tuple[int, Answer | Exception]]) -> None:
    try:
        while True:
            answer = (await record.next()).answer
            news.put_nowait((index, answer))
            if is_last(answer):
                return
    except Exception as error:
        news.put_nowait((index, error))


def _completion(answer: Answer) -> Completion:
    """The last message of a request, if it was answered."""
    if isinstance(answer, ErrorAnswer):
        raise error_of(answer.error)
    assert not isinstance(answer, Chunk)  # noqa: S101 - it is the last message
    return expected(answer, Completion)  # type: ignore[arg-type]

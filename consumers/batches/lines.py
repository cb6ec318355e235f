"""One line of a batch: fed to LOW once, followed until it is answered, and read by the endpoint that it names."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from pipeline.broker.asker import Asker, Outgoing, RecordReader, whole
from pipeline.broker.connection import BusError
from pipeline.config import Config
from pipeline.core.batch_lines import read_line
from pipeline.core.charging import charged
from pipeline.gateway.dialects.batches import failed, read_call, succeeded
from pipeline.gateway.dialects.shapes import Asked
from pipeline.process.role import Role
from pipeline.wire.answers import Answer, ErrorAnswer, ErrorBody, Success, is_last
from pipeline.wire.batches import BatchOrder, LineFault, LineResult, line_id
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.subjects import BATCH, KEY, TENANT, TIMEOUT, Lane, Priority, Task, request_name

log = logging.getLogger(__name__)

# While a line waits, the queue is asked this often whether it still has it.
_LOOK_EVERY_S = 60.0
# Before a line is fed again that the lane had no room for, or that the broker did not store.
_AGAIN_S = 0.5
# Before the monitor is asked again.
_ASK_AGAIN_S = 0.5
_LEAST_TIMEOUT_S = 0.001
_WAITS = frozenset({ErrorCode.QUEUE_FULL, ErrorCode.UNAVAILABLE})


class Unanswered(Exception):
    """The line gets no result: the batch was cancelled, or its deadline passed."""


class LineEnd(NamedTuple):
    """How a line ended."""

    result: LineResult
    failed: bool


class LineCaller:
    """Asks for the answers to the lines of one batch.

    Args:
        me: the role's connection.
        config: the settings.
        order: the batch.
        leads: whether this process may feed lines now.
        is_over: whether no further line is fed.
    """

    def __init__(
        self, me: Role, config: Config, order: BatchOrder, leads: Callable[[], bool], is_over: Callable[[], bool]
    ) -> None:
        self._asker = Asker(me.bus, me.tracing)
        self._clock = me.bus.clock
        self._limit = config.max_body_bytes
        self._order = order
        self._leads = leads
        self._is_over = is_over
        self._in_queue: set[str] = set()

    async def call(self, number: int, data: bytes, *, fed_before: bool) -> LineEnd:
        """Feed a line and wait for its answer.

        Args:
            number: of the line.
            data: the line, which was checked before.
            fed_before: whether it may be in the queue, or answered, already.

        Raises:
            Unanswered: it gets no result.
            BusError: the broker did not answer.
        """
        line, request_id = read_line(data), line_id(self._order.id, number)
        assert not isinstance(line, LineFault)  # noqa: S101 - the file was checked
        try:
            asked = read_call(line, self._limit)
            answer = await self._answer(asked, request_id, fed_before=fed_before)
            if isinstance(answer, ErrorAnswer):
                return LineEnd(failed(line, request_id, _read_error(answer.error)), failed=True)
            return LineEnd(succeeded(line, asked, request_id, answer), failed=False)
        except HeadraceError as error:
            return LineEnd(failed(line, request_id, error), failed=True)

    def oversized(self, number: int, data: bytes, size: int, most: int) -> LineEnd:
        """The end of a line whose result has `size` bytes, of which the broker accepts `most`."""
        line = read_line(data)
        assert not isinstance(line, LineFault)  # noqa: S101 - the file was checked
        message = f"The result of the line has {size} bytes, and the broker accepts at most {most}."
        error = HeadraceError(ErrorCode.REQUEST_TOO_LARGE, message)
        return LineEnd(failed(line, line_id(self._order.id, number), error), failed=True)

    async def cancel_all(self) -> None:
        """Cancel the lines that are in the queue or run."""
        for name in list(self._in_queue):
            with suppress(BusError):
                await self._asker.cancel(name)

    async def _answer(self, asked: Asked, request_id: str, *, fed_before: bool) -> Success | ErrorAnswer:
        name = request_name(self._order.owner, request_id)
        self._in_queue.add(name)
        try:
            while True:
                answer = await self._followed(asked, request_id, fed_before=fed_before)
                if answer is not None:
                    break
                fed_before = True
        finally:
            self._in_queue.discard(name)
        if isinstance(answer, ErrorAnswer):
            is_ours = answer.error.code is ErrorCode.CANCELLED and self._is_over()
            if is_ours or answer.error.code is ErrorCode.DEADLINE_EXCEEDED:
                raise Unanswered
        return answer

    async def _followed(self, asked: Asked, request_id: str, *, fed_before: bool) -> Success | ErrorAnswer | None:
        """The answer to a line; None if the queue does not have the line any more, and no answer either."""
        name = request_name(self._order.owner, request_id)
        if not fed_before or not (record := await self._found(name)):
            record = await self._fed(asked, request_id, again=fed_before)
        async with record:
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_EVERY_S):
                        return _ended((await whole(record)).answer)
                if await self._is_lost(name):
                    return None

    async def _found(self, name: str) -> RecordReader | None:
        """The record of a line that is in the queue or was answered; None if it is to be fed."""
        return None if await self._is_lost(name) else await self._asker.read(name)

    async def _is_lost(self, name: str) -> bool:
        """Whether a line is neither in the queue nor answered, as far as the record is kept."""
        while True:
            if (last := await self._asker.last(name)) is not None and is_last(last.answer):
                return False
            try:
                state = (await self._asker.position(name)).state
            except BusError:
                state = "filling"
            if state == "unknown":
                # It may have ended since the record was read.
                last = await self._asker.last(name)
                return last is None or not is_last(last.answer)
            if state != "filling":
                return False
            # No monitor answers, or it does not know the queue yet.
            await asyncio.sleep(_ASK_AGAIN_S)

    async def _fed(self, asked: Asked, request_id: str, *, again: bool) -> RecordReader:
        """Put a line on the lane, once there is room for it.

        Raises:
            Unanswered: the batch is over.
            HeadraceError: the line cannot be queued.
        """
        while True:
            if self._is_over():
                raise Unanswered
            if self._leads():
                try:
                    return await self._asker.submit(self._outgoing(asked, request_id, again=again), on_abandoned=_leave)
                except HeadraceError as error:
                    if error.code not in _WAITS:
                        raise
            await asyncio.sleep(_AGAIN_S)

    def _outgoing(self, asked: Asked, request_id: str, *, again: bool) -> Outgoing:
        left_s = max(_LEAST_TIMEOUT_S, self._order.begun().expires_at - self._clock.wall())
        headers = {BATCH: self._order.id, TIMEOUT: f"{left_s:.3f}"}
        if self._order.tenant:
            headers[TENANT] = self._order.tenant
        if self._order.key:
            name = request_name(self._order.owner, request_id)
            headers[KEY] = charged(self._asker.secret, name, self._order.tenant, self._order.key)
        subject = Lane(Priority.LOW, Task.UNTRIAGED, self._order.owner).subject
        return Outgoing(request_id, subject, asked.body, headers, given_id=again)


def _ended(answer: Answer) -> Success | ErrorAnswer:
    assert isinstance(answer, Success | ErrorAnswer)  # noqa: S101 - the last message of a record
    return answer


def _read_error(body: ErrorBody) -> HeadraceError:
    return HeadraceError(body.code, body.message, param=body.param)


async def _leave() -> None:
    """The line stays in the queue: the next process follows it."""

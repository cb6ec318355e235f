"""Questions for the number of tokens, to a child that is a function here."""

from __future__ import annotations

import asyncio

import pytest

from consumers.engines.local.counts import Counts
from consumers.engines.local.protocol import Count, Counted, Rejected
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import ChatRequest

REQUEST = ChatRequest(prompt="x")


class Scene:
    """Open questions, and the frames that the child was sent."""

    def __init__(self) -> None:
        self.frames: list[Count] = []
        self.counts = Counts()
        self.counts.connect(self.frames.append)

    async def ask(self, number: int) -> list[asyncio.Task[int]]:
        asked = [asyncio.ensure_future(self.counts.count_tokens(REQUEST)) for _ in range(number)]
        await asyncio.sleep(0)
        assert [frame.request for frame in self.frames] == [REQUEST] * number
        return asked


async def test_each_question_gets_its_own_answer():
    scene = Scene()
    one, two, three = await scene.ask(3)
    scene.counts.counted(Counted(scene.frames[1].key, 2))
    scene.counts.counted(Counted(scene.frames[0].key, 1))
    scene.counts.counted(Counted(scene.frames[0].key, 9))
    refusal = HeadraceError(ErrorCode.INVALID_REQUEST, "why", param="messages")
    scene.counts.counted(Counted(scene.frames[2].key, refusal=Rejected.of(0, refusal)))
    assert (await one, await two) == (1, 2)
    with pytest.raises(HeadraceError, match="why") as refused:
        await three
    assert (refused.value.code, refused.value.param) == (ErrorCode.INVALID_REQUEST, "messages")


async def test_a_question_ends_with_its_child_and_none_is_put_to_a_child_that_is_away():
    scene = Scene()
    [asked] = await scene.ask(1)
    scene.counts.disconnect()
    for question in (asked, scene.counts.count_tokens(REQUEST)):
        with pytest.raises(HeadraceError) as lost:
            await question
        assert lost.value.code is ErrorCode.UNAVAILABLE
    scene.counts.counted(Counted(scene.frames[0].key, 1))


async def test_an_answer_to_a_question_that_was_given_up_is_ignored():
    scene = Scene()
    [asked] = await scene.ask(1)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    scene.counts.counted(Counted(scene.frames[0].key, 1))

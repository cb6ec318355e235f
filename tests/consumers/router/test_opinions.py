"""Doubtful requests and the internal model: loaded first, asked side by side, and waited for no longer than allowed."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

import pytest

from consumers.engines.ollama import OllamaClient
from consumers.router.opinions import AT_ONCE, Opinions
from pipeline.config import Config
from pipeline.wire.requests import ChatRequest
from tests.consumers.ollama_server import ollama_server
from tests.waiting import eventually

REQUEST = ChatRequest(prompt="Are tomatoes fruits?")
LONG_S, SHORT_S = 60.0, 0.05


class Model:
    """An internal model behind a server: loads and answers when the test says so, and notes what is broken off."""

    def __init__(self):
        self.may_load, self.may_answer = asyncio.Event(), asyncio.Event()
        self.said, self.loads, self.questions, self.answered = "Yes.", 0, 0, 0

    async def chat(self, connection):
        if json.loads(connection.body)["messages"]:
            self.questions += 1
            await self.may_answer.wait()
            await connection.answer({"message": {"role": "assistant", "content": self.said}, "done": True})
            self.answered += 1
        else:
            self.loads += 1
            await self.may_load.wait()
            await connection.answer({"message": {"role": "assistant", "content": ""}, "done": True})


@asynccontextmanager
async def opinions_of(model, timeout_s=LONG_S, **changes):
    async with ollama_server() as server:
        server.chat = model.chat
        client = OllamaClient(server.url, idle_timeout_s=60, load_timeout_s=60)
        settings = {"classifier_model": "tinyllama", "classifier_timeout_s": timeout_s} | changes
        opinions = Opinions(client, Config(**settings))
        yield opinions
        await opinions.close()
        await client.close()


@pytest.fixture
def model():
    model = Model()
    model.may_load.set()
    return model


async def asked_of(opinions):
    """The opinion, and whether it was asked for."""
    asks = []
    return await opinions.says_simple(REQUEST, lambda: asks.append(True)), bool(asks)


@pytest.mark.parametrize(("said", "simple"), [("Yes.", True), ("yes", True), ("No.", False), ("Perhaps", False)])
async def test_a_cold_model_is_loaded_and_then_asked(model, said, simple):
    model.may_answer.set()
    model.said = said
    async with opinions_of(model) as opinions:
        assert await asked_of(opinions) == (simple, True)
        assert await asked_of(opinions) == (simple, True)
    assert (model.loads, model.questions) == (1, 2)


@pytest.mark.parametrize("changes", [{"classifier_model": ""}, {"classifier_model": "llama3"}])
async def test_only_an_internal_model_is_asked(model, changes):
    async with opinions_of(model, **changes) as opinions:
        assert await asked_of(opinions) == (False, False)
    assert model.loads == 0


async def test_a_load_that_takes_long_is_not_broken_off_and_nothing_is_asked_meanwhile(model):
    model.may_load.clear()
    model.may_answer.set()
    async with opinions_of(model, timeout_s=SHORT_S) as opinions:
        assert await asked_of(opinions) == (False, True)
        assert await asked_of(opinions) == (False, False)
        model.may_load.set()

        async def warm():
            return (await asked_of(opinions))[1]

        await eventually(warm)
    assert model.loads == 1, "the load that was begun went on to its end"


async def test_questions_are_asked_side_by_side(model):
    model.may_answer.set()
    async with opinions_of(model) as opinions:
        await asked_of(opinions)
        model.may_answer.clear()
        asking = [asyncio.create_task(asked_of(opinions)) for _ in range(AT_ONCE)]
        await eventually(lambda: model.questions == 1 + AT_ONCE)
        assert await asked_of(opinions) == (False, False), "one more is not asked"
        model.may_answer.set()
        assert await asyncio.gather(*asking) == [(True, True)] * AT_ONCE


async def test_a_late_question_is_not_broken_off_and_the_next_waits_for_its_end(model):
    async with opinions_of(model, timeout_s=SHORT_S) as opinions:

        async def late():
            return model.questions == 1 or (await asked_of(opinions) and False)

        await eventually(late)
        assert await asked_of(opinions) == (False, False)
        model.may_answer.set()
        await eventually(lambda: model.answered == 1)

        async def asked_again():
            return (await asked_of(opinions))[1]

        await eventually(asked_again)


async def test_a_model_that_fails_has_no_opinion(model):
    async def fails(connection):
        await connection.answer({"error": "no such model"}, 404)

    model.chat = fails
    async with opinions_of(model) as opinions:
        assert await asked_of(opinions) == (False, True)
        assert await asked_of(opinions) == (False, False)

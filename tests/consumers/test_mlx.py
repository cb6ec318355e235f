"""The MLX consumer says that nobody has a model only once it could know."""

from __future__ import annotations

import time

import pytest

from consumers.mlx import ToOllama
from pipeline.core.envelope import Envelope
from pipeline.process.role import role
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import PerPriorityCount, Slots, WorkerStatus, encode
from pipeline.wire.requests import ChatRequest, EmbeddingRequest
from pipeline.wire.subjects import Priority, Task
from tests.waiting import eventually

ENVELOPE = Envelope("r1", Priority.HIGH, Task.UNTRIAGED, 1.0, 1)
MISSING = HeadraceError(ErrorCode.MODEL_NOT_FOUND, "mlx does not have it")


@pytest.fixture
async def me(config):
    async with role("mlx", config) as me:
        yield me


async def refusal(elsewhere, request):
    with pytest.raises(HeadraceError) as caught:
        await elsewhere.offer(None, ENVELOPE, request, MISSING)
    return caught.value.code


async def say(bus, state):
    none, now = PerPriorityCount(), time.time()
    status = WorkerStatus("o1", "ollama", state, ["small"], Slots(0, 1), none, 0.0, 0.0, 0.0, 0, 0, now)
    await bus.publish("llm.worker.o1", encode(status))


@pytest.mark.parametrize("request_", [ChatRequest(prompt="x", model="theirs"), EmbeddingRequest("x", model="theirs")])
async def test_until_ollama_has_been_heard_what_it_may_have_waits(me, config, request_):
    elsewhere = ToOllama(me, config, patience_s=60.0)
    assert await refusal(elsewhere, request_) is ErrorCode.UNAVAILABLE
    await say(me.bus, "down")
    await eventually(lambda: me.peers.workers("ollama"))
    assert await refusal(elsewhere, request_) is ErrorCode.UNAVAILABLE
    await say(me.bus, "ready")
    await eventually(lambda: me.peers.workers("ollama")[0].state == "ready")
    assert await refusal(elsewhere, request_) is ErrorCode.MODEL_NOT_FOUND


async def test_where_there_is_no_ollama_it_is_not_waited_for_for_ever(me, config):
    elsewhere = ToOllama(me, config, patience_s=0.0)
    assert await refusal(elsewhere, EmbeddingRequest("x")) is ErrorCode.MODEL_NOT_FOUND


async def test_an_internal_model_is_refused_whoever_is_heard(me, config):
    elsewhere = ToOllama(me, config, patience_s=60.0)
    assert await refusal(elsewhere, ChatRequest(prompt="x", model="tinyllama")) is ErrorCode.MODEL_INTERNAL

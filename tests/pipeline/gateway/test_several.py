"""A call with several choices whose client leaves, and one of whose requests fails."""

from __future__ import annotations

import asyncio

import pytest

from pipeline.wire.answers import ErrorAnswer, ErrorBody
from pipeline.wire.errors import ErrorCode, HeadraceError
from tests.pipeline.gateway.conftest import Engine, Serve
from tests.waiting import TIMEOUT_S

ASK = "/v1/completions"


@pytest.mark.parametrize("stream", [True, False])
async def test_who_hangs_up_has_every_request_cancelled(serve: Serve, engine: Engine, stream: bool) -> None:
    async with serve() as client:
        asking = asyncio.create_task(client.post(ASK, json={"prompt": ["a", "b", "c"], "stream": stream}))
        ids = [await engine.next_id() for _ in range(3)]
        assert ids[1:] == [f"{ids[0]}-1", f"{ids[0]}-2"]
        asking.cancel()
        async with asyncio.timeout(TIMEOUT_S):
            assert {await engine.cancelled.get() for _ in ids} == set(ids)


@pytest.mark.parametrize("stream", [True, False])
async def test_the_error_of_one_request_ends_the_response_and_the_others(
    serve: Serve, engine: Engine, stream: bool
) -> None:
    async with serve() as client:
        body = {"prompt": ["a", "b"], "stream": stream}
        asking = asyncio.create_task(client.post(ASK, json=body, headers={"Idempotency-Key": "job"}))
        assert [await engine.next_id() for _ in range(2)] == ["job", "job-1"]
        await engine.answer("job")
        error = ErrorBody.of(HeadraceError(ErrorCode.ENGINE_FAILED, "no"))
        await engine.write("job-1", ErrorAnswer(id="", created=0, error=error))
        answer = await asking
        assert "engine_failed" in answer.text
        async with asyncio.timeout(TIMEOUT_S):
            assert {await engine.cancelled.get() for _ in range(2)} == {"job", "job-1"}


async def test_a_stream_goes_on_while_one_choice_waits(serve: Serve, engine: Engine) -> None:
    async with serve() as client:
        asking = asyncio.create_task(client.post(ASK, json={"prompt": ["a", "b"], "stream": True}))
        first, second = [await engine.next_id() for _ in range(2)]
        await engine.answer(second)
        await engine.answer(first)
        lines = (await asking).text.split("\n\n")
        assert [line for line in lines if '"index":1' in line]
        assert [line for line in lines if '"index":0' in line]
        assert lines[-2] == "data: [DONE]"

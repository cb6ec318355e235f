"""The simulated engine in its child process."""

import msgspec
import pytest
import pytest_asyncio

from pipeline.engine import Engine
from pipeline.wire.errors import ErrorCode
from pipeline.wire.requests import ChatRequest
from tests.consumers.engines.conformance import ExactConformance, ask, refusal

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(start):
    async with start("simulated") as process:
        as_seen_by_workers: Engine = process
        yield as_seen_by_workers


class TestSimulatedEngine(ExactConformance):
    async def test_every_answer_says_in_its_first_word_that_it_is_simulated(self, engine):
        assert engine.simulated
        assert (await ask(engine, "What is the capital of France?")).text.startswith("[simulated] No model has read")
        assert (await ask(engine, ChatRequest(prompt="x", max_tokens=1))).text == "[simulated]"

    async def test_it_takes_tools_and_cannot_be_made_to_call_one(self, engine):
        offered = {"prompt": "x", "max_tokens": 2, "tools": [{"function": {"name": "f"}}]}
        assert (await ask(engine, msgspec.convert(offered, ChatRequest))).text.startswith("[simulated]")
        error = await refusal(engine, msgspec.convert(offered | {"tool_choice": "required"}, ChatRequest))
        assert (error.code, error.param) == (ErrorCode.UNSUPPORTED_PARAMETER, "tool_choice")

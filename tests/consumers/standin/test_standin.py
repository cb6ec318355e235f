"""The stand-in, driven by the official client over HTTP."""

from __future__ import annotations

import asyncio
import json
import math
import operator
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any, Self

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ollama import AsyncClient, ChatResponse, ResponseError

from consumers.standin.embedding import EMBEDDER, count, embedding
from consumers.standin.server import Server
from consumers.standin.shown import of_demo
from pipeline.engine import EngineStatus, Piece, Work
from pipeline.wire.answers import FunctionCall, ToolCall, Usage
from pipeline.wire.errors import ErrorCode, HeadraceError
from tests.consumers.conftest import MODEL, Launch, StandIn

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
STEADY = {"temperature": 0, "num_predict": 24}


@pytest.fixture
async def client(either: StandIn) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(either.url, trust_env=False, timeout=60) as client:
        yield client


@pytest.fixture
async def toy(demo: StandIn) -> AsyncIterator[AsyncClient]:
    """A client of the demo model."""
    async with AsyncClient(demo.url, trust_env=False, timeout=60) as client:
        yield client


@pytest.fixture
async def http(either: StandIn) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=either.url, trust_env=False, timeout=60) as client:
        yield client


async def streamed(client: AsyncClient, **wanted: Any) -> list[ChatResponse]:
    return [part async for part in await client.chat(MODEL, wanted.pop("messages", QUESTION), stream=True, **wanted)]


# ---- what it is ------------------------------------------------------------------------------------------------------


async def test_it_never_claims_to_be_ollama(http: httpx.AsyncClient) -> None:
    about = (await http.get("/")).text
    assert "stand-in" in about
    assert "Ollama is running" not in about
    assert (await http.get("/api/version")).json() == {"version": "0.0.0-headrace-standin"}


async def test_the_client_lists_and_shows_its_models(toy: AsyncClient) -> None:
    listed, embedder = (await toy.list()).models
    assert listed.model == f"{MODEL}:latest"
    assert listed.size is not None
    assert listed.size > 100_000
    assert listed.details is not None
    assert listed.details.family != "simulated"
    shown = await toy.show(MODEL)
    assert "completion" in (shown.capabilities or [])
    running, _ = (await toy.ps()).models
    assert running.digest == listed.digest
    assert embedder.model == f"{EMBEDDER}:latest"
    assert (await toy.show(EMBEDDER)).capabilities == ["embedding"]


async def test_a_tag_of_latest_and_another_case_are_the_same_model(client: AsyncClient) -> None:
    answer = await client.chat(f"{MODEL.upper()}:latest", QUESTION, options=STEADY)
    assert answer.model == f"{MODEL.upper()}:latest"


async def test_a_simulated_engine_says_so_in_the_list_and_in_every_answer(launch: Launch) -> None:
    with launch(engine="simulated") as standin:
        async with AsyncClient(standin.url, trust_env=False) as client:
            listed, _ = (await client.list()).models
            assert listed.details is not None
            assert listed.details.family == "simulated"
            answer = await client.chat(MODEL, QUESTION)
            assert (answer.message.content or "").startswith("[simulated]")


# ---- embeddings ------------------------------------------------------------------------------------------------------


async def test_it_embeds_one_text_or_several_alike(toy: AsyncClient) -> None:
    both = await toy.embed(EMBEDDER, ["The cat sat.", "Zebras"])
    assert [list(vector) for vector in both.embeddings] == [embedding("The cat sat."), embedding("Zebras")]
    assert both.prompt_eval_count == 4
    one = await toy.embed(EMBEDDER.upper(), "Zebras", dimensions=16)
    assert [list(vector) for vector in one.embeddings] == [embedding("Zebras", 16)]
    assert (await toy.embed(EMBEDDER, "")).embeddings == []


@pytest.mark.parametrize(
    ("model", "dimensions", "status"), [(MODEL, None, 501), ("nobody", None, 404), (EMBEDDER, 100_000, 400)]
)
async def test_what_cannot_be_embedded_is_refused(
    toy: AsyncClient, model: str, dimensions: int | None, status: int
) -> None:
    with pytest.raises(ResponseError) as caught:
        await toy.embed(model, "x", dimensions=dimensions)
    assert caught.value.status_code == status


@given(st.text(), st.integers(1, 512))
def test_a_vector_has_length_1_or_says_nothing_and_case_does_not_matter(text: str, dimensions: int) -> None:
    vector = embedding(text, dimensions)
    assert len(vector) == dimensions
    assert math.isclose(math.hypot(*vector), 1.0) or not any(vector)
    assert count(text) or not any(vector)
    assert embedding(text.casefold(), dimensions) == vector


def test_texts_with_the_same_words_are_nearer_than_others() -> None:
    def likeness(one: str, other: str) -> float:
        return sum(map(operator.mul, embedding(one), embedding(other)))

    question = "How do I reset my password?"
    assert likeness(question, "resetting a password") > likeness(question, "The train leaves at noon.")
    assert likeness(question, question.upper()) == pytest.approx(1.0)


# ---- answers ---------------------------------------------------------------------------------------------------------


async def test_parts_join_to_the_answer_that_comes_whole(client: AsyncClient) -> None:
    whole = await client.chat(MODEL, QUESTION, options=STEADY)
    *parts, last = await streamed(client, options=STEADY)
    assert "".join(part.message.content or "" for part in parts) == whole.message.content != ""
    assert not last.message.content
    assert [part.done for part in parts] == [False] * len(parts)
    assert (last.done, last.done_reason) == (True, whole.done_reason)
    assert (last.prompt_eval_count, last.eval_count) == (whole.prompt_eval_count, whole.eval_count)


async def test_counts_and_durations_stand_in_the_last_part_alone(client: AsyncClient) -> None:
    *parts, last = await streamed(client, options=STEADY)
    assert all(part.eval_count is None and part.total_duration is None for part in parts)
    assert last.prompt_eval_count
    assert last.eval_count
    assert last.total_duration
    assert last.eval_duration
    assert (last.load_duration or 0) + (last.prompt_eval_duration or 0) + last.eval_duration <= last.total_duration


async def test_an_answer_ends_at_num_predict(client: AsyncClient) -> None:
    answer = await client.chat(MODEL, QUESTION, options={"num_predict": 2, "temperature": 0})
    assert (answer.done_reason, answer.eval_count) == ("length", 2)


async def test_a_limit_beyond_the_context_is_no_error(client: AsyncClient) -> None:
    answer = await client.chat(MODEL, QUESTION, options={"num_predict": 10_000_000, "temperature": 0})
    assert answer.done


async def test_a_stop_string_ends_the_answer_before_it(client: AsyncClient) -> None:
    whole = (await client.chat(MODEL, QUESTION, options=STEADY)).message.content or ""
    stop = whole[len(whole) // 2 :][:3]
    cut = await client.chat(MODEL, QUESTION, options=STEADY | {"stop": [stop]})
    assert cut.message.content == whole[: whole.index(stop)]
    assert cut.done_reason == "stop"


async def test_a_seed_repeats_an_answer(client: AsyncClient) -> None:
    options = {"temperature": 1.5, "seed": 7, "num_predict": 24}
    first, second = await asyncio.gather(*(client.chat(MODEL, QUESTION, options=options) for _ in range(2)))
    assert first.message.content == second.message.content


async def test_generate_answers_as_chat_does(client: AsyncClient) -> None:
    chat = await client.chat(MODEL, QUESTION, options=STEADY)
    text = await client.generate(MODEL, QUESTION[0]["content"], options=STEADY)
    assert text.response == chat.message.content
    parts = [part async for part in await client.generate(MODEL, QUESTION[0]["content"], options=STEADY, stream=True)]
    assert "".join(part.response or "" for part in parts) == text.response


async def test_asking_nothing_loads_the_model(client: AsyncClient) -> None:
    assert (await client.chat(MODEL, [], keep_alive="5m")).done_reason == "load"
    assert (await client.generate(MODEL, keep_alive=-1)).done_reason == "load"


async def test_the_demo_model_calls_a_tool_it_is_given(toy: AsyncClient) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    tool = {"function": {"name": "get_weather", "description": "The weather.", "parameters": parameters}}
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    answer = await toy.chat(MODEL, question, tools=[tool], options={"temperature": 0})
    (call,) = answer.message.tool_calls or ()
    assert call.function.name == "get_weather"
    assert list(call.function.arguments) == ["city"]


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"model": "nope"}, 404, "model 'nope' not found"),
        ({"model": "headrace-demo"}, 404, "not found"),
        ({}, 400, "model is required"),
        ({"options": {"temperature": "hot"}}, 500, 'option "temperature" must be of type float32'),
        ({"options": {"seed": True}}, 500, 'option "seed" must be of type integer'),
        ({"options": {"stop": "x"}}, 500, 'option "stop" must be of type array'),
        ({"options": {"num_predict": float("1e400")}}, 400, "JSON"),
        ({"think": True}, 400, "does not support thinking"),
        ({"format": 7}, 500, "invalid format"),
        ({"messages": [{"role": "oracle", "content": "x"}]}, 400, "oracle"),
        ({"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, 400, "does not support images"),
        ({"messages": "x"}, 400, '`messages` must be a list, not "x".'),
        ({"messages": [{"role": "user", "content": "word " * 20_000}]}, 400, "input length exceeds the context length"),
    ],
)
async def test_what_cannot_be_done_is_refused_with_ollamas_status(
    http: httpx.AsyncClient, body: dict[str, Any], status: int, says: str
) -> None:
    wanted = {"messages": QUESTION} | ({"model": MODEL} if body else {}) | body
    answer = await http.post("/api/chat", content=json.dumps(wanted).encode())
    assert answer.status_code == status
    assert says in answer.json()["error"]


async def test_the_demo_model_keeps_a_format_and_refuses_one_that_it_cannot_keep(toy: AsyncClient) -> None:
    answer = await toy.chat(MODEL, QUESTION, format={"enum": ["red", "green"]})
    assert answer.message.content in ('"red"', '"green"')
    with pytest.raises(ResponseError) as caught:
        await toy.chat(MODEL, QUESTION, format={"type": "array", "uniqueItems": True})
    assert (caught.value.status_code, "uniqueItems" in caught.value.error) == (400, True)


async def test_unknown_options_and_fields_are_ignored(client: AsyncClient) -> None:
    answer = await client.chat(MODEL, QUESTION, options=STEADY | {"num_ctx": 64, "mirostat": 2})
    assert answer.done


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"model": 3}', b"[" * 100_000])
async def test_a_body_that_cannot_be_read_is_status_400(http: httpx.AsyncClient, body: bytes) -> None:
    answer = await http.post("/api/chat", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/api/generate", {}, 404, "model '' not found"),
        ("/api/generate", {"model": MODEL, "prompt": "x", "suffix": "y"}, 400, "does not support insert"),
        ("/api/show", {}, 400, "model is required"),
        ("/api/show", {"name": "nope"}, 404, "model 'nope' not found"),
    ],
)
async def test_the_other_paths_refuse_in_their_own_ways(
    http: httpx.AsyncClient, path: str, body: dict[str, Any], status: int, says: str
) -> None:
    answer = await http.post(path, json=body)
    assert (answer.status_code, says in answer.json()["error"]) == (status, True)


async def test_the_client_raises_its_own_error_for_an_unknown_model(client: AsyncClient) -> None:
    with pytest.raises(ResponseError) as caught:
        await client.chat("nope", QUESTION)
    assert caught.value.status_code == 404
    with pytest.raises(ResponseError):
        await client.show("nope")


# ---- many at once, and clients that leave ----------------------------------------------------------------------------


async def test_more_requests_than_slots_are_all_answered_alike(client: AsyncClient) -> None:
    answers = await asyncio.gather(*(client.chat(MODEL, QUESTION, options=STEADY) for _ in range(12)))
    assert len({answer.message.content for answer in answers}) == 1
    assert {answer.eval_count for answer in answers} == {answers[0].eval_count}


async def first_part(client: AsyncClient) -> tuple[ChatResponse, AsyncIterator[ChatResponse]]:
    parts = await client.chat(MODEL, QUESTION, stream=True)
    return await anext(parts), parts


async def test_a_client_that_hangs_up_frees_its_slot(slow: StandIn) -> None:
    async with AsyncClient(slow.url, trust_env=False) as client:
        _, running = await first_part(client)
        waiting = asyncio.create_task(first_part(client))
        await running.aclose()  # type: ignore[attr-defined]
        part, then = await waiting
        assert part.message.content
        await then.aclose()  # type: ignore[attr-defined]


async def test_a_client_that_hangs_up_while_it_waits_leaves_the_queue(slow: StandIn) -> None:
    body = {"model": MODEL, "messages": QUESTION}
    async with AsyncClient(slow.url, trust_env=False) as client:
        _, running = await first_part(client)
        async with httpx.AsyncClient(base_url=slow.url, trust_env=False) as impatient:
            with pytest.raises(httpx.ReadTimeout):
                await impatient.post("/api/chat", json=body | {"stream": False}, timeout=httpx.Timeout(5, read=0.2))
        last = asyncio.create_task(first_part(client))
        await running.aclose()  # type: ignore[attr-defined]
        part, then = await last
        assert part.message.content
        await then.aclose()  # type: ignore[attr-defined]


async def test_sigterm_ends_it_in_the_middle_of_an_answer(slow: StandIn) -> None:
    async with AsyncClient(slow.url, trust_env=False) as client:
        _, running = await first_part(client)
        slow.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(slow.process.wait, 20) == 0
        with pytest.raises(httpx.HTTPError):
            async for _ in running:
                pass


# ---- what only some models do, from an engine that follows a script --------------------------------------------------


class Scripted:
    """An engine and its one generation: pieces, then perhaps an error."""

    name = "mlx"
    simulated = False
    embedder = None
    counter = None

    def __init__(self, pieces: list[Piece], error: HeadraceError | None = None) -> None:
        self._pieces = pieces
        self._error = error
        self.works: list[Work] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        pass

    def resolve(self, model: str | None) -> str:
        return "scripted"

    def status(self) -> EngineStatus:
        return EngineStatus(state="ready", models=["scripted"], slots_used=0, slots_total=1)

    def on_change(self, callback: Callable[[], None]) -> None:
        pass

    async def submit(self, work: Work) -> Scripted:
        self.works.append(work)
        return self

    async def next(self) -> Piece:
        if self._pieces:
            return self._pieces.pop(0)
        assert self._error is not None
        raise self._error

    async def close(self) -> None:
        pass


def client_of(engine: Scripted) -> AsyncClient:
    model = of_demo(MODEL, "scripted", None, simulated=False)
    app = Server(engine, model=model, behind="a script", parallel=1).app()  # type: ignore[arg-type]
    return AsyncClient("http://scripted", transport=httpx.ASGITransport(app))


LAST = Piece(finish_reason="tool_calls", usage=Usage(3, 5, 8))


async def test_tool_calls_carry_their_arguments_as_an_object() -> None:
    call = ToolCall(FunctionCall("weather", '{"city": "Paris", "days": [1, 2]}'), id="call_1")
    for stream in (True, False):
        async with client_of(Scripted([Piece(text="Let me see."), Piece(tool_calls=[call]), LAST])) as client:
            answer = await client.chat(MODEL, QUESTION, stream=stream)  # type: ignore[call-overload]
            parts = [part async for part in answer] if stream else [answer]
        calls = [call for part in parts for call in part.message.tool_calls or ()]
        assert [(call.function.name, call.function.arguments) for call in calls] == [
            ("weather", {"city": "Paris", "days": [1, 2]})
        ]
        assert parts[-1].done_reason == "stop"


async def test_tool_calls_and_results_of_the_conversation_reach_the_engine() -> None:
    engine = Scripted([LAST])
    turns = [
        *QUESTION,
        {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Paris"}}}]},
        {"role": "tool", "tool_name": "weather", "content": "mild"},
    ]
    async with client_of(engine) as client:
        await client.chat(MODEL, turns)
    _, called, result = engine.works[0].request.chat
    assert called.tool_calls is not None
    assert json.loads(called.tool_calls[0].function.arguments) == {"city": "Paris"}
    assert (result.role, result.name, result.text()) == ("tool", "weather", "mild")


async def test_an_engine_that_fails_before_the_first_part_is_a_status_and_after_it_a_line() -> None:
    gone = HeadraceError(ErrorCode.UNAVAILABLE, "the engine is down")
    async with client_of(Scripted([], gone)) as client:
        with pytest.raises(ResponseError) as whole:
            await client.chat(MODEL, QUESTION)
        with pytest.raises(ResponseError) as streaming:
            await anext(await client.chat(MODEL, QUESTION, stream=True))
    for caught in (whole, streaming):
        assert (caught.value.status_code, caught.value.error) == (500, "the engine is down")
    async with client_of(Scripted([Piece(text="It is")], gone)) as client:
        parts = await client.chat(MODEL, QUESTION, stream=True)
        assert (await anext(parts)).message.content == "It is"
        with pytest.raises(ResponseError) as after:
            await anext(parts)
    assert (after.value.status_code, after.value.error) == (-1, "the engine is down")


async def test_tools_that_the_model_cannot_take_are_refused_in_ollamas_words() -> None:
    refused = HeadraceError(ErrorCode.UNSUPPORTED_PARAMETER, "no place for tools", param="tools")
    async with client_of(Scripted([], refused)) as client:
        with pytest.raises(ResponseError) as caught:
            await client.chat(MODEL, QUESTION)
    assert (caught.value.status_code, caught.value.error) == (400, f"{MODEL} does not support tools")

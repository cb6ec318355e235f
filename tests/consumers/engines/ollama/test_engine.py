"""The Ollama engine against the stand-in, and against servers that misbehave."""

from __future__ import annotations

import asyncio
import json
import operator
import os
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest
from ollama import AsyncClient

from consumers.engines.ollama import OllamaClient, OllamaEngine
from consumers.engines.server.generation import ServerGeneration
from consumers.standin.embedding import EMBEDDER
from pipeline.config import Config, ConfigError
from pipeline.engine import Engine, Generation, Misbehaved, Piece, Work
from pipeline.wire.answers import Usage
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import ModelFacts
from pipeline.wire.requests import ChatRequest, EmbeddingRequest
from tests.consumers.conftest import MODEL, Launch, StandIn
from tests.consumers.engines.conformance import Conformance
from tests.consumers.ollama_server import Connection, OllamaServer, ollama_server
from tests.waiting import eventually

QUESTION = "What is the capital of France?"
CONFIG = Config(default_max_tokens=24)
LAST = {"message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "stop", "eval_count": 2}


def work(on: str, /, request_id: str = "r1", **fields: Any) -> Work:
    fields = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0} | fields
    return Work(request_id, msgspec.convert(fields, ChatRequest), on, seed=7)


def text_part(text: str) -> dict[str, Any]:
    return {"model": "good", "message": {"role": "assistant", "content": text}, "done": False}


async def pieces_of(generation: Generation) -> list[Piece]:
    pieces = [await generation.next()]
    while pieces[-1].finish_reason is None:
        pieces.append(await generation.next())
    await generation.close()
    return pieces


async def changed_to(engine: OllamaEngine, holds: Callable[[], bool]) -> None:
    """Wait until the engine tells of a change after which something holds."""
    told = asyncio.Event()
    engine.on_change(told.set)
    async with asyncio.timeout(30):
        while not holds():
            await told.wait()
            told.clear()


async def failure_of(engine: OllamaEngine, **fields: Any) -> HeadraceError:
    generation = await engine.submit(work("good:latest", **fields))
    with pytest.raises(HeadraceError) as caught:
        await pieces_of(generation)
    await generation.close()
    return caught.value


class Resolving(OllamaEngine):
    """An engine whose caller may leave the model to it."""

    async def submit(self, work: Work) -> ServerGeneration:
        return await super().submit(msgspec.structs.replace(work, model=self.resolve(work.model or None)))


@pytest.fixture(params=["demo", "llama"])
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[OllamaEngine]:
    # A real Ollama may be put to the same tests.
    host = os.environ.get("TEST_OLLAMA_HOST") or request.getfixturevalue(request.param).url
    async with Resolving(CONFIG, host) as engine:
        yield engine


class TestOllamaEngine(Conformance):
    """What every engine must do."""


@pytest.fixture
async def ollama() -> AsyncIterator[OllamaServer]:
    async with ollama_server() as server:
        yield server


@pytest.fixture
async def against(ollama: OllamaServer) -> AsyncIterator[OllamaEngine]:
    """An engine against the server that misbehaves."""
    async with OllamaEngine(CONFIG, ollama.url) as engine:
        yield engine


# ---- a server that behaves -------------------------------------------------------------------------------------------


async def test_pieces_join_to_the_answer_that_the_official_client_gets_whole(engine: OllamaEngine) -> None:
    pieces = await pieces_of(await engine.submit(work(engine.resolve(None))))
    async with AsyncClient(engine.url, trust_env=False) as client:
        options = {"temperature": 0, "num_predict": CONFIG.default_max_tokens, "seed": 7}
        whole = await client.chat(engine.resolve(None), [{"role": "user", "content": QUESTION}], options=options)
    assert "".join(piece.text for piece in pieces) == whole.message.content != ""
    prompt, answer = whole.prompt_eval_count or 0, whole.eval_count or 0
    assert pieces[-1].usage == Usage(prompt, answer, prompt + answer)
    assert pieces[-1].finish_reason == whole.done_reason
    assert all(piece.usage is None and not piece.token_ids for piece in pieces[:-1])


async def test_it_is_an_engine_that_is_ready_with_the_models_of_its_server(demo: StandIn) -> None:
    as_engine: Engine = OllamaEngine(CONFIG, demo.url)
    async with as_engine:
        status = as_engine.status()
        assert (status.state, status.models, status.reason) == ("ready", [f"{MODEL}:latest"], "")
        assert (status.slots_used, status.slots_total) == (0, CONFIG.ollama_slots)
        assert not as_engine.simulated


async def test_a_simulated_stand_in_makes_a_simulated_engine(slow: StandIn) -> None:
    async with OllamaEngine(CONFIG, slow.url) as engine:
        assert engine.simulated


async def test_rates_are_known_after_an_answer(engine: OllamaEngine) -> None:
    assert engine.status().tokens_per_s == 0
    generation = await engine.submit(work(engine.resolve(None), max_tokens=8))
    assert engine.status().slots_used == 1
    assert engine.status().pending_tokens == 8
    pieces = await pieces_of(generation)
    await changed_to(engine, lambda: engine.status().slots_used == 0)
    status = engine.status()
    assert pieces[-1].usage is not None
    assert status.tokens_per_request == pieces[-1].usage.completion_tokens
    assert status.tokens_per_s > 0
    assert status.pending_tokens == 0


async def test_many_at_once_are_all_answered_alike(engine: OllamaEngine) -> None:
    generations = [await engine.submit(work(engine.resolve(None))) for _ in range(8)]
    answers = await asyncio.gather(*map(pieces_of, generations))
    assert len({"".join(piece.text for piece in pieces) for pieces in answers}) == 1


async def test_closing_hangs_up_and_the_servers_slot_is_free(slow: StandIn) -> None:
    config = msgspec.structs.replace(CONFIG, default_max_tokens=30_000)
    async with OllamaEngine(config, slow.url) as engine:
        first = await engine.submit(work(MODEL))
        await first.next()
        second = await engine.submit(work(MODEL))
        await first.close()
        await first.close()
        assert (await second.next()).text
        await second.close()
        assert engine.status().slots_used == 0
        assert engine.status().state == "ready"


async def test_giving_up_on_next_loses_nothing(engine: OllamaEngine) -> None:
    whole = "".join(p.text for p in await pieces_of(await engine.submit(work(engine.resolve(None)))))
    generation = await engine.submit(work(engine.resolve(None)))
    text = ""
    while True:
        given_up = asyncio.create_task(generation.next())
        await asyncio.wait([given_up], timeout=0)
        given_up.cancel()
        await asyncio.wait([given_up])
        piece = await generation.next() if given_up.cancelled() else given_up.result()
        text += piece.text
        if piece.finish_reason is not None:
            break
    await generation.close()
    assert text == whole


async def test_a_close_that_is_broken_off_at_once_frees_the_slot_all_the_same(against: OllamaEngine) -> None:
    generation = await against.submit(work("good"))
    closing = generation.close()
    closing.send(None)  # it has cancelled the generation's task, which has not made its first step
    closing.close()
    await eventually(lambda: against.status().slots_used == 0)


async def test_leaving_the_engine_hangs_up_on_what_runs(slow: StandIn) -> None:
    async with OllamaEngine(CONFIG, slow.url) as engine:
        await (await engine.submit(work(MODEL, max_tokens=30_000))).next()
    async with OllamaEngine(CONFIG, slow.url) as another:
        assert (await (await another.submit(work(MODEL, max_tokens=2))).next()).text


# ---- a server that goes, and comes back ------------------------------------------------------------------------------


async def test_a_server_killed_in_mid_stream_is_away_until_a_probe_finds_it_again(launch: Launch) -> None:
    endless = {"engine": "simulated", "simulated_answer_tokens": 30_000}
    with launch(**endless) as standin:
        async with OllamaEngine(CONFIG, standin.url) as engine:
            generation = await engine.submit(work(MODEL, max_tokens=30_000))
            assert (await generation.next()).text
            os.kill(standin.pid, signal.SIGKILL)
            with pytest.raises(HeadraceError) as caught:
                await pieces_of(generation)
            assert isinstance(caught.value, Misbehaved)
            await changed_to(engine, lambda: engine.status().state == "down")
            await changed_to(engine, lambda: standin.url in engine.status().reason)
            with pytest.raises(HeadraceError) as refused:
                await engine.submit(work(MODEL))
            assert refused.value.code is ErrorCode.UNAVAILABLE
            with launch("--port", str(standin.port), **endless):
                await changed_to(engine, lambda: engine.status().state == "ready")
                again = await engine.submit(work(MODEL, max_tokens=4))
                assert (await pieces_of(again))[-1].finish_reason == "length"


async def test_a_server_that_is_not_there_is_down_and_says_where(unused_tcp_port: int) -> None:
    async with OllamaEngine(CONFIG, f"127.0.0.1:{unused_tcp_port}") as engine:
        status = engine.status()
        assert status.state == "down"
        assert status.reason
        with pytest.raises(HeadraceError) as caught:
            engine.resolve(None)
        assert caught.value.code is ErrorCode.UNAVAILABLE


# ---- which models ----------------------------------------------------------------------------------------------------

MANY = [
    {"name": "tinyllama:latest"},
    {"name": "someone/TinyLlama-1.1b:q4"},
    {"name": "nomic-embed-text:latest", "details": {"family": "nomic-bert"}},
    {"name": "embeds:latest", "capabilities": ["embedding"]},
    {"name": "far-away:cloud", "remote_host": "https://example.com"},
    {"name": "zeta:7b", "capabilities": ["completion"]},
    {"name": "alpha:latest", "details": None, "size": 1},
]


async def test_only_models_that_chat_here_and_may_answer_are_listed_and_used(ollama: OllamaServer) -> None:
    ollama.models = MANY
    config = msgspec.structs.replace(CONFIG, spill_models={"mlx-big": "zeta:7b", "mlx-other": "gone"})
    async with OllamaEngine(config, ollama.url) as engine:
        assert sorted(engine.status().models) == ["alpha:latest", "zeta:7b"]
        assert engine.resolve(None) == "zeta:7b"
        assert engine.resolve("alpha") == "alpha:latest"
        assert engine.resolve("MLX-big") == "zeta:7b"
        for name, code in {
            "tinyllama": ErrorCode.MODEL_INTERNAL,
            "TinyLlama:1.1b": ErrorCode.MODEL_INTERNAL,
            "mlx-other": ErrorCode.MODEL_NOT_FOUND,
            "far-away:cloud": ErrorCode.MODEL_NOT_FOUND,
            "embeds": ErrorCode.MODEL_NOT_FOUND,
            "gamma": ErrorCode.MODEL_NOT_FOUND,
        }.items():
            with pytest.raises(HeadraceError) as caught:
                engine.resolve(name)
            assert caught.value.code is code


GEMMA = {"family": "gemma3", "families": ["gemma3"]}


async def test_what_the_list_does_not_tell_of_a_model_is_asked_for_once(ollama: OllamaServer) -> None:
    """Before 0.30 the list has no capabilities, and before 0.6.4 nothing has. A family tells nothing."""
    ollama.models = [
        {"name": "gemma3:4b", "digest": "1", "details": GEMMA},
        {"name": "embeddinggemma:latest", "digest": "2", "details": GEMMA},
        {"name": "old-embedder:latest", "digest": "3", "details": GEMMA},
        {"name": "old-chat:latest", "digest": "4", "details": {"family": "nomic-bert"}},
        {"name": "new:latest", "digest": "5", "capabilities": ["completion"]},
    ]
    ollama.shown = {
        "gemma3:4b": {"capabilities": ["completion", "vision", "tools"]},
        "embeddinggemma:latest": {"capabilities": ["embedding"]},
        "old-embedder:latest": {"model_info": {"general.architecture": "gemma3", "gemma3.pooling_type": 1}},
        "old-chat:latest": {"template": "{{ if .Tools }}", "model_info": {"general.architecture": "llama"}},
        "new:latest": {"model_info": {"llama.context_length": 2048}},
    }
    async with OllamaEngine(CONFIG, ollama.url) as engine:
        status = engine.status()
        assert sorted(status.models) == ["gemma3:4b", "new:latest", "old-chat:latest"]
        assert sorted(status.embedding_models) == ["embeddinggemma:latest", "old-embedder:latest"]
        assert sorted(status.tool_models) == ["gemma3:4b", "old-chat:latest"]
    client = OllamaClient(ollama.url, idle_timeout_s=5, load_timeout_s=5)
    ollama.shows.clear()
    for _ in range(2):
        await client.models()
        assert sorted(ollama.shows) == sorted(ollama.shown)
    ollama.models[0]["digest"] = "6"
    await client.models()
    assert sorted(ollama.shows) == sorted([*ollama.shown, "gemma3:4b"]), "another version is asked about again"
    await client.close()


async def test_a_model_that_the_server_does_not_show_is_told_by_its_family(ollama: OllamaServer) -> None:
    ollama.models = [{"name": "bert:latest", "details": {"family": "bert"}}, {"name": "llama:latest", "details": {}}]
    ollama.shown = {"bert:latest": {"capabilities": 5}, "llama:latest": {}}
    async with OllamaEngine(CONFIG, ollama.url) as engine:
        assert engine.status().models == ["llama:latest"]
        assert engine.status().embedding_models == ["bert:latest"]


async def test_a_request_without_a_model_gets_the_configured_one_or_the_most_capable(ollama: OllamaServer) -> None:
    ollama.models = [
        {"name": f"{name}:latest", "details": {"parameter_size": size}, "capabilities": ["completion"]}
        for name, size in {"a": "134.52M", "b": "7.6B", "c": "1.2B", "d": "", "e": "nonsense"}.items()
    ]
    for fields, wanted in (
        ({}, "b:latest"),
        ({"spill_models": {"mlx-big": "c"}}, "c:latest"),
        ({"spill_models": {"mlx-big": "c"}, "ollama_models": ["gone", "a"]}, "a:latest"),
    ):
        async with OllamaEngine(msgspec.structs.replace(CONFIG, **fields), ollama.url) as engine:
            assert engine.resolve(None) == wanted
            assert engine.status().models[0] == wanted


async def test_a_server_with_internal_models_alone_is_down_and_says_what_to_do(ollama: OllamaServer) -> None:
    ollama.models = MANY[:2]
    async with OllamaEngine(CONFIG, ollama.url) as engine:
        assert engine.status().state == "down"
        assert "ollama pull" in engine.status().reason
        with pytest.raises(HeadraceError) as caught:
            engine.resolve(None)
        assert caught.value.code is ErrorCode.MODEL_NOT_FOUND


async def test_a_model_that_was_removed_is_noticed_at_the_next_request(
    ollama: OllamaServer, against: OllamaEngine
) -> None:
    async def not_found(connection: Connection) -> None:
        await connection.answer({"error": "model 'good' not found"}, 404)

    ollama.chat = not_found
    ollama.models = [{"name": "other:latest"}]
    assert (await failure_of(against)).code is ErrorCode.MODEL_NOT_FOUND
    await changed_to(against, lambda: against.status().models == ["other:latest"])
    assert (await failure_of(against, model="good")).code is ErrorCode.MODEL_NOT_FOUND


# ---- what goes over the wire -----------------------------------------------------------------------------------------


async def test_everything_a_request_says_reaches_the_server(ollama: OllamaServer, against: OllamaEngine) -> None:
    schema = {
        "type": "object",
        "properties": {"at": {"type": "object", "properties": {"city": {"type": "string", "minLength": 1}}}},
    }
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Weather "}, {"type": "text", "text": "there?"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "mild"},
    ]
    await failure_of(
        against,
        messages=turns,
        tools=[{"function": {"name": "weather", "parameters": schema}}],
        max_completion_tokens=9,
        top_p=0.5,
        top_k=3,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        stop="END",
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
    )
    (body,) = ollama.bodies
    assert body["model"] == "good:latest"
    assert (body["stream"], body["think"], body["truncate"], body["shift"]) == (True, False, False, False)
    assert body["options"] == {
        "seed": 7,
        "num_predict": 9,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.1,
        "repeat_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "stop": ["END"],
    }
    assert body["format"] == schema
    assert body["tools"][0]["function"]["parameters"] == schema
    system, user, called, result = body["messages"]
    assert system == {"role": "system", "content": "Be brief."}
    assert user["content"] == "Weather there?"
    assert called["tool_calls"][0]["id"] == "c1"
    assert called["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}
    assert (result["tool_name"], result["tool_call_id"], result["content"]) == ("weather", "c1", "mild")


async def test_what_a_request_leaves_open_stays_the_models_own(ollama: OllamaServer, against: OllamaEngine) -> None:
    await failure_of(
        against,
        temperature=None,
        seed=2**62,
        tools=[{"function": {"name": "f"}}],
        tool_choice="none",
        response_format={"type": "json_object"},
    )
    (body,) = ollama.bodies
    assert body["options"] == {"seed": 7, "num_predict": CONFIG.default_max_tokens}
    assert "tools" not in body
    assert body["format"] == "json"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"exact": True}, "exact"),
        ({"structured_outputs": {"regex": "a+"}}, "structured_outputs"),
        ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "start: X"}}, "structured_outputs"),
        ({"tools": [{"function": {"name": "f"}}], "tool_choice": "required"}, "tool_choice"),
    ],
)
async def test_a_form_that_its_api_has_no_parameter_for_is_refused_by_name(
    ollama: OllamaServer, against: OllamaEngine, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(HeadraceError) as caught:
        await against.submit(work("good:latest", **fields))
    assert (caught.value.code, caught.value.param) == (ErrorCode.UNSUPPORTED_PARAMETER, param)
    assert f"`{param}`" in caught.value.message
    assert ollama.bodies == []


@pytest.mark.parametrize("arguments", ["[]", "{", "3", '"x"'])
async def test_an_earlier_tool_call_without_an_object_is_sent_as_a_string(
    ollama: OllamaServer, against: OllamaEngine, arguments: str
) -> None:
    call = {"id": "c1", "function": {"name": "f", "arguments": arguments}}
    await failure_of(against, messages=[{"role": "assistant", "tool_calls": [call]}])
    (body,) = ollama.bodies
    assert body["messages"][0]["tool_calls"][0]["function"]["arguments"] == {"arguments": arguments}


async def test_tool_calls_come_whole_with_ids_and_name_the_finish(ollama: OllamaServer, against: OllamaEngine) -> None:
    def calling(name: str, **more: Any) -> dict[str, Any]:
        function = {"index": 0, "name": name, "arguments": {"city": "Zürich", "n": [1]}}
        return {"message": {"role": "assistant", "content": "", "tool_calls": [{"function": function, **more}]}}

    async def tools(connection: Connection) -> None:
        await connection.lines(calling("a", id="call_9"), calling("b"), LAST)
        await connection.end()

    ollama.chat = tools
    pieces = await pieces_of(await against.submit(work("good")))
    calls = [call for piece in pieces for call in piece.tool_calls]
    assert [call.function.name for call in calls] == ["a", "b"]
    assert json.loads(calls[0].function.arguments) == {"city": "Zürich", "n": [1]}
    assert calls[0].id == "call_9"
    assert calls[1].id not in ("", "call_9")
    assert pieces[-1].finish_reason == "tool_calls"


async def test_a_call_that_the_model_writes_as_plain_text_is_a_call(
    ollama: OllamaServer, against: OllamaEngine
) -> None:
    async def plainly(connection: Connection) -> None:
        parts = ('{"name": "f", ', '"arguments": {"x": 1}}')
        await connection.lines(*({"message": {"role": "assistant", "content": part}} for part in parts), LAST)
        await connection.end()

    ollama.chat = plainly
    pieces = await pieces_of(await against.submit(work("good", tools=[{"function": {"name": "f"}}])))
    assert "".join(piece.text for piece in pieces) == ""
    (call,) = pieces[-1].tool_calls
    assert (call.function.name, call.function.arguments, pieces[-1].finish_reason) == ("f", '{"x": 1}', "tool_calls")
    assert "as plain text" in pieces[-1].notes[0]


async def test_an_answer_that_was_begun_elsewhere_is_not_taken(engine: OllamaEngine) -> None:
    for begun in ({"resume_text": "abc"}, {"resume_tokens": [1]}):
        with pytest.raises(HeadraceError) as caught:
            await engine.submit(msgspec.structs.replace(work(engine.resolve(None)), **begun))
        assert caught.value.code is ErrorCode.ENGINE_FAILED
        assert not isinstance(caught.value, Misbehaved), "another attempt here would end the same way"


# ---- embeddings ------------------------------------------------------------------------------------------------------


async def test_it_embeds_with_what_its_server_has_for_that(demo: StandIn) -> None:
    async with OllamaEngine(CONFIG, demo.url) as engine:
        status = engine.status()
        assert (status.models, status.embedding_models) == ([f"{MODEL}:latest"], [f"{EMBEDDER}:latest"])
        assert engine.embedding_model(None) == engine.embedding_model(EMBEDDER) == f"{EMBEDDER}:latest"
        texts = ["the cat sat on the mat", "a cat on a mat", "quarterly revenue"]
        embedded = await engine.embed(EmbeddingRequest(texts), EMBEDDER)
        near, far = (sum(map(operator.mul, embedded.vectors[0], other)) for other in embedded.vectors[1:])
        assert near > far
        async with AsyncClient(demo.url, trust_env=False) as client:
            theirs = await client.embed(EMBEDDER, texts)
        assert embedded.vectors == [list(vector) for vector in theirs.embeddings]
        assert embedded.prompt_tokens == theirs.prompt_eval_count
        (short,) = (await engine.embed(EmbeddingRequest("x", dimensions=8), EMBEDDER)).vectors
        assert len(short) == 8


@pytest.mark.parametrize(
    ("requested", "found"),
    [(None, "embeds:latest"), ("nomic-embed-text", "nomic-embed-text:latest"), ("alpha", "alpha:latest")],
)
async def test_what_embeds_and_what_chats_are_told_apart(
    ollama: OllamaServer, requested: str | None, found: str
) -> None:
    ollama.models = MANY
    async with OllamaEngine(CONFIG, ollama.url) as engine:
        assert engine.status().embedding_models == ["nomic-embed-text:latest", "embeds:latest"]
        assert engine.embedding_model(requested) == found
        for name, code in {"tinyllama": ErrorCode.MODEL_INTERNAL, "gamma": ErrorCode.MODEL_NOT_FOUND}.items():
            with pytest.raises(HeadraceError) as caught:
                engine.embedding_model(name)
            assert caught.value.code is code


async def test_a_server_that_only_embeds_is_ready_and_has_no_model_that_chats(ollama: OllamaServer) -> None:
    ollama.models = [{"name": "embeds:latest", "capabilities": ["embedding"]}]
    async with OllamaEngine(CONFIG, ollama.url) as engine:
        assert (engine.status().state, engine.status().models) == ("ready", [])
        with pytest.raises(HeadraceError) as caught:
            engine.resolve(None)
        assert caught.value.code is ErrorCode.MODEL_NOT_FOUND


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        ({"embeddings": [[1.0]]}, 200, ErrorCode.ENGINE_FAILED),
        ({"embeddings": [["x"], [1.0]]}, 200, ErrorCode.ENGINE_FAILED),
        ({}, 200, ErrorCode.ENGINE_FAILED),
        (b"nonsense", 200, ErrorCode.ENGINE_FAILED),
        ({"error": "no memory"}, 500, ErrorCode.ENGINE_FAILED),
        ({"error": "busy"}, 503, ErrorCode.UNAVAILABLE),
        ({"error": 'model "x" not found, try pulling it first'}, 404, ErrorCode.MODEL_NOT_FOUND),
        ({"error": "this model does not support embeddings"}, 400, ErrorCode.UNSUPPORTED_PARAMETER),
        ({"error": "this model does not support embeddings"}, 501, ErrorCode.UNSUPPORTED_PARAMETER),
        ({"error": "the input length exceeds the context length"}, 400, ErrorCode.CONTEXT_LENGTH_EXCEEDED),
    ],
)
async def test_an_embedding_that_goes_wrong_says_whose_fault_it_was(
    ollama: OllamaServer, against: OllamaEngine, answer: Any, status: int, code: ErrorCode
) -> None:
    async def wrong(connection: Connection) -> None:
        await connection.answer(answer, status)

    ollama.chat = wrong
    with pytest.raises(HeadraceError) as caught:
        await against.embed(EmbeddingRequest(["a", "b"], truncate=False), "good:latest")
    assert caught.value.code is code
    assert isinstance(caught.value, Misbehaved) is (code is ErrorCode.ENGINE_FAILED)
    assert ollama.bodies == [{"model": "good:latest", "input": ["a", "b"], "truncate": False}]


async def test_whoever_watches_is_told_when_embeddings_have_a_server_left_alone_and_when_it_is_well_again(
    ollama: OllamaServer, against: OllamaEngine
) -> None:
    async def down(connection: Connection) -> None:
        await connection.answer({"error": "no memory"}, 500)

    ollama.chat = down
    told: list[str] = []
    well = asyncio.Event()

    def note() -> None:
        told.append(against.status().state)
        if told[-1] == "ready":
            well.set()

    against.on_change(note)
    for _ in range(2):
        with pytest.raises(HeadraceError):
            await against.embed(EmbeddingRequest("a"), "good:latest")
    assert told == ["down"]
    async with asyncio.timeout(20):
        await well.wait()


# ---- servers that misbehave ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [text_part("It")],
        [text_part("It"), b"{broken\n"],
        [text_part("It"), [1]],
        [text_part("It"), {"message": {"content": 3}}],
        [text_part("It"), {"error": "llama runner process has terminated"}],
        [text_part("It"), {"error": {"not": "text"}}],
        [b"\xff\xfe\n"],
    ],
)
@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("streams", [True, False])
async def test_a_stream_that_goes_wrong_may_be_tried_again_unless_its_reader_has_a_part(
    ollama: OllamaServer, against: OllamaEngine, lines: list[Any], ends: bool, streams: bool
) -> None:
    async def broken(connection: Connection) -> None:
        await connection.lines(*lines)
        if ends:
            await connection.end()

    ollama.chat = broken
    generation = await against.submit(work("good", stream=streams))
    said = len(lines) > 0 and not isinstance(lines[0], bytes)
    if said:
        assert (await generation.next()).text == "It"
    with pytest.raises(HeadraceError) as caught:
        await generation.next()
    assert caught.value.code is ErrorCode.ENGINE_FAILED
    assert isinstance(caught.value, Misbehaved) is not (said and streams)
    await generation.close()
    assert against.status().slots_used == 0


@pytest.mark.parametrize(("status", "away"), [(500, False), (401, False), (503, True), (429, True), (502, False)])
async def test_a_server_that_cannot_work_is_soon_left_alone(
    ollama: OllamaServer, against: OllamaEngine, status: int, away: bool
) -> None:
    async def failing(connection: Connection) -> None:
        await connection.answer({"error": "server busy, please try again"}, status)

    ollama.chat = failing
    for request_id in ("r1", "r2"):
        error = await failure_of(against, model="good", request_id=request_id)
        assert error.code is (ErrorCode.UNAVAILABLE if away else ErrorCode.ENGINE_FAILED)
        assert isinstance(error, Misbehaved) is not away
        assert "server busy" in error.message
    assert against.status().state == "down"
    assert "server busy" in against.status().reason
    with pytest.raises(HeadraceError):
        await against.submit(work("good"))
    await changed_to(against, lambda: against.status().state == "ready")


async def test_a_request_that_makes_a_model_fail_takes_the_server_from_no_other(
    ollama: OllamaServer, against: OllamaEngine
) -> None:
    async def failing(connection: Connection) -> None:
        await connection.answer({"error": "model requires more system memory (48.2 GiB) than is available"}, 500)

    ollama.chat = failing
    for _ in range(5):
        error = await failure_of(against, model="good")
        assert isinstance(error, Misbehaved)
        assert "48.2 GiB" in error.message
        assert against.status().state == "ready"


@pytest.mark.parametrize(
    ("status", "says", "code"),
    [
        (400, "registry.ollama.ai/library/good:latest does not support tools", ErrorCode.UNSUPPORTED_PARAMETER),
        (400, "the input length exceeds the context length", ErrorCode.CONTEXT_LENGTH_EXCEEDED),
        (400, "the prompt is longer than the context length currently available", ErrorCode.CONTEXT_LENGTH_EXCEEDED),
        (422, "no such thing", ErrorCode.INVALID_REQUEST),
        (500, 'invalid format: "7"; expected "json" or a valid JSON Schema object', ErrorCode.INVALID_REQUEST),
    ],
)
async def test_a_refusal_of_a_request_is_no_failure_of_the_server(
    ollama: OllamaServer, status: int, says: str, code: ErrorCode
) -> None:
    async def refusing(connection: Connection) -> None:
        await connection.answer({"error": says}, status)

    ollama.chat = refusing
    async with OllamaEngine(CONFIG, ollama.url) as engine:
        for _ in range(3):
            assert (await failure_of(engine, model="good")).code is code
        assert engine.status().state == "ready"


async def test_a_server_that_falls_silent_is_given_up(ollama: OllamaServer) -> None:
    released = asyncio.Event()

    async def silent(connection: Connection) -> None:
        await connection.lines(text_part("It"))
        await released.wait()

    ollama.chat = silent
    async with OllamaEngine(msgspec.structs.replace(CONFIG, ollama_timeout_s=0.2), ollama.url) as engine:
        error = await failure_of(engine)
    released.set()
    assert isinstance(error, Misbehaved)
    assert "in time" in error.message


# ---- the pipeline's own questions ------------------------------------------------------------------------------------


async def test_an_internal_model_answers_the_pipeline_in_a_few_words(ollama: OllamaServer) -> None:
    async def simple(connection: Connection) -> None:
        await connection.answer({"message": {"role": "assistant", "content": " simple \n"}, "done": True})

    ollama.chat = simple
    client = OllamaClient(ollama.url, idle_timeout_s=5, load_timeout_s=5)
    assert await client.ask_internal("tinyllama", "simple or complex?") == "simple"
    assert ollama.bodies[0]["options"]["num_predict"] < 20
    await client.close()


async def test_a_model_is_loaded_by_a_chat_without_messages(ollama: OllamaServer) -> None:
    async def loaded(connection: Connection) -> None:
        message = {"role": "assistant", "content": ""}
        await connection.answer({"message": message, "done_reason": "load", "done": True})

    client = OllamaClient(ollama.url, idle_timeout_s=5, load_timeout_s=5)
    assert not await client.load_internal("tinyllama")
    ollama.chat = loaded
    assert await client.load_internal("tinyllama")
    assert ollama.bodies[-1]["messages"] == []
    await client.close()


async def test_a_question_that_fails_has_no_answer(ollama: OllamaServer) -> None:
    async def nonsense(connection: Connection) -> None:
        await connection.answer({"message": None})

    client = OllamaClient(ollama.url, idle_timeout_s=5, load_timeout_s=5)
    assert await client.ask_internal("tinyllama", "?") is None
    ollama.chat = nonsense
    assert await client.ask_internal("tinyllama", "?") is None
    await client.close()
    closed = OllamaClient("127.0.0.1:1", idle_timeout_s=5, load_timeout_s=5)
    assert await closed.ask_internal("tinyllama", "?") is None
    assert not await closed.load_internal("tinyllama")
    await closed.close()


# ---- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        (":5000", "http://127.0.0.1:5000"),
        ("10.0.0.9", "http://10.0.0.9:11434"),
        ("example.com:80/ollama", "http://example.com/ollama"),
        ("https://example.com", "https://example.com"),
        ("[::1]:5000", "http://[::1]:5000"),
    ],
)
async def test_a_host_may_be_written_as_ollamas_own_variable(
    monkeypatch: pytest.MonkeyPatch, host: str, url: str
) -> None:
    monkeypatch.delenv("OLLAMA_HOST", raising=False)
    client = OllamaClient(host, idle_timeout_s=1, load_timeout_s=1)
    assert client.url == url
    await client.close()


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:1", "socks5h://127.0.0.1:1", "nonsense"])
async def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(
    monkeypatch: pytest.MonkeyPatch, ollama: OllamaServer, proxy: str
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    async with OllamaEngine(CONFIG, ollama.url) as engine:
        assert engine.status().state == "ready"


def test_a_proxy_that_cannot_be_used_for_another_machine_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "nonsense://127.0.0.1:1")
    with pytest.raises(ConfigError, match="NO_PROXY"):
        OllamaClient("192.0.2.1", idle_timeout_s=1, load_timeout_s=1)


# ---- speed -----------------------------------------------------------------------------------------------------------

SECOND_NS = 10**9


def figures(tokens: int, writing_s: float, **more: float) -> dict[str, Any]:
    """The last line of an answer, with what the server counted."""
    seconds = {f"{name}_duration": int(value * SECOND_NS) for name, value in {"eval": writing_s, **more}.items()}
    return LAST | {"eval_count": tokens, "prompt_eval_count": 30} | seconds


async def test_the_speed_is_what_the_server_counted_and_not_how_long_the_answer_took_to_come(
    ollama: OllamaServer, against: OllamaEngine
) -> None:
    async def counted(connection: Connection) -> None:
        await connection.lines(text_part("a"), figures(60, 6.0, prompt_eval=0.5, load=20.0))
        await connection.end()

    ollama.chat = counted
    assert against.status().tokens_per_s == 0
    await pieces_of(await against.submit(work("good:latest")))
    status = against.status()
    assert status.tokens_per_s == pytest.approx(10)
    assert status.prompt_tokens_per_s == pytest.approx(60)
    assert (status.tokens_per_request, status.prompt_tokens_per_request) == (60, 30)


async def test_a_model_that_is_not_loaded_costs_its_loading(ollama: OllamaServer, against: OllamaEngine) -> None:
    async def counted(connection: Connection) -> None:
        await connection.lines(text_part("a"), figures(60, 6.0, load=20.0))
        await connection.end()

    ollama.chat = counted
    await pieces_of(await against.submit(work("good:latest")))
    assert against.status().loading_s == 0, "it is loaded now"
    async with OllamaEngine(CONFIG, ollama.url) as another:
        await pieces_of(await another.submit(work("good:latest")))
        another._look_now.set()
        await eventually(lambda: another.status().loading_s == 20)
        ollama.loaded = [{"name": "good:latest"}]
        another._look_now.set()
        await eventually(lambda: another.status().loading_s == 0)


async def test_a_server_gets_one_request_until_it_is_seen_to_run_more(
    ollama: OllamaServer, against: OllamaEngine
) -> None:
    go_on = asyncio.Event()

    async def slow(connection: Connection) -> None:
        await connection.lines(*map(text_part, "abcdefghijkl"))
        await go_on.wait()
        await connection.lines_more(*map(text_part, "abcdefghijkl"), figures(24, 2.4))
        await connection.end()

    ollama.chat = slow
    assert against.status().slots_total == 1
    first = await against.submit(work("good:latest", "r1"))
    await first.next()
    await eventually(lambda: against.status().slots_total == 2)
    assert against.status().tokens_per_s > 0, "one more is tried only once the speed is known"
    second = await against.submit(work("good:latest", "r2"))
    await second.next()
    go_on.set()
    await asyncio.gather(pieces_of(first), pieces_of(second))
    await eventually(lambda: against.status().slots_used == 0)
    assert against.status().slots_total == 2


async def test_a_server_that_answers_and_has_no_model_says_so(ollama: OllamaServer, against: OllamaEngine) -> None:
    assert not against.status().empty
    ollama.models = []
    against._look_now.set()
    await eventually(lambda: against.status().empty)
    assert against.status().state == "down"


async def answers_at_once(connection: Connection) -> None:
    await connection.lines(text_part("Paris."), LAST)
    await connection.end()


async def test_every_request_for_a_model_on_the_cpu_has_the_same_number_of_threads():
    async with ollama_server() as server, OllamaEngine(Config(ollama_threads=3), server.url) as engine:
        server.chat = answers_at_once
        for _ in range(2):
            await pieces_of(await engine.submit(work("good:latest")))
        assert [body["options"]["num_thread"] for body in server.bodies] == [3, 3]
        client = OllamaClient(server.url, idle_timeout_s=5, load_timeout_s=5, threads=3)
        await client.ask_internal("tinyllama", "?")
        assert server.bodies[-1]["options"] == {"temperature": 0, "num_predict": 8, "num_thread": 3}
        await client.close()


async def test_a_model_on_a_gpu_or_a_server_that_does_not_say_gets_no_number_of_threads():
    async with ollama_server() as server, OllamaEngine(Config(ollama_threads=3), server.url) as engine:
        server.chat = answers_at_once
        server.loaded = [{"name": 7}]
        await pieces_of(await engine.submit(work("good:latest")))
        server.loaded = [{"name": "good:latest", "size_vram": 1 << 30}]
        await pieces_of(await engine.submit(work("good:latest")))
        assert not any("num_thread" in body["options"] for body in server.bodies)


async def test_without_the_setting_the_server_decides_about_its_threads():
    async with ollama_server() as server, OllamaEngine(Config(), server.url) as engine:
        server.chat = answers_at_once
        await pieces_of(await engine.submit(work("good:latest")))
        assert "num_thread" not in server.bodies[0]["options"]


# ---- parameters ------------------------------------------------------------------------------------------------------


async def answered(connection: Connection) -> None:
    await connection.lines(text_part("Hi"), LAST)
    await connection.end()


def line(**fields: Any) -> dict[str, Any]:
    return {"model": "good", "done": False, **fields}


async def test_ollamas_own_options_reach_it(ollama: OllamaServer, against: OllamaEngine) -> None:
    ollama.chat = answered
    options = {"num_ctx": 8192, "num_gpu": 0, "num_thread": 3, "mirostat": 2}
    particular = {"options": options, "keep_alive": "5m"}
    await pieces_of(await against.submit(work("good:latest", ollama=particular, temperature=0.5)))
    (body,) = ollama.bodies
    sent = body["options"]
    assert (sent["num_ctx"], sent["num_gpu"], sent["mirostat"], sent["temperature"]) == (8192, 0, 2, 0.5)
    assert sent.get("num_thread") != 3
    assert body["keep_alive"] == "5m"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"suffix": "end"}, {"suffix": "end"}),
        ({"ollama": {"template": "T"}}, {"template": "T"}),
        ({"ollama": {"context": [1, 2]}}, {"context": [1, 2]}),
    ],
)
async def test_a_prompt_that_is_no_turn_of_a_chat_is_generated(
    ollama: OllamaServer, against: OllamaEngine, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    async def generated(connection: Connection) -> None:
        assert connection.path == "/api/generate"
        await connection.lines(line(response="Hi"), {"response": "", "done": True, "done_reason": "stop"})
        await connection.end()

    ollama.chat = generated
    turns = [{"role": "system", "content": "brief"}, {"role": "user", "content": "x"}]
    pieces = await pieces_of(await against.submit(work("good:latest", messages=turns, **fields)))
    assert "".join(piece.text for piece in pieces) == "Hi"
    (body,) = ollama.bodies
    assert "messages" not in body
    assert {"prompt": "x", "system": "brief", **expected}.items() <= body.items()


@pytest.mark.parametrize("fields", [{"raw": True}, {"ollama": {"raw": True}}])
async def test_a_raw_prompt_is_generated_without_a_template(
    ollama: OllamaServer, against: OllamaEngine, fields: dict[str, Any]
) -> None:
    async def generated(connection: Connection) -> None:
        assert connection.path == "/api/generate"
        await connection.lines(line(response="Hi"), {"response": "", "done": True, "done_reason": "stop"})
        await connection.end()

    ollama.chat = generated
    pieces = await pieces_of(await against.submit(work("good:latest", **fields)))
    assert "".join(piece.text for piece in pieces) == "Hi"
    (body,) = ollama.bodies
    assert {"prompt": QUESTION, "raw": True}.items() <= body.items()


@pytest.mark.parametrize(
    ("fields", "think"),
    [({}, False), ({"think": True}, True), ({"reasoning_effort": "low"}, True), ({"reasoning_effort": "none"}, False)],
)
async def test_a_model_thinks_where_it_can_and_is_asked_to(
    ollama: OllamaServer, fields: dict[str, Any], think: bool
) -> None:
    async def thinks(connection: Connection) -> None:
        message = {"role": "assistant", "content": "", "thinking": "Hm."}
        await connection.lines(line(message=message), text_part("Hi"), LAST)
        await connection.end()

    ollama.models = [{"name": "good:latest", "capabilities": ["completion", "thinking"]}]
    ollama.chat = thinks
    async with OllamaEngine(CONFIG, ollama.url) as engine:
        pieces = await pieces_of(await engine.submit(work("good:latest", **fields)))
    assert ollama.bodies[0]["think"] is think
    assert "".join(piece.reasoning for piece in pieces) == "Hm."
    assert pieces[-1].notes == []


async def test_the_effort_of_gpt_oss_is_a_word(ollama: OllamaServer) -> None:
    details = {"family": "gptoss"}
    ollama.models = [{"name": "good:latest", "capabilities": ["completion", "thinking"], "details": details}]
    ollama.chat = answered
    async with OllamaEngine(CONFIG, ollama.url) as engine:
        await pieces_of(await engine.submit(work("good:latest", reasoning_effort="high")))
    assert ollama.bodies[0]["think"] == "high"


async def test_what_a_model_cannot_do_is_noted_or_refused(ollama: OllamaServer) -> None:
    ollama.models = [{"name": "good:latest", "capabilities": ["completion"]}]
    ollama.chat = answered
    image = [{"type": "image_url", "image_url": "data:image/png;base64,aGk="}]
    async with OllamaEngine(CONFIG, ollama.url) as engine:
        asked = work("good:latest", think=True, verbosity="low", logprobs=True, ignore_eos=True, typical_p=0.5)
        pieces = await pieces_of(await engine.submit(asked))
        for fields, param in (
            ({"messages": [{"role": "user", "content": image}]}, "messages"),
            ({"logit_bias": {"1": 2}}, "logit_bias"),
        ):
            with pytest.raises(HeadraceError) as refusal:
                await engine.submit(work("good:latest", **fields))
            assert (refusal.value.code, refusal.value.param) == (ErrorCode.UNSUPPORTED_PARAMETER, param)
    (body,) = ollama.bodies
    assert body["think"] is False
    assert body["options"]["typical_p"] == 0.5
    assert pieces[-1].notes == [
        "`verbosity` has no effect at Ollama.",
        "`ignore_eos` has no effect at Ollama.",
        'Model "good:latest" does not think before it answers.',
        "This server reports no log-probabilities. Ollama does from version 0.12.11.",
    ]


async def test_images_and_scores_are_carried(ollama: OllamaServer, against: OllamaEngine) -> None:
    score = {"token": "Hi", "logprob": -0.5, "bytes": [72, 105], "top_logprobs": [{"token": "Ho", "logprob": -1.5}]}

    async def scored(connection: Connection) -> None:
        await connection.lines(text_part("Hi") | {"logprobs": [score]}, LAST)
        await connection.end()

    ollama.chat = scored
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
    turns = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, image]}]
    pieces = await pieces_of(await against.submit(work("good:latest", messages=turns, logprobs=True, top_logprobs=1)))
    (body,) = ollama.bodies
    assert body["messages"] == [{"role": "user", "content": "What is it?", "images": ["aGk="]}]
    assert (body["logprobs"], body["top_logprobs"]) == (True, 1)
    (found,) = [each for piece in pieces for each in piece.scores]
    assert (found.token, found.logprob, found.top_logprobs[0].token) == ("Hi", -0.5, "Ho")
    assert pieces[-1].notes == []


async def test_what_the_server_says_of_its_models_is_told(ollama: OllamaServer) -> None:
    details = {"family": "qwen3", "parameter_size": "4B", "quantization_level": "Q4_K_M", "format": None}
    ollama.models = [
        {"name": "good:latest", "digest": "d", "size": 7, "details": details, "capabilities": ["completion", "tools"]},
        {"name": "tinyllama:latest"},
    ]
    ollama.loaded = [{"name": "good:latest", "size_vram": 5}]
    ollama.shown = {"good:latest": {"model_info": {"qwen3.context_length": 40960, "qwen3.block_count": 3}}}
    async with OllamaEngine(CONFIG, ollama.url) as engine:
        facts = engine.status().facts
    assert facts == {
        "good:latest": ModelFacts(
            ["completion", "tools"], 40960, "qwen3", "", "4B", "Q4_K_M", 7, "d", loaded=True, vram_bytes=5
        )
    }

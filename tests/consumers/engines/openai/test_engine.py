"""The engine of a server of OpenAI's API: against llama.cpp's own server, and against servers that misbehave."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from consumers.engines.openai import OpenAIEngine
from consumers.engines.server.generation import ServerGeneration
from pipeline.config import Config, ConfigError
from pipeline.engine import Generation, Misbehaved, Piece, Work
from pipeline.wire.answers import CompletionDetails, PromptDetails, Usage
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import ChatRequest, EmbeddingRequest
from tests.consumers.engines.conformance import Conformance, ask, until
from tests.consumers.llama_server import KEY, LlamaProcess, llama_server
from tests.consumers.ollama_server import Connection
from tests.consumers.openai_server import DONE, OpenAIServer, counted, event, openai_server, said

CONFIG = Config(default_max_tokens=24, openai_key=KEY)
IMAGE = "data:image/png;base64,iVBORw0KGgo="


def work(resume_text: str = "", /, **fields: Any) -> Work:
    fields = {"messages": [{"role": "user", "content": "hello"}]} | fields
    return Work("r1", msgspec.convert(fields, ChatRequest), "good", seed=7, resume_text=resume_text)


async def pieces_of(generation: Generation) -> list[Piece]:
    pieces = [await generation.next()]
    while pieces[-1].finish_reason is None:
        pieces.append(await generation.next())
    await generation.close()
    return pieces


async def whole(engine: OpenAIEngine, resume_text: str = "", /, **fields: Any) -> tuple[str, Piece]:
    """The text of an answer, and its last piece."""
    pieces = await pieces_of(await engine.submit(work(resume_text, **fields)))
    return "".join(piece.text for piece in pieces), pieces[-1]


def counts_of(last: Piece) -> tuple[int, int]:
    """The tokens of the prompt and of the answer. What of them was in the server's cache differs from call to call."""
    assert last.usage is not None
    return last.usage.prompt_tokens, last.usage.completion_tokens


async def failure_of(engine: OpenAIEngine, resume_text: str = "", /, **fields: Any) -> HeadraceError:
    with pytest.raises(HeadraceError) as caught:
        await whole(engine, resume_text, **fields)
    return caught.value


@pytest.fixture(scope="module")
def llama_process(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaProcess]:
    with llama_server(tiny, tmp_path_factory.mktemp("llama") / "log") as server:
        yield server


@pytest.fixture
async def engine(llama_process: LlamaProcess) -> AsyncIterator[OpenAIEngine]:
    async with Resolving(CONFIG, llama_process.url) as engine:
        yield engine


class Resolving(OpenAIEngine):
    """An engine whose caller leaves the model to it."""

    async def submit(self, work: Work) -> ServerGeneration:
        return await super().submit(msgspec.structs.replace(work, model=self.resolve(None)))


@pytest.fixture
async def server() -> AsyncIterator[OpenAIServer]:
    async with openai_server() as server:
        yield server


@pytest.fixture
async def against(server: OpenAIServer) -> AsyncIterator[OpenAIEngine]:
    """An engine against the server that misbehaves."""
    async with OpenAIEngine(CONFIG, server.url) as engine:
        yield engine


def answers(*parts: bytes, ends: bool = True) -> Any:
    """A handler that streams these events."""

    async def answer(connection: Connection) -> None:
        await connection.lines(*parts)
        if ends:
            await connection.end()

    return answer


# ---- a real server ---------------------------------------------------------------------------------------------------


class TestOpenAIEngine(Conformance):
    """What every engine must do."""

    async def test_the_same_seed_gives_the_same_answer(self, engine: OpenAIEngine) -> None:
        """A request's own: no other is sent."""
        request = ChatRequest(prompt=self.prompts[0], max_tokens=24, temperature=1, seed=7)
        first = await ask(engine, request)
        assert (await ask(engine, request)).text == first.text


async def test_it_says_what_the_server_is_and_has(engine: OpenAIEngine, llama_process: LlamaProcess) -> None:
    status = engine.status()
    assert (status.state, status.dialect, status.server) == ("ready", "openai", llama_process.url)
    (name,) = status.models
    assert status.facts[name].context_tokens > 0
    assert status.facts[name].size_bytes > 0


async def test_a_wrong_key_is_the_reason_why_a_server_is_down(llama_process: LlamaProcess) -> None:
    async with OpenAIEngine(Config(openai_key="another"), llama_process.url) as engine:
        assert engine.status().state == "down"
        assert "openai_key" in engine.status().reason


@pytest.mark.parametrize("raw", [False, True])
async def test_an_answer_goes_on_from_its_text_in_an_open_turn(engine: OpenAIEngine, raw: bool) -> None:
    undisturbed, last = await whole(engine, temperature=0, max_tokens=24, raw=raw)
    for length in (1, 9, len(undisturbed) - 1):
        rest, end = await whole(engine, undisturbed[:length], temperature=0, max_tokens=24, raw=raw)
        assert undisturbed[:length] + rest == undisturbed
        assert (end.finish_reason, counts_of(end)) == ("length", counts_of(last))


async def test_a_whole_answer_that_is_resumed_only_ends(engine: OpenAIEngine) -> None:
    undisturbed, last = await whole(engine, temperature=0, max_tokens=24)
    rest, end = await whole(engine, undisturbed, temperature=0, max_tokens=24)
    assert rest == ""
    assert (end.finish_reason, counts_of(end)) == ("length", counts_of(last))


async def test_the_server_names_what_it_refuses(engine: OpenAIEngine) -> None:
    images = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": IMAGE}}]}]
    error = await failure_of(engine, messages=images)
    assert error.code is ErrorCode.UNSUPPORTED_PARAMETER
    assert "image input is not supported" in error.message
    error = await failure_of(engine, messages=[{"role": "user", "content": "word " * 2000}])
    assert error.code is ErrorCode.CONTEXT_LENGTH_EXCEEDED
    assert engine.status().state == "ready"


# ---- what is sent ----------------------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("fields", "sent"),
    [
        ({}, {"max_tokens": 24}),
        ({"seed": 2**31 + 5}, {"seed": 5}),
        ({"max_completion_tokens": 9}, {"max_tokens": 9}),
        ({"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1}, None),
        ({"presence_penalty": 1, "frequency_penalty": -1, "parallel_tool_calls": False}, None),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5, "repeat_penalty": 1.5}),
        ({"stop": "x"}, {"stop": ["x"]}),
        ({"logit_bias": {"5": 1}}, {"logit_bias": {"5": 1.0}}),
        ({"logprobs": True, "top_logprobs": 3}, None),
        ({"tools": [TOOL], "tool_choice": "required"}, None),
        ({"tools": [TOOL], "tool_choice": "none"}, {}),
        ({"response_format": {"type": "json_object"}}, None),
        ({"structured_outputs": {"regex": "a+"}}, None),
        ({"min_tokens": 3, "stop_token_ids": [7], "mirostat": 0}, {"min_tokens": 3, "stop_token_ids": [7]}),
        ({"reasoning_effort": "low"}, None),
        (
            {"reasoning_effort": "none"},
            {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": False}},
        ),
        ({"reasoning_effort": "off"}, {"chat_template_kwargs": {"enable_thinking": False}}),
        ({"thinking": {"type": "disabled"}}, {"chat_template_kwargs": {"enable_thinking": False}}),
        ({"think": False, "reasoning_effort": "high"}, {"chat_template_kwargs": {"enable_thinking": False}}),
        ({"think": True}, {"chat_template_kwargs": {"enable_thinking": True}}),
        ({"think": "high"}, {"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "high"}),
        ({"chat_template_kwargs": {"x": 1}}, None),
    ],
)
async def test_what_a_request_sets_is_sent_and_nothing_else(
    server: OpenAIServer, against: OpenAIEngine, fields: dict[str, Any], sent: dict[str, Any] | None
) -> None:
    server.chat = answers(said("hi", "stop"), counted(3, 1))
    await whole(against, **fields)
    (body,) = server.bodies
    always = {"model": "good", "messages": [{"role": "user", "content": "hello"}], "stream": True}
    always |= {"stream_options": {"include_usage": True}, "max_tokens": 24}
    assert body == always | (fields if sent is None else sent)


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"regex": "a+"}},
        {"logprobs": 2},
        {"logprobs": 0},
    ],
)
async def test_what_a_raw_prompt_asks_for_is_sent(
    server: OpenAIServer, against: OpenAIEngine, fields: dict[str, Any]
) -> None:
    server.chat = answers(said("hi", "stop"), counted(3, 1))
    await whole(against, raw=True, **fields)
    (body,) = server.bodies
    assert {name: body.get(name) for name in ("prompt", *fields)} == {"prompt": "hello"} | fields


async def test_the_scores_of_a_text_are_read(server: OpenAIServer, against: OpenAIEngine) -> None:
    tops = [{" a": -0.5, " b": -1.0}, None]
    lists = {"tokens": [" a", "c"], "token_logprobs": [-0.5, -2.0], "top_logprobs": tops, "text_offset": [0, 2]}
    text = event(choices=[{"index": 0, "text": " ac", "logprobs": lists, "finish_reason": "stop"}])
    server.chat = answers(text, counted(3, 2), DONE)
    pieces = await pieces_of(await against.submit(work(raw=True, logprobs=2)))
    scores = [score for piece in pieces for score in piece.scores]
    assert [(score.token, score.logprob) for score in scores] == [(" a", -0.5), ("c", -2.0)]
    assert [(other.token, other.logprob) for other in scores[0].top_logprobs] == [(" a", -0.5), (" b", -1.0)]
    assert pieces[-1].notes == []


async def test_earlier_reasoning_is_sent(server: OpenAIServer, against: OpenAIEngine) -> None:
    server.chat = answers(said("hi", "stop"), counted(3, 1))
    turn = {"role": "assistant", "content": "Ho", "thinking": "I thought"}
    await whole(against, messages=[{"role": "user", "content": "Hi"}, turn, {"role": "user", "content": "And?"}])
    assert server.bodies[0]["messages"][1] == {"role": "assistant", "content": "Ho", "reasoning_content": "I thought"}


async def test_parts_of_text_beside_an_image_are_sent_as_text(server: OpenAIServer, against: OpenAIEngine) -> None:
    server.chat = answers(said("hi", "stop"), counted(3, 1))
    parts = [{"type": "input_text", "text": "What is this?"}, {"type": "image_url", "image_url": IMAGE}]
    await whole(against, messages=[{"role": "user", "content": parts}])
    sent = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": IMAGE}}]
    assert server.bodies[0]["messages"][0]["content"] == sent


async def test_the_tokens_of_reasoning_are_told(server: OpenAIServer, against: OpenAIEngine) -> None:
    details = {"reasoning_tokens": 2}
    server.chat = answers(said("hi", "stop"), counted(3, 4, completion_tokens_details=details), DONE)
    _, last = await whole(against)
    assert last.usage == Usage(3, 4, 7, completion_tokens_details=CompletionDetails(2))


async def test_a_limit_is_reduced_to_the_context_that_the_server_tells(server: OpenAIServer) -> None:
    """vLLM 0.32 answers: max_tokens=24 cannot be greater than max_model_len=20."""
    server.models = [{"id": "good", "max_model_len": 20}]
    server.chat = answers(said("hi", "stop"), counted(3, 1))
    async with OpenAIEngine(CONFIG, server.url) as engine:
        await whole(engine)
        await whole(engine, max_tokens=4000)
        await whole(engine, max_tokens=4)
    assert [body["max_tokens"] for body in server.bodies] == [20, 20, 4]


class Together:
    """Refuses a prompt whose tokens and limit together are more than its context, as vLLM 0.15 does."""

    def __init__(self, *, prompt: int, context: int) -> None:
        self.prompt = prompt
        self.context = context

    async def __call__(self, connection: Connection) -> None:
        body = json.loads(connection.body)
        limit = body["max_tokens"]
        if self.prompt + limit > self.context:
            message = (
                f"This model's maximum context length is {self.context} tokens. However, you requested "
                f"{self.prompt + limit} tokens ({self.prompt} in the messages, {limit} in the completion)."
            )
            await connection.answer({"object": "error", "message": message, "type": "BadRequestError"}, 400)
        elif not body["stream"]:
            await connection.answer({"usage": {"prompt_tokens": self.prompt}})
        else:
            await connection.lines(said("hi", "length"), counted(self.prompt, limit), DONE)
            await connection.end()


async def test_a_limit_is_reduced_to_what_the_prompt_leaves(server: OpenAIServer) -> None:
    server.models = [{"id": "good", "max_model_len": 30}]
    server.chat = Together(prompt=13, context=30)
    async with OpenAIEngine(CONFIG, server.url) as engine:
        text, last = await whole(engine, tools=[TOOL])
        assert (text, last.usage) == ("hi", Usage(13, 17, 30))
        assert [body["max_tokens"] for body in server.bodies] == [24, 1, 17]
        assert all(body["tools"] for body in server.bodies)
        server.bodies.clear()
        server.chat = Together(prompt=30, context=30)
        error = await failure_of(engine)
        assert error.code is ErrorCode.CONTEXT_LENGTH_EXCEEDED
        assert "you requested 54 tokens" in error.message
        assert [body["max_tokens"] for body in server.bodies] == [24, 1]


async def test_the_key_is_sent_with_every_call(server: OpenAIServer, against: OpenAIEngine) -> None:
    server.chat = answers(said("hi", "stop"), counted(3, 1))
    await whole(against)
    assert len(server.heads) == 2
    assert all(f"authorization: bearer {KEY}" in head.lower() for head in server.heads)


async def test_conversations_are_sent_as_they_are(server: OpenAIServer, against: OpenAIEngine) -> None:
    server.chat = answers(said("hi", "stop"), counted(3, 1))
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    image = {"type": "image_url", "image_url": IMAGE}
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Look:"}, image], "name": "ada"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "7"},
    ]
    await whole(against, messages=turns)
    assert server.bodies[0]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "name": "ada",
            "content": [{"type": "text", "text": "Look:"}, image | {"image_url": {"url": IMAGE}}],
        },
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "7"},
    ]


async def test_a_raw_prompt_is_sent_as_it_is(server: OpenAIServer, against: OpenAIEngine) -> None:
    parts = [{"text": "lo", "index": 0}, {"text": "", "finish_reason": "stop"}]
    server.chat = answers(*(event(choices=[part]) for part in parts), counted(3, 1), DONE)
    text, last = await whole(against, raw=True, stop=["."], messages=[{"role": "user", "content": "hel"}])
    assert (text, last.finish_reason) == ("lo", "stop")
    assert server.heads[-1].startswith("POST /v1/completions ")
    assert server.bodies[0]["prompt"] == "hel"
    assert server.bodies[0]["stop"] == ["."]
    assert "messages" not in server.bodies[0]


@pytest.mark.parametrize("fields", [{"exact": True}, {"suffix": "x"}, {"ollama": {"template": "x"}}])
async def test_what_only_another_engine_can_do_is_refused_by_name(
    server: OpenAIServer, against: OpenAIEngine, fields: dict[str, Any]
) -> None:
    error = await failure_of(against, **fields)
    assert error.code is ErrorCode.UNSUPPORTED_PARAMETER
    assert error.param in (*fields, "template")
    assert server.bodies == []


# ---- what is read ----------------------------------------------------------------------------------------------------


async def test_thoughts_scores_and_calls_are_read(server: OpenAIServer, against: OpenAIEngine) -> None:
    score = {"token": "hi", "logprob": -0.5, "bytes": [104, 105], "top_logprobs": [{"token": "hi", "logprob": -0.5}]}
    server.chat = answers(
        b": keepalive 1/2\n\n",
        said("", role="assistant"),
        said("", reasoning_content="hm"),
        said("", reasoning="!"),
        event(choices=[{"index": 0, "delta": {"content": "hi"}, "logprobs": {"content": [score]}}]),
        said("", tool_calls=[{"index": 0, "id": "a", "function": {"name": "f", "arguments": '{"x"'}}]),
        said("", tool_calls=[{"index": 0, "function": {"arguments": ": 1}"}}]),
        said("", tool_calls=[{"function": {"name": "g", "arguments": {"y": 2}}}]),
        said("", "tool_calls"),
        counted(9, 5, prompt_tokens_details={"cached_tokens": 4}),
        DONE,
    )
    pieces = await pieces_of(await against.submit(work(tools=[TOOL], logprobs=True, top_logprobs=1)))
    assert "".join(piece.reasoning for piece in pieces) == "hm!"
    assert "".join(piece.text for piece in pieces) == "hi"
    assert [score.token for piece in pieces for score in piece.scores] == ["hi"]
    calls = [(call.id, call.function.name, call.function.arguments) for call in pieces[-1].tool_calls]
    assert calls == [("a", "f", '{"x": 1}'), ("call_r1_2", "g", '{"y":2}')]
    assert (pieces[-1].finish_reason, pieces[-1].usage) == ("tool_calls", Usage(9, 5, 14, PromptDetails(4)))
    assert pieces[-1].notes == []


def calling(index: int | None, call_id: str | None, name: str | None, arguments: str) -> bytes:
    """An event with a part of a call."""
    return said("", tool_calls=[{"index": index, "id": call_id, "function": {"name": name, "arguments": arguments}}])


@pytest.mark.parametrize(
    "parts",
    [
        [(0, "a", "f", '{"x"'), (0, None, None, ": 1}"), (1, "b", "g", "{}")],
        [(1, "a", "f", '{"x": 1}'), (2, "b", "g", "{}")],
        [(0, "a", "f", '{"x": 1}'), (0, "b", "g", "{}")],
        [(0, "a", "f", '{"x": 1}'), (0, "b", "g", "{"), (0, "b", "", "}")],
        [(-1, "a", "f", '{"x": 1}'), (10**12, "b", "g", "{}")],
        [(0, "c", "f", '{"x"'), (0, "a", None, ": 1}"), (1, "b", "g", "")],
    ],
    ids=["as OpenAI", "from 1", "all 0", "all 0, in parts", "wild", "an id for each part, no arguments"],
)
async def test_calls_are_told_apart_however_the_server_numbers_them(
    server: OpenAIServer, against: OpenAIEngine, parts: list[tuple[int, str | None, str | None, str]]
) -> None:
    """Gemini's API numbers all calls 0; proxies of Anthropic's API number them with the text before them."""
    server.chat = answers(*(calling(*part) for part in parts), said("", "tool_calls"), counted(3, 9), DONE)
    _, last = await whole(against, tools=[TOOL])
    calls = [(call.id, call.function.name, call.function.arguments) for call in last.tool_calls]
    assert calls == [("a", "f", '{"x": 1}'), ("b", "g", "{}")]


async def test_null_is_read_as_left_out(server: OpenAIServer, against: OpenAIEngine) -> None:
    nothing = {"index": 0, "delta": None, "finish_reason": None}
    ended = {"index": 0, "delta": None, "logprobs": None, "finish_reason": "tool_calls"}
    part = {"index": 0, "id": None, "function": None}
    server.chat = answers(
        event(choices=[nothing], usage=None),
        said("a", tool_calls=None, reasoning_content=None),
        calling(0, "a", "f", "{"),
        said("", tool_calls=[part]),
        calling(0, None, None, "}"),
        event(choices=[ended], usage=None),
        counted(3, 2, prompt_tokens_details=None),
        DONE,
    )
    text, last = await whole(against, tools=[TOOL])
    calls = [(call.id, call.function.name, call.function.arguments) for call in last.tool_calls]
    assert (text, calls, last.usage) == ("a", [("a", "f", "{}")], Usage(3, 2, 5))


async def test_an_empty_reason_is_no_end(server: OpenAIServer, against: OpenAIEngine) -> None:
    server.chat = answers(said("a", ""), said("b", ""), said("", "length"), counted(3, 2), DONE)
    text, last = await whole(against)
    assert (text, last.finish_reason) == ("ab", "length")


PLAIN = ('```json\n{"name": ', '"f", "arguments"', ': {"x": 1}}\n', "```")


def plainly(*parts: str) -> Any:
    """A handler that answers with these parts of text."""
    return answers(*(said(part) for part in parts), said("", "stop"), counted(3, 9), DONE)


@pytest.mark.parametrize("more", [{}, {"tool_choice": "required"}])
async def test_a_call_that_the_model_writes_as_plain_text_is_a_call(
    server: OpenAIServer, against: OpenAIEngine, more: dict[str, Any]
) -> None:
    server.chat = plainly(*PLAIN)
    text, last = await whole(against, tools=[TOOL], **more)
    assert (text, last.finish_reason, last.usage) == ("", "tool_calls", Usage(3, 9, 12))
    assert [(call.function.name, call.function.arguments) for call in last.tool_calls] == [("f", '{"x": 1}')]
    assert last.notes == ["The model wrote its call of `f` as plain text. It is taken as a tool call."]


@pytest.mark.parametrize(
    "fields",
    [{}, {"tools": [TOOL], "tool_choice": "none"}, {"tools": [TOOL], "response_format": {"type": "json_object"}}],
)
async def test_plain_text_stays_text_where_it_can_be_no_call(
    server: OpenAIServer, against: OpenAIEngine, fields: dict[str, Any]
) -> None:
    server.chat = plainly(*PLAIN)
    text, last = await whole(against, **fields)
    assert (text, last.finish_reason, last.tool_calls) == ("".join(PLAIN), "stop", [])


@pytest.mark.parametrize("said_so", ['{"name": "g", "arguments": {}}', '{"name": "f", "arg', "Well, {}", "f"])
async def test_text_that_is_no_call_of_a_tool_comes_whole(
    server: OpenAIServer, against: OpenAIEngine, said_so: str
) -> None:
    server.chat = plainly(*said_so)
    text, last = await whole(against, tools=[TOOL])
    assert (text, last.finish_reason, last.tool_calls) == (said_so, "stop", [])


async def test_a_setting_leaves_plain_calls_as_they_are(server: OpenAIServer) -> None:
    server.chat = plainly(*PLAIN)
    async with OpenAIEngine(msgspec.structs.replace(CONFIG, plain_tool_calls=False), server.url) as engine:
        text, last = await whole(engine, tools=[TOOL])
    assert (text, last.tool_calls) == ("".join(PLAIN), [])


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        ({"logprobs": True}, "reports no log-probabilities"),
        ({"response_format": {"type": "json_object"}}, "ignored `response_format`"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "ignored `structured_outputs`"),
        ({"tools": [TOOL], "tool_choice": "required"}, "ignored `tool_choice`"),
        ({"ollama": {"options": {"num_ctx": 9}, "keep_alive": 5}}, "`keep_alive` has no effect"),
    ],
)
async def test_what_the_server_did_not_do_is_noted(
    server: OpenAIServer, against: OpenAIEngine, fields: dict[str, Any], note: str
) -> None:
    server.chat = answers(said("hi", "stop"), counted(3, 1), DONE)
    _, last = await whole(against, **fields)
    assert note in " ".join(last.notes)


async def test_a_choice_that_was_made_is_not_noted(server: OpenAIServer, against: OpenAIEngine) -> None:
    server.chat = answers(said("no", "stop"), counted(3, 1), DONE)
    _, last = await whole(against, structured_outputs={"choice": ["yes", "no"]})
    assert last.notes == []


@pytest.mark.parametrize(("reason", "stop"), [(".", "."), (2, ""), (None, "")])
async def test_the_stop_string_that_ended_an_answer_is_told(
    server: OpenAIServer, against: OpenAIEngine, reason: str | int | None, stop: str
) -> None:
    """vLLM tells it, or the number of the token that ended the answer."""
    ended = {"index": 0, "delta": {"content": "Paris"}, "finish_reason": "stop", "stop_reason": reason}
    server.chat = answers(said("It is "), event(choices=[ended]), counted(3, 2), DONE)
    text, last = await whole(against, stop=["."])
    assert (text, last.finish_reason, last.stop) == ("It is Paris", "stop", stop)


async def test_a_server_without_counts_gets_its_parts_counted(server: OpenAIServer, against: OpenAIEngine) -> None:
    server.chat = answers(said("a "), said("b", "length"), DONE)
    text, last = await whole(against)
    assert (text, last.finish_reason, last.usage) == ("a b", "length", Usage(0, 2, 2))
    assert "no token counts" in last.notes[0]


async def test_embeddings_come_in_the_order_of_the_texts(server: OpenAIServer) -> None:
    async def embed(connection: Connection) -> None:
        assert connection.path == "/v1/embeddings"
        data = [{"index": 1, "embedding": [2.0]}, {"index": 0, "embedding": [1.0]}]
        await connection.answer({"data": data, "usage": {"prompt_tokens": 4}})

    server.models, server.chat = [{"id": "good"}, {"id": "text-embedding-nomic"}], embed
    async with OpenAIEngine(CONFIG, server.url) as engine:
        assert engine.status().models == ["good"]
        assert engine.embedding_model(None) == "text-embedding-nomic"
        embedded = await engine.embed(EmbeddingRequest(["a", "b"], dimensions=1), "text-embedding-nomic")
        assert (embedded.vectors, embedded.prompt_tokens) == ([[1.0], [2.0]], 4)
        sent = {"model": "text-embedding-nomic", "input": ["a", "b"], "encoding_format": "float", "dimensions": 1}
        assert server.bodies == [sent]
        server.chat = lambda connection: connection.answer({"data": []})
        with pytest.raises(Misbehaved, match="0 embeddings for 1 texts"):
            await engine.embed(EmbeddingRequest("a"), "text-embedding-nomic")


@pytest.mark.parametrize("body", [{"detail": "Not Found"}, b"Not Found", b"404 page not found\n", b""])
async def test_a_server_without_embeddings_says_so(server: OpenAIServer, against: OpenAIEngine, body: Any) -> None:
    """vLLM has no such path beside a model that chats."""
    server.chat = lambda connection: connection.answer(body, 404)
    for _ in range(3):
        with pytest.raises(HeadraceError, match="does not support `POST /v1/embeddings`") as caught:
            await against.embed(EmbeddingRequest("a"), "good")
        assert caught.value.code is ErrorCode.UNSUPPORTED_PARAMETER
    assert against.status().state == "ready"


async def test_a_model_that_chats_makes_no_embeddings(engine: OpenAIEngine) -> None:
    """llama.cpp's server answers with status 501."""
    for _ in range(3):
        with pytest.raises(HeadraceError, match="does not support embeddings") as caught:
            await engine.embed(EmbeddingRequest("a"), engine.resolve(None))
        assert caught.value.code is ErrorCode.UNSUPPORTED_PARAMETER
    assert engine.status().state == "ready"


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"error": {"message": "no", "param": "top_k"}}, 400, ErrorCode.INVALID_REQUEST, "top_k"),
        ({"error": "top_p must be at most 1"}, 400, ErrorCode.INVALID_REQUEST, None),
        ({"detail": [{"loc": ["body"]}]}, 422, ErrorCode.INVALID_REQUEST, None),
        ({"error": {"message": "x is not supported"}}, 400, ErrorCode.UNSUPPORTED_PARAMETER, None),
        ({"error": {"message": "The model `x` does not exist."}}, 404, ErrorCode.MODEL_NOT_FOUND, None),
        (
            {"error": {"type": "exceed_context_size_error"}},
            400,
            ErrorCode.CONTEXT_LENGTH_EXCEEDED,
            None,
        ),
        ({"error": {"message": "maximum context length is 9"}}, 400, ErrorCode.CONTEXT_LENGTH_EXCEEDED, None),
        ({"error": {"message": "This server does not support x"}}, 501, ErrorCode.UNSUPPORTED_PARAMETER, None),
        ({"detail": "Not Found"}, 404, ErrorCode.UNSUPPORTED_PARAMETER, None),
    ],
)
async def test_a_refusal_is_the_requests_own_fault(
    server: OpenAIServer, against: OpenAIEngine, body: Any, status: int, code: ErrorCode, param: str | None
) -> None:
    server.chat = lambda connection: connection.answer(body, status)
    for _ in range(3):  # no number of them opens the breaker
        error = await failure_of(against)
        assert not isinstance(error, Misbehaved)
        assert (error.code, error.param) == (code, param)
        assert error.message.startswith(f"{server.url} refused the request: ")
    assert against.status().state == "ready"


FAILURES = {
    "error": lambda connection: connection.answer({"error": {"message": "out of memory"}}, 500),
    "key": lambda connection: connection.answer({"error": "bad key"}, 401),
    "no end": answers(said("half ")),
    "broken off": answers(said("half "), ends=False),
    "no JSON": answers(said("half "), b"data: <html>\n\n"),
    "error within": answers(said("half "), event(error={"message": "out of memory", "code": 500})),
    "shape": answers(said("half "), event(choices="?")),
    "nothing": answers(DONE),
    "empty reason": answers(said("half ", "")),
    "given up": answers(said("half "), said("", "abort"), counted(3, 1), DONE),
}


@pytest.mark.parametrize("chat", FAILURES.values(), ids=FAILURES.keys())
async def test_a_failure_leaves_another_attempt_even_where_a_text_was_seen(
    server: OpenAIServer, against: OpenAIEngine, chat: Any
) -> None:
    server.chat = chat
    assert isinstance(await failure_of(against, stream=True), Misbehaved)
    assert against.status().slots_used == 0


class Unreadable:
    """A reader that fails on every part."""

    timing = None

    def read(self, part: dict[str, Any]) -> Piece:
        raise KeyError(*part)


async def test_a_part_on_which_the_reader_fails_is_a_failure_of_the_server() -> None:
    async def parts() -> AsyncGenerator[dict[str, Any], None]:
        yield {"odd": 1}

    generation = ServerGeneration(
        "r1",
        Unreadable(),
        parts(),
        limit=16,
        parted=lambda _: None,
        failure=lambda error: Misbehaved(error.message),
        ended=lambda _: None,
    )
    with pytest.raises(Misbehaved, match=r"could not be read \(KeyError: 'odd'\)"):
        await generation.next()


@pytest.mark.parametrize(
    ("chat", "said"),
    [
        (lambda c: c.answer({"choices": [{"message": {"content": "whole"}}]}), "no stream of events: .*choices.*whole"),
        (lambda c: c.answer(b"<html>\n<p>log in</p></html>"), r"no stream of events: .*log in"),
        (lambda c: c.answer({}, 307, b"location: https://gpu-box/v1\r\n"), 'a redirect to "https://gpu-box/v1"'),
        (lambda c: c.answer({"error": {"message": "upstream broke"}}, 502), "upstream broke"),
        (lambda c: c.answer({"error": {"message": "upstream is slow"}}, 504), "upstream is slow"),
    ],
)
async def test_a_failed_attempt_names_what_the_server_said(
    server: OpenAIServer, against: OpenAIEngine, chat: Any, said: str
) -> None:
    server.chat = chat
    error = await failure_of(against)
    assert isinstance(error, Misbehaved)
    assert re.search(said, error.message)


async def test_a_busy_server_and_one_that_loads_have_done_nothing(server: OpenAIServer, against: OpenAIEngine) -> None:
    server.chat = lambda connection: connection.answer({"error": {"message": "Loading model", "code": 503}}, 503)
    error = await failure_of(against)
    assert error.code is ErrorCode.UNAVAILABLE
    assert "Loading model" in error.message


DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."


async def test_a_vllm_whose_engine_has_died_is_away(server: OpenAIServer, against: OpenAIEngine) -> None:
    """It answers until it ends itself. Only the call over which the engine died counts as an attempt."""
    error = {"message": DEAD, "type": "InternalServerError", "param": None, "code": 500}
    server.chat = answers(said("half "), event(error=error))
    assert isinstance(await failure_of(against), Misbehaved)
    server.chat = lambda connection: connection.answer({"error": error}, 500)
    failure = await failure_of(against)
    assert failure.code is ErrorCode.UNAVAILABLE
    assert DEAD.rstrip(".") in failure.message
    assert against.status().state == "down"


async def test_a_server_that_comes_back_is_found_again(server: OpenAIServer) -> None:
    server.lists = lambda connection: connection.answer({"error": {"message": "Loading model"}}, 503)
    async with OpenAIEngine(CONFIG, server.url) as engine:
        assert (engine.status().state, engine.status().reason) == ("down", "Loading model")
        server.lists = None
        await until(engine, lambda: engine.status().state == "ready")
        assert engine.status().models == ["good"]


async def test_a_closed_answer_disconnects(server: OpenAIServer, against: OpenAIEngine) -> None:
    gone = asyncio.Event()

    async def endless(connection: Connection) -> None:
        await connection.lines(said("a "))
        try:
            while True:
                await connection.lines_more(said("a "))
                await asyncio.sleep(0.01)
        except ConnectionError:
            gone.set()

    server.chat = endless
    generation = await against.submit(work())
    await generation.next()
    await generation.close()
    await asyncio.wait_for(gone.wait(), 30)
    assert against.status().slots_used == 0


# ---- going on with an answer -----------------------------------------------------------------------------------------


class Resumable:
    """Counts tokens as words, and answers with words. It leaves a turn open, or closes it, or refuses to count. A turn
    that is closed has four tokens around it, or `marks`.
    """

    def __init__(self, *words: str, opens: bool, counts: bool = True, marks: int = 4) -> None:
        self.words = words
        self.opens = opens
        self.counts = counts
        self.marks = marks

    async def __call__(self, connection: Connection) -> None:
        body = json.loads(connection.body)
        turns = body["messages"]
        open_turn = turns[-1]["content"] if turns[-1]["role"] == "assistant" else ""
        closed = len(turns) - 1 - bool(open_turn and self.opens)
        prompt = 10 + sum(len(turn["content"].split()) for turn in turns[1:]) + self.marks * closed
        if not body["stream"]:
            answer = ({"usage": {"prompt_tokens": prompt}},) if self.counts else ({"error": "no"}, 400)
            await connection.answer(*answer)
            return
        words = self.words[len(open_turn.split()) if self.opens else 0 :][: body["max_tokens"]]
        reason = "length" if len(words) == body["max_tokens"] else "stop"
        parts = [said(f"{word} ") for word in words]
        await connection.lines(*parts, said("", reason), counted(prompt, len(words)), DONE)
        await connection.end()


@pytest.mark.parametrize(
    ("opens", "counts", "calls"),
    [(True, True, 5), (False, True, 3), (True, False, 2)],
    ids=["open", "closed", "unknown"],
)
async def test_what_broke_off_goes_on_without_a_gap(
    server: OpenAIServer, against: OpenAIEngine, opens: bool, counts: bool, calls: int
) -> None:
    server.chat = Resumable("one", "two", "three", "four", opens=opens, counts=counts)
    rest, last = await whole(against, "one two ", max_tokens=9)
    assert (rest, last.finish_reason, last.usage) == ("three four ", "stop", Usage(10, 4, 14))
    assert len(server.bodies) == calls
    server.bodies.clear()
    rest, last = await whole(against, "one two ", max_tokens=3)
    assert (rest, last.finish_reason, last.usage) == ("three ", "length", Usage(10, 3, 13))
    assert len(server.bodies) < calls or not counts


async def test_a_server_that_counts_no_turns_is_asked_anew(server: OpenAIServer, against: OpenAIEngine) -> None:
    server.chat = Resumable("one", "two", opens=False, marks=0)
    rest, last = await whole(against, "one ", max_tokens=9)
    assert (rest, last.usage) == ("two ", Usage(10, 2, 12))


async def test_a_form_or_tools_begin_the_answer_anew(server: OpenAIServer, against: OpenAIEngine) -> None:
    server.chat = Resumable("one", "two", opens=True)
    rest, _ = await whole(against, "one ", response_format={"type": "json_object"})
    assert rest == "two "
    assert len(server.bodies) == 1


@pytest.mark.parametrize("words", [("one", "zwei"), ("one",)])
async def test_another_text_than_the_client_has_ends_the_request(
    server: OpenAIServer, against: OpenAIEngine, words: tuple[str, ...]
) -> None:
    server.chat = Resumable(*words, opens=False)
    error = await failure_of(against, "one two ")
    assert error.code is ErrorCode.ENGINE_FAILED
    assert not isinstance(error, Misbehaved)
    assert against.status().state == "ready"


@pytest.mark.parametrize(
    ("anew", "rest"),
    [(("hm", ", so", "."), "."), (("hm, so.", " 4"), ". 4"), (("hm,", " no."), "\n\nhm, no."), (("hm",), "")],
    ids=["parts", "beyond", "other thoughts", "less"],
)
async def test_thoughts_that_the_client_has_are_not_repeated(
    server: OpenAIServer, against: OpenAIEngine, anew: tuple[str, ...], rest: str
) -> None:
    """The attempt before broke off in them, and the server begins again."""
    server.chat = answers(*(said("", reasoning_content=part) for part in anew), said("4", "stop"), counted(3, 9), DONE)
    pieces = await pieces_of(await against.submit(msgspec.structs.replace(work(), resume_reasoning="hm, so")))
    assert "".join(piece.reasoning for piece in pieces) == rest
    assert "".join(piece.text for piece in pieces) == "4"


# ---- the URL ---------------------------------------------------------------------------------------------------------


def test_a_url_that_is_none_is_refused() -> None:
    for url in ("ftp://x", "http://", "http://u:secret@x", "http://x?y"):
        with pytest.raises(ConfigError) as caught:
            OpenAIEngine(CONFIG, url)
        assert "secret" not in str(caught.value)

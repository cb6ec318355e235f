"""Ollama's dialect against recorded shapes: what its server answers, field by field."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from ollama import ChatResponse, EmbedResponse, GenerateResponse, ListResponse, ProcessResponse, ShowResponse

from pipeline.gateway.dialects import ollama
from pipeline.gateway.dialects.shapes import Asked
from pipeline.wire.answers import ErrorBody
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import ModelFacts
from pipeline.wire.requests import NO_LIMIT
from tests.pipeline.gateway.answers import (
    CALL_PARTS,
    CHUNKS,
    COMPLETION,
    CUT_OFF,
    EMBEDDINGS,
    LAST_CHUNK,
    SCORED_CHOICE,
    SCORED_CHUNK,
    TOOL_CHUNK,
    TOOL_COMPLETION,
)

LIMIT = 1 << 20
AT = "2023-11-14T22:13:20Z"  # the answers' `created`
TIMINGS = {
    "total_duration": 30_000_000,
    "load_duration": 2_000_000,
    "prompt_eval_count": 3,
    "prompt_eval_duration": 8_000_000,
    "eval_count": 2,
    "eval_duration": 20_000_000,
}


def read(body: dict[str, Any], *, chat: bool = True, listed: tuple[str, ...] = ()) -> Asked:
    reader = ollama.read_chat if chat else ollama.read_generate
    asked = reader(json.dumps(body).encode(), LIMIT, listed)
    assert isinstance(asked, Asked)
    return asked


def without_account(line: bytes) -> dict[str, Any]:
    fields = json.loads(line)
    assert fields.pop("headrace")["engine"] == "mlx"
    return fields


def test_a_chat_with_everything_in_it_becomes_a_request():
    asked = read(
        {
            "model": "demo",
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "weather?"},
                {"role": "assistant", "tool_calls": [{"function": {"name": "get", "arguments": {"city": "Paris"}}}]},
                {"role": "tool", "tool_name": "get", "content": "rain"},
            ],
            "tools": [{"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}],
            "options": {"temperature": 0.5, "num_predict": 9, "seed": 7, "stop": ["\n", ""], "top_k": 5, "num_ctx": 99},
            "format": {"type": "object"},
            "keep_alive": "5m",
        }
    )
    assert json.loads(asked.body) == {
        "model": "demo",
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "weather?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "call_0", "function": {"name": "get", "arguments": '{"city":"Paris"}'}}],
            },
            {"role": "tool", "content": "rain", "name": "get"},
        ],
        "tools": [{"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}],
        "temperature": 0.5,
        "max_tokens": 9,
        "seed": 7,
        "stop": ["\n"],
        "top_k": 5,
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
        "ollama": {"options": {"num_ctx": 99}, "keep_alive": "5m"},
        "stream": True,
    }


def test_null_for_a_model_means_any():
    assert read({"model": None, "messages": [{"role": "user", "content": "hi"}]}).request.wanted_model is None
    assert read({"model": None, "prompt": "hi"}, chat=False).request.wanted_model is None
    assert ollama.read_show(b'{"model": null, "name": "demo"}') == "demo"
    with pytest.raises(HeadraceError, match="`model` is required"):
        ollama.read_show(b'{"model": null, "name": null}')


def test_it_streams_unless_told_otherwise():
    message = [{"role": "user", "content": "x"}]
    assert read({"messages": message}).stream
    assert not read({"messages": message, "stream": False}).stream


def test_no_limit_is_passed_on_and_no_seed_is_not():
    options = {"num_predict": -1, "seed": -1, "stop": [], "temperature": None}
    body = json.loads(read({"prompt": "x", "options": options}, chat=False).body)
    messages = [{"role": "user", "content": "x"}]
    assert body == {"messages": messages, "max_tokens": NO_LIMIT, "stop": [], "stream": True}


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"num_predict": 5.0, "seed": 7.0, "top_k": 3.0}, {"max_tokens": 5, "seed": 7, "top_k": 3}),
        ({"num_predict": 0, "top_k": -1}, {"max_tokens": NO_LIMIT, "top_k": 0}),
    ],
)
def test_options_are_read_as_ollama_reads_them(options: dict[str, Any], fields: dict[str, Any]):
    body = json.loads(read({"prompt": "x", "options": options}, chat=False).body)
    assert body == {"messages": [{"role": "user", "content": "x"}], "stream": True, **fields}


def test_the_tag_that_ollama_adds_is_taken_off_where_no_such_model_is_listed():
    listed = ("demo", "mini:latest")
    named = {"demo:latest": "demo", "demo": "demo", "mini:latest": "mini:latest", "other:latest": "other:latest"}
    for given, expected in named.items():
        asked = read({"model": given, "prompt": "x"}, chat=False, listed=listed)
        assert json.loads(asked.body)["model"] == expected
        answer = msgspec.structs.replace(COMPLETION, model=expected)
        assert json.loads(asked.shape.whole(answer))["model"] == given


def test_an_answer_names_the_model_that_wrote_it_where_another_one_was_asked_for():
    shape = read({"model": "mlx-big", "prompt": "x"}, chat=False).shape
    assert json.loads(shape.whole(msgspec.structs.replace(COMPLETION, model="big:8b")))["model"] == "big:8b"


def test_a_chat_streams_in_ollamas_shape():
    shape = read({"model": "headrace-demo:latest", "messages": [{"role": "user", "content": "x"}]}).shape
    first, second = [json.loads(shape.part(chunk)) for chunk in CHUNKS]
    assert first == {
        "model": "headrace-demo:latest",
        "created_at": AT,
        "message": {"role": "assistant", "content": "Hello"},
        "done": False,
    }
    assert second["message"]["content"] == " there"
    assert shape.part(LAST_CHUNK) == b""
    last = shape.end(COMPLETION)
    assert last.endswith(b"}\n")
    assert without_account(last) == {
        "model": "headrace-demo:latest",
        "created_at": AT,
        "message": {"role": "assistant", "content": ""},
        "done": True,
        "done_reason": "stop",
        **TIMINGS,
    }
    ChatResponse.model_validate_json(last)


def test_a_generated_text_has_ollamas_shape():
    shape = read({"model": "headrace-demo:latest", "prompt": "x", "system": "be brief"}, chat=False).shape
    assert json.loads(shape.part(CHUNKS[0])) == {
        "model": "headrace-demo:latest",
        "created_at": AT,
        "response": "Hello",
        "done": False,
    }
    whole = shape.whole(CUT_OFF)
    assert without_account(whole) == {
        "model": "headrace-demo:latest",
        "created_at": AT,
        "response": "Hello there",
        "done": True,
        "done_reason": "length",
        **TIMINGS,
    }
    assert GenerateResponse.model_validate_json(whole).eval_count == 2


def test_tool_calls_have_their_arguments_as_an_object():
    shape = ollama.OllamaChat("demo")
    for line in (shape.part(TOOL_CHUNK), shape.whole(TOOL_COMPLETION)):
        [call] = json.loads(line)["message"]["tool_calls"]
        assert call["function"] == {"index": 0, "name": "get_weather", "arguments": {"city": "Paris"}}
    assert ChatResponse.model_validate_json(shape.whole(TOOL_COMPLETION)).message.tool_calls[0].function.arguments == {
        "city": "Paris"
    }


def test_the_parts_of_a_call_come_as_one_call():
    shape = ollama.OllamaChat("demo")
    lines = [shape.part(chunk) for chunk in CALL_PARTS]
    assert lines[:2] == [b"", b""]
    calls = [json.loads(line)["message"]["tool_calls"] for line in lines[2:]]
    functions = [[call["function"] for call in of_line] for of_line in calls]
    assert functions == [
        [{"index": 0, "name": "get_weather", "arguments": {"city": "Paris"}}],
        [{"index": 1, "name": "get_weather", "arguments": {"arguments": "[1]"}}],
    ]


@pytest.mark.parametrize(("keep_alive", "reason"), [(None, "load"), ("5m", "load"), (0, "unload"), ("0s", "unload")])
def test_a_request_for_nothing_asks_for_the_model(keep_alive: Any, reason: str):
    body = json.dumps({"model": "demo", "keep_alive": keep_alive}).encode()
    chat, text = ollama.read_chat(body, LIMIT), ollama.read_generate(body, LIMIT)
    assert isinstance(chat, ollama.Loaded)
    assert isinstance(text, ollama.Loaded)
    expected = {"model": "demo", "created_at": AT, "done": True, "done_reason": reason}
    assert json.loads(chat.body(1700000000)) == {**expected, "message": {"role": "assistant", "content": ""}}
    assert json.loads(text.body(1700000000)) == {**expected, "response": ""}


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"images": ["not base64"]}, ErrorCode.INVALID_REQUEST),
        ({"context": ["a"]}, ErrorCode.INVALID_REQUEST),
        ({"top_logprobs": 21}, ErrorCode.INVALID_REQUEST),
        ({"options": {"num_ctx": {}}}, ErrorCode.INVALID_REQUEST),
        ({"format": "xml"}, ErrorCode.INVALID_REQUEST),
        ({"options": {"temperature": "hot"}}, ErrorCode.INVALID_REQUEST),
        ({"options": []}, ErrorCode.INVALID_REQUEST),
        ({"prompt": 7}, ErrorCode.INVALID_REQUEST),
    ],
    ids=lambda value: value if isinstance(value, str) else json.dumps(value),
)
def test_what_cannot_be_honoured_is_refused(fields: dict[str, Any], code: ErrorCode):
    with pytest.raises(HeadraceError) as caught:
        read({"model": "demo", "prompt": "x", **fields}, chat=False)
    assert caught.value.code is code


def test_what_changes_nothing_is_accepted():
    read({"prompt": "x", "images": [], "suffix": "", "raw": False, "think": False, "format": "", "new": 1}, chat=False)


def test_an_error_has_ollamas_envelope():
    error = ErrorBody.of(HeadraceError(ErrorCode.MODEL_NOT_FOUND, "no such model"))
    assert json.loads(ollama.OllamaChat().error(error)) == {"error": "no such model", "code": "model_not_found"}
    assert ollama.OllamaChat().error_part(error).endswith(b"}\n")


def test_lists_are_what_ollamas_client_reads():
    facts = {
        "demo": ModelFacts(loaded=True),
        "mini:latest": ModelFacts(
            ["completion", "tools"], 4096, "qwen3", size_bytes=7, digest="d", parameter_size="1B"
        ),
    }
    tags = ListResponse.model_validate(ollama.tags(facts, since=1700000000))
    assert [(entry.model, entry.size) for entry in tags.models] == [("demo", 0), ("mini:latest", 7)]
    assert tags.models[1].digest == "d" != tags.models[0].digest
    ps = ProcessResponse.model_validate(ollama.ps(facts, now=1700000000))
    assert [entry.name for entry in ps.models] == ["demo"]
    shown = ShowResponse.model_validate(ollama.show("mini:latest", facts["mini:latest"], since=1700000000))
    assert shown.capabilities == ["completion", "tools"]
    assert shown.modelinfo["qwen3.context_length"] == 4096
    assert shown.details.parameter_size == "1B"


def test_what_is_in_memory_has_its_size_and_its_end_and_what_is_being_loaded_its_progress():
    facts = {
        "kept": ModelFacts(loaded=True, size_bytes=7, memory_bytes=70),
        "idle": ModelFacts(loaded=True, size_bytes=8, expires_at=1700000060.0),
        "name": ModelFacts(loaded=True, alias_of="kept"),
        "coming": ModelFacts(size_bytes=100, loading_bytes=40, loading_since=1699999998.0),
        "stored": ModelFacts(size_bytes=9),
    }
    ps = ollama.ps(facts, now=1700000000)
    shown = ProcessResponse.model_validate(ps).models
    assert [(each.name, each.size, each.details.parent_model) for each in shown] == [
        ("kept", 70, ""),
        ("idle", 8, ""),
        ("name", 0, "kept"),
    ]
    assert shown[0].expires_at.year > 2200
    assert shown[1].expires_at.timestamp() == 1700000060
    assert ps["loading"] == [{"model": "coming", "done_bytes": 40, "total_bytes": 100, "seconds": 2.0}]


def test_what_only_ollama_has_is_carried():
    given = {"raw": True, "template": "T", "context": [1, 2], "suffix": "end", "images": ["aGk="], "think": "high"}
    body = json.loads(read({"prompt": "x", **given, "keep_alive": 0, "options": {"mirostat": 2}}, chat=False).body)
    parts = body["messages"][0]["content"]
    assert parts == [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": "data:image/png;base64,aGk="}]
    assert body["ollama"] == {
        "options": {"mirostat": 2},
        "keep_alive": 0,
        "raw": True,
        "template": "T",
        "context": [1, 2],
    }
    assert (body["suffix"], body["think"]) == ("end", "high")


@pytest.mark.parametrize(
    ("given", "meant"), [({"a": 1}, '{"a":1}'), ('{"a":', '{"a":'), (None, "{}"), ("", ""), ({}, "{}"), ([1], "[1]")]
)
def test_arguments_of_an_earlier_call_are_kept_as_they_are(given: Any, meant: str):
    call = {"id": None, "function": {"name": "f", "arguments": given, "index": None}}
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
    assert read({"messages": turns}).request.chat[1].tool_calls[0].function.arguments == meant


def test_an_unknown_option_is_carried_if_ollama_could_read_it():
    options = {"new": 1, "newer": {"a": 1}, "num_ctx": 5.0}
    asked = read({"prompt": "x", "options": options, "top_logprobs": 3.0}, chat=False)
    assert asked.request.ollama.options == {"new": 1, "num_ctx": 5.0}
    assert asked.request.alternatives == 3


def test_thinking_and_scores_have_ollamas_shape():
    completion = msgspec.structs.replace(COMPLETION, choices=[SCORED_CHOICE])
    chat = ChatResponse.model_validate_json(ollama.OllamaChat().whole(completion))
    assert (chat.message.thinking, chat.message.content) == ("Hm.", "Hi")
    assert [(score.token, score.logprob) for score in chat.logprobs] == [("Hi", -0.5)]
    text = GenerateResponse.model_validate_json(ollama.OllamaGenerate().whole(completion))
    assert (text.thinking, text.response, text.logprobs[0].top_logprobs[0].token) == ("Hm.", "Hi", "Ho")
    part = json.loads(ollama.OllamaChat().part(SCORED_CHUNK))
    assert part["message"] == {"role": "assistant", "content": "", "thinking": "Hm."}
    assert part["logprobs"][0]["bytes"] == [72, 105]


# ---- embeddings


def test_texts_to_embed_become_a_request_and_a_response_of_vectors():
    body = {"model": "nomic-embed-text", "input": ["a", "b"], "truncate": False, "dimensions": 2.0, "keep_alive": "5m"}
    asked = ollama.read_embed(json.dumps(body).encode(), LIMIT, ["nomic-embed-text:latest"])
    assert json.loads(asked.body) == {
        "model": "nomic-embed-text:latest",
        "input": ["a", "b"],
        "truncate": False,
        "dimensions": 2,
        "ollama": {"keep_alive": "5m"},
    }
    assert not asked.stream
    data = asked.shape.whole(EMBEDDINGS)
    assert without_account(data) == {
        "model": "nomic-embed-text",
        "embeddings": [[0.5, -0.25], [1.0, 0.0]],
        "total_duration": 30_000_000,
        "load_duration": 2_000_000,
        "prompt_eval_count": 4,
    }
    read = EmbedResponse.model_validate_json(data)
    assert read.embeddings == [[0.5, -0.25], [1.0, 0.0]]


def test_the_older_call_embeds_one_text():
    asked = ollama.read_embedding(b'{"model": "e", "prompt": "a"}', LIMIT)
    assert json.loads(asked.body) == {"model": "e", "input": "a"}
    assert json.loads(asked.shape.whole(EMBEDDINGS)) == {"embedding": [0.5, -0.25]}


def test_no_text_to_embed_only_asks_for_the_model():
    none = b'{"model": "e", "input": [], "prompt": ""}'
    for read_, empty in (
        (ollama.read_embed, {"model": "e", "embeddings": []}),
        (ollama.read_embedding, {"embedding": []}),
    ):
        loaded = read_(none, LIMIT)
        assert (loaded.model, loaded.embeds) == ("e", True)
        assert json.loads(loaded.body(0)) == empty


def test_what_cannot_be_embedded_is_refused():
    for body in (b'{"input": 7}', b'{"input": "x", "dimensions": -1}', b"[]"):
        with pytest.raises(HeadraceError) as refusal:
            ollama.read_embed(body, LIMIT)
        assert refusal.value.code is ErrorCode.INVALID_REQUEST


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_predict": "many"}, '`options.num_predict` must be an integer, not "many".'),
        ({"repeat_penalty": -1}, "`options.repeat_penalty` must be a number above 0 and at most 10, not -1."),
        ({"stop": 5}, "`options.stop` must be a list of strings, not 5."),
    ],
)
def test_an_option_that_is_refused_has_the_name_that_the_client_used(options: dict[str, Any], sentence: str):
    with pytest.raises(HeadraceError) as refusal:
        read({"prompt": "x", "options": options}, chat=False)
    assert (refusal.value.code, refusal.value.message) == (ErrorCode.INVALID_REQUEST, sentence)


def test_a_single_stop_string_is_taken():
    assert json.loads(read({"prompt": "x", "options": {"stop": "a"}}, chat=False).body)["stop"] == ["a"]


def test_the_thinking_of_an_earlier_answer_is_carried():
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho", "thinking": "Hm."}]
    asked = ollama.read_chat(json.dumps({"model": "m", "messages": turns}).encode(), LIMIT)
    assert isinstance(asked, Asked)
    assert [turn.thought for turn in asked.request.chat] == ["", "Hm."]

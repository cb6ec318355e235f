"""Bodies for llama.cpp's server, and pieces from its events."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest

from consumers.engines.llamacpp.native import architecture, default_threads
from consumers.engines.llamacpp.wire import EventReader, call_of, refusal
from pipeline.engine import Misbehaved, Piece, Work
from pipeline.wire.answers import FunctionCall, ToolCall, Usage
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import ChatRequest
from tests import tiny_gguf

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def body(seed: int = 7, **fields: Any) -> dict[str, Any]:
    return call_of(Work("r1", msgspec.convert({"prompt": "x"} | fields, ChatRequest), "m", seed))[1]


def line(**event: Any) -> bytes:
    return b"data: " + json.dumps(event).encode()


def delta(finish: str | None = None, **fields: Any) -> bytes:
    return line(choices=[{"index": 0, "delta": fields, "finish_reason": finish}])


USAGE = line(choices=[], usage={"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8})


def pieces(*lines: bytes) -> list[Piece]:
    reader = EventReader("r1")
    return [piece for each in lines if (piece := reader.read(each)) is not None]


def test_each_parameter_has_the_servers_name():
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.2, "max_tokens": 9}
    given |= {"presence_penalty": 0.3, "frequency_penalty": 0.4, "stop": ["a", "b"]}
    sent = body(**given)
    assert sent["repeat_penalty"] == given.pop("repetition_penalty")
    assert {name: sent[name] for name in given} == given


def test_a_raw_prompt_is_a_completion_and_not_a_chat():
    request = msgspec.convert({"prompt": "Once", "raw": True, "max_tokens": 9}, ChatRequest)
    path, sent = call_of(Work("r1", request, "m", 7))
    assert (path, sent["prompt"], sent["max_tokens"]) == ("/v1/completions", "Once", 9)
    assert "messages" not in sent
    [first, last] = pieces(line(choices=[{"text": " upon", "finish_reason": "stop"}]), USAGE)
    assert (first.text, last.finish_reason) == (" upon", "stop")


def test_what_a_request_leaves_open_is_left_to_the_server():
    sent = body()
    assert not {"temperature", "top_p", "tools", "response_format"} & set(sent)
    assert (sent["max_tokens"], sent["stop"], sent["stream"]) == (-1, [], True)


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**40, 2**63 - 1])
def test_no_seed_is_the_one_that_draws_another(seed):
    assert 0 <= body(seed)["seed"] < 2**31


def test_turns_keep_roles_calls_and_results():
    call = {"id": "c1", "function": {"name": "f", "arguments": "{}"}}
    turns = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "4"},
    ]
    first, second, third = body(messages=turns)["messages"]
    assert first == {"role": "system", "content": "Be brief."}
    assert second["tool_calls"] == [call | {"type": "function"}]
    assert third == {"role": "tool", "content": "4", "tool_call_id": "c1"}


def test_tools_are_sent_unless_the_request_forbids_them():
    assert body(tools=[TOOL], tool_choice="required")["tool_choice"] == "required"
    assert body(tools=[TOOL])["tools"] == [TOOL]
    assert "tools" not in body(tools=[TOOL], tool_choice="none")


def test_the_last_piece_has_the_reason_and_the_counts():
    told = pieces(
        delta(role="assistant", content=None), delta(content="a"), b"", delta("length"), USAGE, b"data: [DONE]"
    )
    assert told == [Piece("a"), Piece(finish_reason="length", usage=Usage(3, 5, 8))]


def test_reasoning_is_apart_from_the_text():
    told = pieces(delta(reasoning_content="Hm"), delta(content="a"), delta("stop"), USAGE)
    assert [(piece.reasoning, piece.text) for piece in told] == [("Hm", ""), ("", "a"), ("", "")]


def test_tool_calls_come_whole_at_the_end():
    parts = [
        [{"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}}],
        [{"index": 0, "function": {"arguments": '{"a":'}}],
        [{"index": 1, "function": {"name": "g", "arguments": "{}"}}],
        [{"index": 0, "function": {"arguments": "1}"}}],
    ]
    (last,) = pieces(*(delta(tool_calls=part) for part in parts), delta("tool_calls"), USAGE)
    first = ToolCall(FunctionCall("f", '{"a":1}'), id="c1")
    assert last.tool_calls == [first, ToolCall(FunctionCall("g", "{}"), id="call_r1_2")]
    assert last.finish_reason == "tool_calls"


def test_only_steps_inside_a_prompt_are_signs_of_life():
    steps = [line(choices=[], prompt_progress={"total": 300, "processed": done}) for done in (0, 128, 256, 300)]
    assert pieces(*steps) == [Piece(), Piece()]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ({"code": 400, "type": "exceed_context_size_error"}, ErrorCode.CONTEXT_LENGTH_EXCEEDED),
        ({"code": 400, "type": "invalid_request_error"}, ErrorCode.INVALID_REQUEST),
        ({"code": 500, "type": "server_error"}, ErrorCode.ENGINE_FAILED),
    ],
)
def test_errors_before_and_inside_an_answer_have_the_same_code(error, code):
    told = {"error": error | {"message": "no"}}
    with pytest.raises(HeadraceError, match="no") as caught:
        pieces(line(**told))
    before = refusal(json.dumps(told).encode())
    assert (caught.value.code, isinstance(before, Misbehaved)) == (code, code is ErrorCode.ENGINE_FAILED)
    assert before.code is code


@pytest.mark.parametrize(
    "data", [b"data: {", b"data: []", b'data: {"choices":[{"delta":{"content":3}}]}', b"data: \xff"]
)
def test_what_is_not_the_servers_is_its_fault(data):
    with pytest.raises(Misbehaved):
        pieces(data)


def test_the_architecture_is_read_from_the_head_of_a_file(tmp_path: Path):
    assert architecture(tiny_gguf.write(tmp_path / "a.gguf")) == "llama"


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"GGUF",
        b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 2**60),
        b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 4) + b"name" * 9,
    ],
)
def test_another_head_has_no_architecture(tmp_path: Path, head: bytes):
    file = tmp_path / "b.gguf"
    file.write_bytes(head)
    assert architecture(file) == ""


def test_half_of_the_cores_and_at_least_one_compute():
    assert default_threads() >= 1

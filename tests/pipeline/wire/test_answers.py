"""The messages of an answer have the shapes of the protocol, and come back as they were sent."""

from __future__ import annotations

import json

import msgspec
import pytest

from pipeline.wire.answers import (
    Account,
    AssistantMessage,
    Choice,
    Chunk,
    ChunkChoice,
    Completion,
    Delta,
    ErrorAnswer,
    ErrorBody,
    FunctionCall,
    Status,
    ToolCall,
    ToolCallDelta,
    Usage,
    decode_answer,
    is_last,
    read_answer,
)
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import encode
from pipeline.wire.subjects import Priority, Task

ACCOUNT = Account("mlx", Priority.HIGH, Task.SIMPLE, 1, 1.0, 2.0, 3.0, spilled=False, reason="its turn")
CHUNK = Chunk("i", 1, "m", [ChunkChoice(Delta(role="assistant", content="Pa"), token_ids=[1, 2])], seq=0, attempt=1)
ENDING = Chunk("i", 1, "m", [ChunkChoice(Delta(), finish_reason="stop")], seq=1, attempt=1)
CALLING = Chunk("i", 1, "m", [ChunkChoice(Delta(tool_calls=[ToolCallDelta(0, "c", FunctionCall("f"))]))], 2, 1)
COMPLETION = Completion("i", 1, "m", [Choice(AssistantMessage("Paris"), "stop")], Usage(1, 2, 3), ACCOUNT)
STATUS = Status("i", "started", 1, "mlx", "m", 1, 2.5, "its turn")
FAILED = ErrorAnswer("i", 1, ErrorBody.of(HeadraceError(ErrorCode.QUEUE_FULL, "full", param="x")))


@pytest.mark.parametrize(
    "message",
    [STATUS, CHUNK, ENDING, CALLING, COMPLETION, FAILED],
    ids=["status", "chunk", "ending", "calling", "completion", "failed"],
)
def test_an_answer_comes_back_as_it_was_sent(message):
    assert decode_answer(encode(message)) == message
    assert is_last(message) is (message in (COMPLETION, FAILED))


def wire(message):
    return json.loads(encode(message))


def test_a_status_has_the_shape_of_the_protocol():
    found = wire(STATUS)
    assert found["object"] == "headrace.status"
    assert set(found) == {"object", "id", "state", "created", "engine", "model", "attempt", "queue_ms", "reason"}


def test_a_chunk_has_openais_shape_and_seq_and_attempt():
    found = wire(CHUNK)
    assert found["object"] == "chat.completion.chunk"
    assert set(found) == {"object", "id", "created", "model", "choices", "seq", "attempt"}
    assert found["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": "Pa"},
            "finish_reason": None,
            "token_ids": [1, 2],
        }
    ]
    assert wire(ENDING)["choices"][0]["delta"] == {}
    assert wire(ENDING)["choices"][0]["finish_reason"] == "stop"
    assert wire(CALLING)["choices"][0]["delta"]["tool_calls"] == [
        {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    ]


def test_a_completion_has_openais_shape_and_an_account_of_how_it_was_served():
    found = wire(COMPLETION)
    assert found["object"] == "chat.completion"
    assert set(found) == {"object", "id", "created", "model", "choices", "usage", "headrace"}
    choice = found["choices"][0]
    assert (choice["index"], choice["finish_reason"]) == (0, "stop")
    assert (choice["message"]["role"], choice["message"]["content"]) == ("assistant", "Paris")
    assert found["usage"] == {
        "prompt_tokens": 1,
        "completion_tokens": 2,
        "total_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert set(found["headrace"]) == {
        *("engine", "priority", "task", "attempts", "queue_ms", "ttft_ms", "total_ms", "spilled", "reason", "preempted")
    }


def test_a_completion_with_tool_calls_has_them_as_openai_has():
    message = AssistantMessage(None, tool_calls=[ToolCall(FunctionCall("f", '{"a":1}'), "c")])
    found = wire(Completion("i", 1, "m", [Choice(message, "tool_calls")], Usage(1, 2, 3), ACCOUNT))
    assert found["choices"][0]["message"] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}],
    }


def test_an_error_has_the_shape_of_the_protocol():
    found = wire(FAILED)
    assert (found["object"], set(found)) == ("error", {"object", "id", "created", "error"})
    assert found["error"] == {
        "code": "queue_full",
        "message": "full",
        "type": "rate_limit_error",
        "param": "x",
        "retryable": True,
    }


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"null", b'{"object": "thing"}', b'{"object": 5}', b"{"])
def test_what_is_no_answer_is_not_read_as_one(data):
    with pytest.raises(msgspec.DecodeError):
        decode_answer(data)


def test_fields_that_a_later_version_adds_are_ignored():
    body = wire(CHUNK) | {"system_fingerprint": "x", "new": {"a": [1]}}
    assert decode_answer(json.dumps(body).encode()) == CHUNK


@pytest.mark.parametrize("foreign", [b"", b"{", b"[]", '{"object": "é"}'.encode("latin-1")])
def test_what_is_no_part_of_an_answer_is_none(foreign):
    assert read_answer(foreign) is None

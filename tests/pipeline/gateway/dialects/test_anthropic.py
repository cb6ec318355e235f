"""Anthropic's dialect against recorded shapes: what its API answers, field by field."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from pipeline.gateway.dialects import anthropic
from pipeline.gateway.dialects.shapes import Asked
from pipeline.gateway.statuses import STATUS_OF
from pipeline.wire.answers import Chunk, Completion, ErrorBody
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import NO_LIMIT
from tests.pipeline.gateway.answers import (
    ACCOUNT,
    CALL_PARTS,
    CHUNKS,
    COMPLETION,
    CUT_IN_THOUGHT,
    CUT_OFF,
    PARTS_COMPLETION,
    THOUGHTFUL,
    THOUGHTFUL_CHUNKS,
    TOOL_CHUNK,
    TOOL_COMPLETION,
)

LIMIT = 1 << 20
HELLO = {"role": "user", "content": "hello"}
TOOL = {"name": "get_weather", "description": "Tells the weather", "input_schema": {"type": "object"}}
IMAGE_RESULT = {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image", "source": {}}]}
# The prompt has three tokens, one of which was cached.
USAGE = {"input_tokens": 2, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 1, "output_tokens": 2}


def read(**fields: Any) -> Asked:
    return anthropic.read_messages(json.dumps({"messages": [HELLO], **fields}).encode(), LIMIT)


def published(**fields: Any) -> dict[str, Any]:
    return json.loads(read(**fields).body)


def refused(**fields: Any) -> HeadraceError:
    with pytest.raises(HeadraceError) as caught:
        read(**fields)
    return caught.value


def events(data: bytes) -> list[dict[str, Any]]:
    """The events of a stream. The name of each is its type."""
    found = []
    for block in data.decode().split("\n\n")[:-1]:
        name, line = block.split("\n")
        event = json.loads(line.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


def streamed(chunks: list[Chunk], completion: Completion) -> list[dict[str, Any]]:
    shape = read(stream=True).shape
    return events(b"".join(shape.part(chunk) for chunk in chunks) + shape.end(completion))


def text(value: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": value, **more}


# ---- requests


def test_a_conversation_becomes_a_chats():
    call = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Paris"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [text("18"), text("degrees")]}
    turns = [
        HELLO,
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "x"}, text("A"), call]},
        {"role": "user", "content": [result, text("And?", cache_control={"type": "ephemeral"}), text("Now.")]},
    ]
    assert published(messages=turns, system=[text("Be kind."), text("Be brief.")])["messages"] == [
        {"role": "system", "content": "Be kind.\n\nBe brief."},
        HELLO,
        {
            "role": "assistant",
            "content": "A",
            "reasoning_content": "hm",
            "tool_calls": [{"id": "toolu_1", "function": {"name": "get_weather", "arguments": '{"city":"Paris"}'}}],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "18\n\ndegrees", "name": "get_weather"},
        {"role": "user", "content": "And?\n\nNow."},
    ]


def test_a_failed_tools_result_says_that_it_is_an_error():
    turns = [
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "5", "is_error": True}]}
    ]
    assert published(messages=turns)["messages"] == [{"role": "tool", "tool_call_id": "a", "content": "Error: 5"}]


@pytest.mark.parametrize(("given", "arguments"), [(None, "{}"), ("no json", "no json"), ({}, "{}")])
def test_arguments_in_the_history_are_taken_as_they_are(given: Any, arguments: str):
    call = {"type": "tool_use", "id": "a", "name": "f", "input": given}
    turn = published(messages=[HELLO, {"role": "assistant", "content": [call]}, HELLO])["messages"][1]
    assert turn["content"] is None
    assert turn["tool_calls"] == [{"id": "a", "function": {"name": "f", "arguments": arguments}}]


def test_texts_of_an_answer_are_joined_as_the_model_wrote_them():
    turns = [HELLO, {"role": "assistant", "content": [text("one "), text("two")]}, HELLO]
    assert published(messages=turns)["messages"][1]["content"] == "one two"


def test_an_answer_that_the_client_began_stays_at_the_end():
    begun = {"role": "assistant", "content": "The capital is "}
    assert published(messages=[HELLO, begun])["messages"][-1] == begun


def test_turns_of_one_role_are_one_and_the_system_reminds_in_the_users():
    turns = [
        {"role": "user", "content": [text("one")]},
        {"role": "system", "content": "Agents: none."},
        {"role": "assistant", "content": "two "},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": ""},
    ]
    assert published(messages=turns)["messages"] == [
        {"role": "user", "content": "one\n\n<system-reminder>\nAgents: none.\n</system-reminder>"},
        {"role": "assistant", "content": "two three"},
        {"role": "user", "content": ""},
    ]


def test_a_block_for_anthropics_accounts_is_not_read_by_the_model():
    billing = text("x-anthropic-billing-header: cc_version=1; cch=2;")
    assert published(system=[billing, text("S")])["messages"][0] == {"role": "system", "content": "S"}
    assert published(system=[billing])["messages"] == [HELLO]


def test_the_other_parameters_have_the_names_of_a_chat():
    given = {
        "model": "auto",
        "max_tokens": 32_000,
        "stop_sequences": ["END"],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "stream": True,
        "metadata": {"user_id": "me"},
        "thinking": {"type": "disabled"},
        "tools": [TOOL, {"name": "g", "type": "custom", "description": None}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    }
    assert published(**given) == {
        "messages": [HELLO],
        "model": "auto",
        "max_tokens": 32_000,
        "stop": ["END"],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "stream": True,
        "reasoning_effort": "none",
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "get_weather",
                    "description": "Tells the weather",
                    "parameters": {"type": "object"},
                },
            },
            {"type": "function", "function": {"name": "g", "parameters": {}}},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
    }
    assert read(**given).request.notes == []


@pytest.mark.parametrize(
    ("given", "effort"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "low"),
        ({"thinking": {"type": "enabled", "budget_tokens": 10_000.0}}, "medium"),
        ({"thinking": {"type": "enabled", "budget_tokens": 31_999}}, "high"),
        ({"thinking": {"type": "adaptive"}}, "medium"),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}}, "high"),
    ],
)
def test_thinking_is_carried_as_the_effort_of_a_chat(given: dict[str, Any], effort: str):
    assert published(**given)["reasoning_effort"] == effort
    assert read(**given).request.thinking == effort


def test_a_strict_tool_is_strict_in_a_chat():
    (tool,) = published(tools=[TOOL | {"strict": True}])["tools"]
    assert tool["function"]["strict"] is True
    (tool,) = read(tools=[TOOL | {"strict": True}]).request.tools
    assert tool.function.strict is True


def test_values_of_habit_are_taken_in_their_meaning():
    asked = read(max_tokens=-1, top_k=-1, stop_sequences=[""])
    assert (asked.request.token_limit, asked.request.stops) == (NO_LIMIT, [])
    assert len(asked.request.notes) == 3
    halved = b'\xef\xbb\xbf{"messages": [{"role": "user", "content": "\\ud83d hello"}]}'
    assert anthropic.read_messages(halved, LIMIT).request.chat[0].content == "\ufffd hello"


@pytest.mark.parametrize(
    ("given", "param", "words"),
    [
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "source": {"url": "https://a.example/b.png"}}]}
                ]
            },
            "messages",
            "not fetched",
        ),
        ({"messages": [{"role": "user", "content": [IMAGE_RESULT]}]}, "messages", '"image"'),
        ({"system": [{"type": "document"}]}, "system", '"document"'),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools", '"web_search_20250305"'),
        ({"mcp_servers": [{"url": "https://a.example"}]}, "mcp_servers", "not supported"),
        ({"container": "c"}, "container", "not supported"),
    ],
)
def test_what_no_engine_can_do_is_refused_by_name(given: dict[str, Any], param: str, words: str):
    error = refused(**given)
    assert (error.code, error.param) == (ErrorCode.UNSUPPORTED_PARAMETER, param)
    assert words in error.message


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        ({"temperature": -1}, "temperature"),
        ({"stop_sequences": ["x" * 300]}, "stop_sequences"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice"),
    ],
)
def test_a_value_that_is_not_valid_is_refused_by_its_name_here(given: dict[str, Any], param: str):
    error = refused(**given)
    assert (error.code, error.param) == (ErrorCode.INVALID_REQUEST, param)
    assert f"`{param}" in error.message


# ---- answers


def test_a_message_has_anthropics_shape():
    assert json.loads(read().shape.whole(COMPLETION)) == {
        "id": "req-1",
        "type": "message",
        "role": "assistant",
        "model": "headrace-demo",
        "content": [text("Hello there")],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": USAGE,
        "headrace": json.loads(msgspec.json.encode(ACCOUNT)),
    }
    assert json.loads(read().shape.whole(CUT_OFF))["stop_reason"] == "max_tokens"


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_sequence_that_ended_the_answer_is_named(stream: bool):
    choice = msgspec.structs.replace(COMPLETION.choices[0], stop_reason="END")
    completion = msgspec.structs.replace(COMPLETION, choices=[choice])
    ended = streamed(CHUNKS, completion)[-2]["delta"] if stream else json.loads(read().shape.whole(completion))
    assert (ended["stop_reason"], ended["stop_sequence"]) == ("stop_sequence", "END")


def test_a_stream_has_anthropics_events():
    assert [event for event in streamed(CHUNKS, COMPLETION) if event.pop("headrace", True)] == [
        {
            "type": "message_start",
            "message": {
                "id": "req-1",
                "type": "message",
                "role": "assistant",
                "model": "headrace-demo",
                "content": [],
                "stop_reason": None,
                "stop_sequence": None,
                "usage": {"input_tokens": 0, "output_tokens": 0},
            },
        },
        {"type": "content_block_start", "index": 0, "content_block": text("")},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hello"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": " there"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": USAGE},
        {"type": "message_stop"},
    ]


def test_tool_calls_are_blocks_of_their_own():
    use = {"type": "tool_use", "id": "call_1", "name": "get_weather"}
    whole = json.loads(read().shape.whole(TOOL_COMPLETION))
    assert (whole["stop_reason"], whole["content"]) == ("tool_use", [use | {"input": {"city": "Paris"}}])
    _, *blocks, ended, _ = streamed([CHUNKS[0], TOOL_CHUNK], TOOL_COMPLETION)
    assert blocks == [
        {"type": "content_block_start", "index": 0, "content_block": text("")},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hello"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "content_block_start", "index": 1, "content_block": use | {"input": {}}},
        {
            "type": "content_block_delta",
            "index": 1,
            "delta": {"type": "input_json_delta", "partial_json": '{"city":"Paris"}'},
        },
        {"type": "content_block_stop", "index": 1},
    ]
    assert ended["delta"]["stop_reason"] == "tool_use"


def test_the_parts_of_a_call_are_deltas_of_its_block():
    _, *blocks, _, _ = streamed(CALL_PARTS, PARTS_COMPLETION)
    use = {"type": "tool_use", "name": "get_weather", "input": {}}
    deltas = [event["delta"]["partial_json"] for event in blocks if event["type"] == "content_block_delta"]
    # Arguments that are no object cannot be Anthropic's: they come whole, in one.
    assert deltas == ['{"city":', '"Paris"}', '{"arguments":"[1]"}']
    opened = [event["content_block"] for event in blocks if event["type"] == "content_block_start"]
    assert opened == [{"id": "call_1"} | use, {"id": "call_2"} | use]
    assert [event["index"] for event in blocks] == [0, 0, 0, 0, 1, 1, 1]
    assert blocks[-1]["type"] == "content_block_stop"


@pytest.mark.parametrize("code", ErrorCode)
def test_every_error_has_a_type_of_anthropics(code: ErrorCode):
    known = {
        400: "invalid_request_error",
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
        499: "api_error",
        502: "api_error",
        503: "api_error",
        504: "timeout_error",
    }
    body = json.loads(anthropic.error_body(ErrorBody.of(HeadraceError(code, "why", param="p")), "req-1"))
    kind = "overloaded_error" if code is ErrorCode.QUEUE_FULL else known[STATUS_OF[code]]
    message = "prompt is too long: why" if code is ErrorCode.CONTEXT_LENGTH_EXCEEDED else "why"
    assert body == {
        "type": "error",
        "error": {"type": kind, "message": message, "code": code, "param": "p"},
        "request_id": "req-1",
    }


def test_an_error_in_a_stream_is_an_event():
    shape = read(stream=True).shape
    shape.request_id = "req-1"
    error = ErrorBody.of(HeadraceError(ErrorCode.ENGINE_FAILED, "why"))
    assert [event["request_id"] for event in events(shape.error_part(error))] == ["req-1"]


# ---- thinking


def test_thinking_is_a_block_before_the_text():
    content = json.loads(anthropic.AnthropicMessages().whole(THOUGHTFUL))["content"]
    assert content[0].pop("signature")
    assert content == [{"type": "thinking", "thinking": "Hm. Two"}, {"type": "text", "text": "Four"}]
    turn = published(messages=[HELLO, {"role": "assistant", "content": content}, HELLO])["messages"][1]
    assert turn == {"role": "assistant", "content": "Four", "reasoning_content": "Hm. Two"}


def test_thinking_is_streamed_in_a_block_with_a_signature_at_its_end():
    found = streamed(THOUGHTFUL_CHUNKS, THOUGHTFUL)
    assert [event["type"] for event in found] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert found[1]["content_block"] == {"type": "thinking", "thinking": "", "signature": ""}
    assert [event["delta"]["type"] for event in found[2:5]] == ["thinking_delta", "thinking_delta", "signature_delta"]
    assert "".join(event["delta"]["thinking"] for event in found[2:4]) == "Hm. Two"
    assert [event["index"] for event in found[1:10]] == [0] * 5 + [1] * 4


def test_an_answer_cut_off_in_its_thinking_has_no_text():
    message = json.loads(anthropic.AnthropicMessages().whole(CUT_IN_THOUGHT))
    assert [block["type"] for block in message["content"]] == ["thinking"]
    assert message["stop_reason"] == "max_tokens"


def test_notes_and_errors_about_thinking_name_it_as_it_is_here():
    account = msgspec.structs.replace(THOUGHTFUL.headrace, notes=["`reasoning_effort` has no effect on this model."])
    completion = msgspec.structs.replace(THOUGHTFUL, headrace=account)
    body = json.loads(anthropic.AnthropicMessages().whole(completion))
    assert body["headrace"]["notes"] == ["`thinking` has no effect on this model."]
    error = HeadraceError(ErrorCode.UNSUPPORTED_PARAMETER, "Leave out `reasoning_effort`.", param="reasoning_effort")
    told = json.loads(anthropic.AnthropicMessages().error(ErrorBody.of(error)))["error"]
    assert (told["message"], told["param"]) == ("Leave out `thinking`.", "thinking")

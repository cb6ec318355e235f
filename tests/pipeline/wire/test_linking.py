"""Results of tools find their calls in histories without ids."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.gateway.dialects import ollama
from pipeline.wire.decoding import decode_chat
from pipeline.wire.requests import ChatRequest

USER = {"role": "user", "content": "a"}


def call(name: str, call_id: str | None = None) -> dict[str, Any]:
    return {"id": call_id, "function": {"name": name, "arguments": "{}"}}


def calls(*made: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": list(made)}


def result(**fields: Any) -> dict[str, Any]:
    return {"role": "tool", "content": "x", **fields}


def decoded(*messages: dict[str, Any]) -> ChatRequest:
    return decode_chat(json.dumps({"messages": [USER, *messages]}).encode(), max_body_bytes=1 << 20)


def links(request: ChatRequest) -> list[tuple[str | None, str | None]]:
    """For each result, the name of its call, and its own."""
    names = {each.id: each.function.name for message in request.chat for each in message.tool_calls or ()}
    return [(names.get(message.tool_call_id or ""), message.name) for message in request.chat if message.role == "tool"]


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ([calls(call("f"), call("g")), result(name="g"), result(name="f")], [("g", "g"), ("f", "f")]),
        ([calls(call("f"), call("g")), result(), result(tool_call_id="")], [("f", "f"), ("g", "g")]),
        ([calls(call("f"), call("f")), result(name="f"), result(name="f")], [("f", "f"), ("f", "f")]),
        ([calls(call("f")), result(), calls(call("g")), result()], [("f", "f"), ("g", "g")]),
        ([calls(call("f", "1"), call("g", "2")), result(tool_call_id="2"), result()], [("g", None), ("f", "f")]),
        ([calls(call("f", "1")), result(tool_call_id="1")], [("f", None)]),
        ([calls(call("f", "1")), result(tool_call_id="9")], [(None, None)]),
        ([calls(call("f")), result(name="h")], [(None, "h")]),
        ([result(name="f")], [(None, "f")]),
    ],
)
def test_a_result_without_an_id_has_that_of_its_call(messages, found):
    assert links(decoded(*messages)) == found


def test_no_two_calls_without_an_id_share_one():
    request = decoded(calls(call("f"), call("f")), result(), result(), calls(call("f")), result())
    ids = [each.id for message in request.chat for each in message.tool_calls or ()]
    assert len(set(ids)) == 3
    assert [message.tool_call_id for message in request.chat if message.role == "tool"] == ids


def test_a_conversation_of_ollamas_has_ids():
    turn = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    messages = [USER, turn, {"role": "tool", "tool_name": "f", "content": "x"}]
    asked = ollama.read_chat(json.dumps({"messages": messages}).encode(), 1 << 20)
    assert isinstance(asked, ollama.Asked)
    assert links(asked.request) == [("f", "f")]

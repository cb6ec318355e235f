"""A model that calls tools, through `headrace up`: its calls in each dialect, whole and streamed, and the next turn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import httpx
import pytest

from tests.consumers.engines import families
from tests.consumers.engines.families import Family
from tests.e2e.conftest import Pipeline, running

pytest.importorskip("mlx_lm", reason="MLX is not installed")

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
FUNCTION = {"name": "get_weather", "description": "The weather.", "parameters": PARAMETERS}
ARGUMENTS = {"city": 'Paris – "Ville"', "days": 3}
THOUGHT, FINE = "I look it up.", "The weather is fine."
ONE, TWO, AFTER, ALONE = range(4)
_CALL = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\n{}\n</parameter>\n<parameter=days>\n3\n"
    "</parameter>\n</function>\n</tool_call>"
)
CALL = _CALL.format(ARGUMENTS["city"])
SCRIPTS = [
    f"{THOUGHT}\n</think>\n\n{CALL}",
    f"{THOUGHT}\n</think>\n\n{CALL}\n{_CALL.format('Oslo')}",
    f"\n</think>\n\n{FINE}",
    '\n</think>\n\n```json\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n```',
]
PATHS = ("/v1/chat/completions", "/v1/responses", "/v1/messages", "/api/chat")


class Told(NamedTuple):
    """What an answer has: reasoning, text, calls (id, name, arguments), the parts of arguments, and the notes."""

    reasoning: str
    text: str
    calls: list[tuple[str, str, Any]]
    parts: int
    notes: list[str]


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with (
        served(families.QWEN35, SCRIPTS, tmp_path_factory) as pipeline,
        httpx.Client(base_url=pipeline.http, timeout=100) as client,
    ):
        yield client


def served(family: Family, scripts: list[str], folders: pytest.TempPathFactory) -> AbstractContextManager[Pipeline]:
    folder = family.write(folders.mktemp("model") / family.name, scripts)
    environ = {"PYTHONPATH": families.scripted_path(), "HEADRACE_MODEL": str(folder)}
    return running(folders.mktemp("tools"), environ=environ)


def body(path: str, script: int, *, stream: bool) -> dict[str, Any]:
    question = {"role": "user", "content": f"Play «{script}»."}
    tool: dict[str, Any] = {"type": "function", "function": FUNCTION}
    if path == "/v1/messages":
        tool = {"name": "get_weather", "description": "", "input_schema": PARAMETERS}
    elif path == "/v1/responses":
        tool = {"type": "function", **FUNCTION}
    turns = {"input" if path == "/v1/responses" else "messages": [question]}
    limit = {"max_output_tokens" if path == "/v1/responses" else "max_tokens": 1000}
    return {"model": "auto", "stream": stream, "tools": [tool]} | limit | turns


def with_results(path: str, asked: dict[str, Any], told: Told) -> dict[str, Any]:
    """The conversation after the calls: the same body with the calls and their results."""
    result = f"sunny «{AFTER}»"
    if path == "/v1/responses":
        items: list[dict[str, Any]] = [
            {"type": "function_call", "call_id": call_id, "name": name, "arguments": json.dumps(arguments)}
            for call_id, name, arguments in told.calls
        ]
        items += [{"type": "function_call_output", "call_id": call[0], "output": result} for call in told.calls]
        return asked | {"input": asked["input"] + items}
    if path == "/v1/messages":
        uses = [{"type": "tool_use", "id": i, "name": name, "input": args} for i, name, args in told.calls]
        results = [{"type": "tool_result", "tool_use_id": call[0], "content": result} for call in told.calls]
        turns = [{"role": "assistant", "content": uses}, {"role": "user", "content": results}]
        return asked | {"messages": asked["messages"] + turns}
    if path == "/api/chat":
        calls = [{"function": {"name": name, "arguments": arguments}} for _, name, arguments in told.calls]
        results = [{"role": "tool", "tool_name": name, "content": result} for _, name, _ in told.calls]
    else:
        calls = [
            {"id": i, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
            for i, name, arguments in told.calls
        ]
        results = [{"role": "tool", "tool_call_id": call[0], "content": result} for call in told.calls]
    turn = {"role": "assistant", "content": "", "tool_calls": calls}
    return asked | {"messages": [*asked["messages"], turn, *results]}


def ask(web: httpx.Client, path: str, asked: dict[str, Any]) -> Told:
    answer = web.post(path, json=asked)
    assert answer.status_code == 200, answer.text
    if not asked["stream"]:
        return whole(path, answer.json())
    if path == "/api/chat":
        return _ollama([json.loads(line) for line in answer.text.splitlines()])
    events = [
        json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ") and line[6:] != "[DONE]"
    ]
    return {"/v1/chat/completions": _chat, "/v1/responses": _responses, "/v1/messages": _messages}[path](events)


def whole(path: str, answer: dict[str, Any]) -> Told:
    """What a whole answer has."""
    if path == "/api/chat":
        return _ollama([answer])
    if path == "/v1/chat/completions":
        message = answer["choices"][0]["message"]
        calls = [
            (call["id"], call["function"]["name"], json.loads(call["function"]["arguments"]))
            for call in message["tool_calls"] or ()
        ]
        reasoning, text = message.get("reasoning_content") or "", message["content"] or ""
        return Told(reasoning, text, calls, 0, answer["headrace"].get("notes", []))
    if path == "/v1/responses":
        return _output(answer, 0)
    blocks = answer["content"]
    uses = [(one["id"], one["name"], one["input"]) for one in blocks if one["type"] == "tool_use"]
    texts = ["".join(one.get(kind, "") for one in blocks) for kind in ("thinking", "text")]
    return Told(*texts, uses, 0, answer["headrace"].get("notes", []))


def _chat(events: list[dict[str, Any]]) -> Told:
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    parts = [part for delta in deltas for part in delta.get("tool_calls") or ()]
    made: dict[int, list[str]] = {}
    for part in parts:
        if "id" in part:
            made[part["index"]] = [part["id"], part["function"]["name"], ""]
        made[part["index"]][2] += part["function"]["arguments"]
    calls = [(call_id, name, json.loads(arguments)) for call_id, name, arguments in made.values()]
    texts = ["".join(delta.get(name) or "" for delta in deltas) for name in ("reasoning_content", "content")]
    return Told(*texts, calls, len(parts), [])


def _responses(events: list[dict[str, Any]]) -> Told:
    parts = [event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta"]
    told = _output(events[-1]["response"], len(parts))
    assert "".join(parts) == "".join(
        item["arguments"] for item in events[-1]["response"]["output"] if item["type"] == "function_call"
    )
    return told


def _output(response: dict[str, Any], parts: int) -> Told:
    items = response["output"]
    calls = [
        (one["call_id"], one["name"], json.loads(one["arguments"])) for one in items if one["type"] == "function_call"
    ]
    reasoning, text = (
        "".join(one["content"][0]["text"] for one in items if one["type"] == kind) for kind in ("reasoning", "message")
    )
    return Told(reasoning, text, calls, parts, (response.get("headrace") or {}).get("notes", []))


def _messages(events: list[dict[str, Any]]) -> Told:
    begun = {event["index"]: event["content_block"] for event in events if event["type"] == "content_block_start"}
    deltas = [event for event in events if event["type"] == "content_block_delta"]
    parts = [event for event in deltas if event["delta"]["type"] == "input_json_delta"]
    calls = [
        (block["id"], block["name"], json.loads("".join(p["delta"]["partial_json"] for p in parts if p["index"] == at)))
        for at, block in begun.items()
        if block["type"] == "tool_use"
    ]
    texts = ["".join(event["delta"].get(kind, "") for event in deltas) for kind in ("thinking", "text")]
    (last,) = [event for event in events if event["type"] == "message_delta"]
    return Told(*texts, calls, len(parts), last["headrace"].get("notes", []))


def _ollama(lines: list[dict[str, Any]]) -> Told:
    turns = [line["message"] for line in lines]
    calls = [
        (call.get("id", ""), call["function"]["name"], call["function"]["arguments"])
        for turn in turns
        for call in turn.get("tool_calls") or ()
    ]
    texts = ["".join(turn.get(kind) or "" for turn in turns) for kind in ("thinking", "content")]
    return Told(*texts, calls, 0, lines[-1]["headrace"].get("notes", []))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_calls_reasoning_and_the_next_turn(web: httpx.Client, path: str, stream: bool) -> None:
    asked = body(path, ONE, stream=stream)
    one, two = ask(web, path, asked), ask(web, path, body(path, TWO, stream=stream))
    call = ("get_weather", ARGUMENTS)
    assert (one.reasoning, one.text, [made[1:] for made in one.calls]) == (THOUGHT, "", [call])
    assert [made[1:] for made in two.calls] == [call, ("get_weather", ARGUMENTS | {"city": "Oslo"})]
    if stream and path != "/api/chat":
        assert one.parts > 2
    for told in (one, two):
        answer = ask(web, path, with_results(path, asked, told))
        assert (answer.text, answer.calls) == (FINE, [])


@pytest.mark.parametrize("path", PATHS)
def test_a_call_without_marks_is_a_call_and_noted(web: httpx.Client, path: str) -> None:
    told = ask(web, path, body(path, ALONE, stream=False))
    assert (told.text, [made[1:] for made in told.calls]) == ("", [("get_weather", {"city": "Rome"})])
    assert told.notes == ["The model wrote its call of `get_weather` as plain text. It is taken as a tool call."]

"""What a server like Ollama may say: read as Ollama's own client reads it, or named in the error."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
import pytest

from consumers.engines.ollama import OllamaClient, OllamaEngine
from pipeline.config import Config
from pipeline.engine import CUT_IN_REASONING, Misbehaved, Piece, Work
from pipeline.wire.requests import ChatRequest
from tests.consumers.ollama_server import Connection, OllamaServer, ollama_server

LAST = {"message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "stop", "eval_count": 2}
NULLS = {"message": None, "done": True, "done_reason": None, "prompt_eval_count": None, "eval_count": None}
CONFIG = Config(ollama_timeout_s=60, ollama_load_timeout_s=60)
IMPATIENT = msgspec.structs.replace(CONFIG, ollama_timeout_s=0.3)


@pytest.fixture
async def ollama() -> AsyncIterator[OllamaServer]:
    async with ollama_server() as server:
        yield server


def said(text: str | None = "", **more: Any) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text, **more}, "done": False}


def calls(arguments: Any) -> dict[str, Any]:
    return said(tool_calls=[{"function": {"name": "now", "arguments": arguments}}])


def work() -> Work:
    return Work("r1", ChatRequest(prompt="x"), "good:latest", seed=7)


async def answer_of(config: Config, server: OllamaServer) -> Piece:
    """The whole answer of one request, as one piece."""
    async with OllamaEngine(config, server.url) as engine:
        generation = await engine.submit(work())
        whole = Piece()
        while whole.finish_reason is None:
            piece = await generation.next()
            whole.text += piece.text
            whole.tool_calls += piece.tool_calls
            whole.finish_reason, whole.usage, whole.notes = piece.finish_reason, piece.usage, piece.notes
        await generation.close()
        return whole


async def sends(server: OllamaServer, lines: Sequence[Any]) -> None:
    async def chat(connection: Connection) -> None:
        await connection.lines(*lines)
        await connection.end()

    server.chat = chat


def one_by_one(line: dict[str, Any]) -> list[bytes]:
    return [bytes([byte]) for byte in json.dumps(line, ensure_ascii=False).encode() + b"\n"]


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ([said(None), said("ok"), LAST | {"message": {"role": "assistant", "content": None}}], "ok"),
        ([said("ok"), NULLS], "ok"),
        ([b'{"message":{"content":"ok"}}\r\n', b"\r\n", json.dumps(LAST).encode() + b"\r\n"], "ok"),
        ([b'{"message":{"content":"ok"}}\n\n\n', LAST], "ok"),
        ([said("ok"), json.dumps(LAST).encode()], "ok"),
        ([json.dumps(said("a\u2028b\x85c\u2029d"), ensure_ascii=False).encode() + b"\n", LAST], "a\u2028b\x85c\u2029d"),
        ([*one_by_one(said("naïve ✓")), LAST], "naïve ✓"),
        ([said("x" * 3_000_000), LAST], "x" * 3_000_000),
    ],
    ids=["content null", "nulls", "CRLF", "blank lines", "no last newline", "U+2028", "cut characters", "a long line"],
)
async def test_an_answer_is_read_as_leniently_as_ollamas_own_client_reads_it(
    ollama: OllamaServer, lines: list[Any], text: str
) -> None:
    await sends(ollama, lines)
    answer = await answer_of(CONFIG, ollama)
    assert (answer.text, answer.finish_reason) == (text, "stop")


@pytest.mark.parametrize(
    ("arguments", "read"), [(None, "{}"), ("", "{}"), ('{"zone": "UTC"}', '{"zone": "UTC"}'), ("UTC", "UTC")]
)
async def test_the_arguments_of_a_tool_call_may_be_null_or_a_string(
    ollama: OllamaServer, arguments: Any, read: str
) -> None:
    await sends(ollama, [calls(arguments), LAST])
    answer = await answer_of(CONFIG, ollama)
    (call,) = answer.tool_calls
    assert (call.function.name, call.function.arguments) == ("now", read)
    assert answer.finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("lines", "names"),
    [
        ([said("half ")], "without its last part"),
        ([said("half "), b'{"model":"x","mess'], '{\\"model\\":\\"x\\",\\"mess'),
        ([said("half "), {"error": "CUDA error"}], "CUDA error"),
        ([said("half "), {"error": {"code": 7}}], '{"code":7}'),
        ([said(tool_calls=[{"function": {}}])], "name"),
        ([b"[]\n"], "[]"),
        ([LAST | {"done_reason": "load"}], "loaded the model and did not answer"),
    ],
)
async def test_an_answer_that_cannot_be_read_fails_with_what_the_server_said(
    ollama: OllamaServer, lines: list[Any], names: str
) -> None:
    await sends(ollama, lines)
    with pytest.raises(Misbehaved) as failed:
        await answer_of(CONFIG, ollama)
    assert names in failed.value.message


@pytest.mark.parametrize("part", [said(), said("x"), said(thinking="x")], ids=["nothing", "text", "thoughts"])
async def test_an_answer_without_an_end_is_given_up(
    ollama: OllamaServer, monkeypatch: pytest.MonkeyPatch, part: dict[str, Any]
) -> None:
    """Its server says something all the time, so that no silence ends it."""
    monkeypatch.setattr("consumers.engines.server.generation._PARTS_BESIDE", 10)
    monkeypatch.setattr("consumers.engines.server.generation._THINKING_PARTS", 90)

    async def endless(connection: Connection) -> None:
        await connection.lines(part)
        while True:
            await connection.lines_more(*[part] * 10)

    ollama.chat = endless
    with pytest.raises(Misbehaved, match="on and on"):
        await answer_of(msgspec.structs.replace(CONFIG, default_max_tokens=10), ollama)
    await sends(ollama, [*[said("x")] * 10, LAST])
    assert (await answer_of(msgspec.structs.replace(CONFIG, default_max_tokens=10), ollama)).text == "x" * 10


async def test_an_answer_that_ends_in_its_reasoning_says_so(ollama: OllamaServer) -> None:
    cut = LAST | {"done_reason": "length"}
    for lines, notes in (
        ([said(thinking="Hm"), cut], [CUT_IN_REASONING]),
        ([cut | {"message": {"role": "assistant", "content": "", "thinking": "Hm"}}], [CUT_IN_REASONING]),
        ([said(thinking="Hm"), said("Well"), cut], []),
        ([said(thinking="Hm"), cut | {"done_reason": "stop"}], []),
        ([said("Well"), cut], []),
    ):
        await sends(ollama, lines)
        assert (await answer_of(CONFIG, ollama)).notes == notes


async def test_a_line_without_an_end_is_given_up(ollama: OllamaServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("consumers.engines.server.http.LONGEST_LINE", 1000)
    await sends(ollama, [b"x" * 600, b"x" * 600])
    with pytest.raises(Misbehaved, match="more than 1000 bytes"):
        await answer_of(CONFIG, ollama)


# ---- loading ---------------------------------------------------------------------------------------------------------


async def test_a_model_that_loads_for_long_is_waited_for_on_one_connection(ollama: OllamaServer) -> None:
    async def loads(connection: Connection) -> None:
        await asyncio.sleep(5 * IMPATIENT.ollama_timeout_s)
        await connection.lines(said("ok"), LAST)
        await connection.end()

    ollama.chat = loads
    assert (await answer_of(IMPATIENT, ollama)).text == "ok"
    assert len(ollama.bodies) == 1


@pytest.mark.parametrize("load_timeout_s", [0.5, 60])
async def test_a_server_that_does_not_begin_is_given_up(
    ollama: OllamaServer, monkeypatch: pytest.MonkeyPatch, load_timeout_s: float
) -> None:
    """After the time for loading, or as soon as it answers no other call."""
    released = asyncio.Event()

    async def silent(connection: Connection) -> None:
        await released.wait()

    async def is_away(self: OllamaClient) -> bool:
        return False

    ollama.chat = silent
    if load_timeout_s == 60:
        monkeypatch.setattr(OllamaClient, "_is_there", is_away)
    config = msgspec.structs.replace(IMPATIENT, ollama_load_timeout_s=load_timeout_s)
    with pytest.raises(Misbehaved, match=f"did not begin within {0.5 if load_timeout_s == 0.5 else 0.3} s"):
        await answer_of(config, ollama)
    released.set()

"""A request for a model of an Ollama that misbehaves ends within its attempts, and the log says why."""

from __future__ import annotations

import json
import logging

import pytest

from consumers.engines.ollama import OllamaEngine
from pipeline.config import Config
from tests.consumers.ollama_server import Connection, ollama_server
from tests.waiting import eventually

PART = {"message": {"role": "assistant", "content": "half "}, "done": False}
ODD = {
    "memory": ({"error": "model requires more system memory (48.2 GiB) than is available (20.1 GiB)"}, "48.2 GiB"),
    "runner": ({"error": "llama runner process has terminated: exit status 2"}, "exit status 2"),
    "nodone": ([PART], "without its last part"),
    "midline": ([PART, b'{"model":"x","mess'], "the connection broke"),
    "nonsense": ([b"<html>\n"], "<html>"),
}


async def odd(connection: Connection) -> None:
    said, _ = ODD[json.loads(connection.body)["model"].partition(":")[2]]
    if isinstance(said, dict):
        await connection.answer(said, 500)
    else:
        await connection.lines(*said)
        if len(said) == 1:
            await connection.end()


def logged(caplog: pytest.LogCaptureFixture, name: str, words: str) -> list[str]:
    return [line for line in caplog.messages if line.startswith(f"{name}:") and words in line]


async def test_each_request_ends_within_its_attempts_and_each_failure_is_logged_once(
    start, client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with ollama_server() as server:
        server.models, server.chat = [{"name": f"odd:{name}"} for name in ODD], odd
        async with OllamaEngine(Config(), server.url) as engine:
            await start(engine, max_attempts=2)
            for name in ODD:
                await client.ask(name, json.dumps({"prompt": "x", "model": f"odd:{name}"}).encode())
            for name, (_, words) in ODD.items():
                answer = await client.answer(name)
                assert answer.error.code == "engine_failed"
                assert words in answer.error.message
                assert "2 attempts" in answer.error.message
                await eventually(lambda name=name, words=words: len(logged(caplog, name, words)) >= 2)
                assert len(logged(caplog, name, words)) == 2
                asked = [body for body in server.bodies if body["model"] == f"odd:{name}"]
                assert len(asked) == 2
            await client.none_waits()

"""Tenants of `headrace up`, by the wire contract alone: the same id three times is three requests."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import pytest

from tests.e2e.conftest import LAST, Asker, Pipeline, chat, joined, text_of
from tests.support import ROOT

# The name of a request with the id `same`, and the end of its lane's subject.
SAME = {"e2e-same": "", "t.acme.e2e-same": ".t.acme", "t.bolt.e2e-same": ".t.bolt.complex"}
PLACES = {"e2e-same": "France", "t.acme.e2e-same": "Japan", "t.bolt.e2e-same": "Italy"}
CAPITALS = {"e2e-same": "Paris", "t.acme.e2e-same": "Tokyo", "t.bolt.e2e-same": "Rome"}


async def ended(asker: Asker, name: str) -> dict:
    await asker.until(lambda: any(message["object"] in LAST for message in asker.messages[name]))
    return asker.messages[name][-1]


async def test_one_id_of_three_tenants_is_three_streams(asker: Asker):
    for name, lane in SAME.items():
        body = chat(f"What is the capital of {PLACES[name]}?", stream=True)
        await asker.ask(f"llm.request.high{lane}", body, Nats_Msg_Id=name)
    for name, capital in CAPITALS.items():
        last = await ended(asker, name)
        assert last["id"] == "e2e-same"
        assert capital in text_of(last)
        assert joined(asker.messages[name]) == text_of(last)
    said = json.loads((await asker.nc.request("llm.queue.position.t.acme", b"e2e-same", timeout=20)).data)
    assert said["id"] == "e2e-same"
    assert said["state"] == "finished"


async def test_a_tenants_core_request_is_answered(asker: Asker):
    answer = await asker.request("llm.ask.high.t.acme", "What is the capital of Japan?")
    assert "Tokyo" in text_of(answer)
    refused = await asker.request("llm.ask.high.t.ac$me", "x")
    assert refused["error"]["code"] == "invalid_request"


async def test_a_tenant_that_is_no_name_is_refused_under_an_id_of_the_broker(asker: Asker):
    ack = await asker.js.publish("llm.request.high.t.ac$me", b"x", timeout=20, headers={"Nats-Msg-Id": "e2e-odd"})
    found = await ended(asker, f"LLM-{ack.seq}")
    assert found["error"]["param"] == "tenant"


async def test_a_tenants_request_without_an_id_is_cancelled_by_its_name(asker: Asker, embedded: Pipeline):
    body = chat("Tell me a story.", stream=True, max_tokens=400)
    request_id = await asker.ask("llm.request.low.t.acme", body)
    name = f"t.acme.{request_id}"
    await asker.until(lambda: name in asker.started)
    command = [sys.executable, "-m", "pipeline.cli", "cancel", name, "--nats-url", embedded.url]
    done = await asyncio.to_thread(subprocess.run, command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(name), done.stderr
    last = await ended(asker, name)
    assert last["id"] == request_id
    assert last["object"] == "chat.completion" or last["error"]["code"] == "cancelled"


@pytest.mark.parametrize("reply_to", ["llm.reply.t.bolt.e2e", "llm.reply.e2e", "_INBOX.t.bolt.e2e"])
async def test_a_tenants_answer_goes_to_no_other(asker: Asker, reply_to: str):
    request_id = await asker.ask("llm.request.high.t.acme", b"x", Reply_To=reply_to)
    last = await ended(asker, f"t.acme.{request_id}")
    assert last["error"]["code"] == "reply_subject_denied"

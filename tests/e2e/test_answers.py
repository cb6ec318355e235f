"""What a person and a foreign program get from `headrace up` on its embedded defaults."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from tests.e2e.conftest import Asker, Pipeline, chat, joined, text_of
from tests.support import ROOT
from tests.waiting import eventually

FOREIGNER = """
import asyncio, json, sys
import nats

async def main():
    nc = await nats.connect(sys.argv[1])
    inbox = nc.new_inbox()
    replies = await nc.subscribe(inbox)
    body = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "stream": True}
    await nc.jetstream().publish("llm.request.high", json.dumps(body).encode(), headers={"Reply-To": inbox})
    while True:
        message = json.loads((await replies.next_msg(timeout=30)).data)
        print(json.dumps(message))
        if message["object"] in ("chat.completion", "error"):
            break
    await nc.close()

asyncio.run(main())
"""


def test_a_script_that_knows_only_nats_and_json_reads_chunks_and_paris(embedded: Pipeline):
    run = subprocess.run(
        [sys.executable, "-c", FOREIGNER, embedded.url], capture_output=True, text=True, timeout=60, check=True
    )
    messages = [json.loads(line) for line in run.stdout.splitlines()]
    assert [m["object"] for m in messages][:2] == ["headrace.status", "chat.completion.chunk"]
    assert messages[0]["state"] == "started"
    last = messages[-1]
    assert last["object"] == "chat.completion"
    assert "Paris" in text_of(last)
    assert joined(messages) == text_of(last)
    assert last["headrace"]["engine"] == "mlx"
    assert last["headrace"]["attempts"] == 1


async def test_plain_text_by_core_request_is_answered(asker: Asker):
    answer = await asker.request("llm.ask.high", "What is the capital of Japan?")
    assert "Tokyo" in text_of(answer)


async def test_russian_is_answered_in_russian(asker: Asker):
    answer = await asker.request("llm.ask.medium", "Какая столица Франции?")
    assert "Париж" in text_of(answer)


async def test_the_demo_model_says_what_it_is_when_it_does_not_know(asker: Asker):
    answer = await asker.request("llm.ask.low", "Explain the economics of medieval salt trade.")
    assert "demo model" in text_of(answer)


async def test_the_parts_of_a_tool_call_are_the_call(asker: Asker):
    tool = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    request_id = await asker.ask("llm.request.high", chat("What is the weather in Paris?", tools=[tool], stream=True))
    answer = await asker.answer(request_id)
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    [call] = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    chunked = [
        c
        for m in asker.messages[request_id]
        if m["object"] == "chat.completion.chunk"
        for c in m["choices"][0]["delta"].get("tool_calls") or []
    ]
    begun, *rest = chunked
    assert (begun["id"], begun["function"]["name"]) == (call["id"], "get_weather")
    assert all((part["id"], part["function"]["name"], part["index"]) == ("", "", 0) for part in rest)
    assert "".join(part["function"]["arguments"] for part in chunked) == call["function"]["arguments"]


async def test_the_same_seed_gives_the_same_text(asker: Asker):
    body = chat("Tell me a story.", temperature=1.2, seed=7, max_tokens=60)
    first, second = [await asker.answer(await asker.ask("llm.request.high", body)) for _ in range(2)]
    assert text_of(first) == text_of(second)
    assert first["usage"]["total_tokens"] == second["usage"]["total_tokens"]


async def test_a_stop_string_ends_the_answer_and_is_not_in_it(asker: Asker):
    whole, cut = [
        await asker.answer(await asker.ask("llm.request.high", chat("Count from 1 to 20.", temperature=0, **stop)))
        for stop in ({}, {"stop": [" 7"]})
    ]
    assert " 7" in text_of(whole)
    assert text_of(cut) == text_of(whole).split(" 7")[0]
    assert cut["choices"][0]["finish_reason"] == "stop"


async def test_usage_adds_up(asker: Asker):
    answer = await asker.answer(await asker.ask("llm.request.high", chat("Count from 1 to 50.", max_tokens=10)))
    usage = answer["usage"]
    assert usage["completion_tokens"] == 10
    assert usage["total_tokens"] == usage["prompt_tokens"] + 10
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_a_late_reader_reads_the_whole_answer(asker: Asker):
    request_id = await asker.ask("llm.request.high", chat("Count from 1 to 9.", stream=True), Nats_Msg_Id="late-1")
    await asker.answer(request_id)
    late = await asker.js.subscribe("llm.reply.late-1", stream="LLM_REPLIES", ordered_consumer=True)
    messages = []
    while not messages or messages[-1]["object"] not in ("chat.completion", "error"):
        messages.append(json.loads((await late.next_msg(timeout=30)).data))
    assert messages == asker.messages["late-1"]


async def test_the_same_id_twice_is_one_request(asker: Asker):
    for _ in range(2):
        await asker.ask("llm.request.high", chat("What is 2 + 3?"), Nats_Msg_Id="twice")
    await asker.answer("twice")
    follow_up = await asker.ask("llm.request.high", chat("What is 2 + 3?"))
    await asker.answer(follow_up)
    assert asker.lasts("twice") == 1


async def test_a_finished_request_has_its_position_and_an_unknown_one_too(asker: Asker):
    request_id = await asker.ask("llm.request.high", chat("What is 2 + 3?"))
    await asker.answer(request_id)
    assert (await asker.request("llm.queue.position", request_id))["state"] == "finished"
    assert (await asker.request("llm.queue.position", "never-sent"))["state"] == "unknown"


async def test_the_command_sends_and_shows_statistics(embedded: Pipeline):
    def headrace(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipeline.cli", *arguments, "--state-dir", str(embedded.folder / "state")]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=True)

    def counted() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(headrace("stats", "--json").stdout)
        return found if found["high"]["done"] else {}

    assert "Rome" in headrace("send", "--priority", "high", "What is the capital of Italy?").stdout
    # A request is counted a moment after its answer.
    statistics = await eventually(counted, what="the request is counted")
    assert {"high", "medium", "low", "engines", "dead", "uptime_s"} <= set(statistics)

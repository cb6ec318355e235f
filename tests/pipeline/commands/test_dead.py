"""`headrace dead`: what is said of a dead letter, and how it becomes a request again."""

from __future__ import annotations

import asyncio
import json
import time

import msgspec
import pytest

from pipeline import cli
from pipeline.broker import topology
from pipeline.commands.dead import age_s
from pipeline.core.letters import read_letter
from pipeline.wire.errors import ErrorCode
from pipeline.wire.subjects import MSG_ID, STREAM_DEAD, STREAM_REQUESTS
from tests.pipeline.worker.conftest import client, start
from tests.waiting import eventually

__all__ = ["client", "start"]  # fixtures


@pytest.fixture
def dead(config, capsys):
    """Runs `headrace dead ...` against the test's broker; gives the exit code, stdout and stderr."""

    async def run(*args: str) -> tuple[int, str, str]:
        code = await asyncio.to_thread(cli.main, ["dead", *args, "--nats-url", config.nats_url])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
async def poison(start, client):
    """Sends a request that brings the engine down, and waits until it is dead; the worker goes on."""
    worker = await start()
    runs: dict[str, int] = {}

    async def send(request_id: str, body: bytes = b'{"prompt":"x"}', **more: str) -> None:
        runs[request_id] = runs.get(request_id, 0) + 1
        await client.ask(request_id, body, **more)
        await fail(request_id)
        await client.none_waits()

    async def fail(request_id: str, number: int = 1) -> None:
        (await worker.engine.generation(request_id, number)).fail(ErrorCode.ENGINE_FAILED, "it crashed the engine")

    send.engine, send.fail = worker.engine, fail
    return send


async def letters(bus) -> int:
    return (await bus.stream_state(STREAM_DEAD)).messages


async def test_a_list_without_letters_is_empty_and_no_error(dead, bus):
    assert await dead("list") == (0, "", "There are no dead letters.\n")
    code, out, _ = await dead("list", "--json")
    assert (code, json.loads(out)) == (0, [])


async def test_the_list_tells_who_died_of_what(dead, poison):
    began_at = time.time()
    await poison("r1")
    await poison("r2", lane="low.complex")
    code, out, err = await dead("list", "--json")
    assert (code, err) == (0, "")
    first, second = json.loads(out)
    assert (first["id"], first["priority"], first["code"], first["attempts"]) == ("r1", "high", "engine_failed", 1)
    assert (second["id"], second["priority"], second["subject"]) == ("r2", "low", "llm.request.low.complex")
    assert first["message"] == "it crashed the engine"
    # A tenth of a second for the rounding of the age.
    assert 0 <= first["age_s"] <= time.time() - began_at + 0.1
    assert began_at <= first["died_at"] <= time.time()
    assert first["trace_id"] == ""


async def test_the_table_has_a_line_for_each_letter_of_the_priority(dead, poison):
    await poison("r1")
    await poison("r2", lane="low")
    _, out, _ = await dead("list")
    assert [line.split()[0] for line in out.splitlines()] == ["id", "r1", "r2"]
    _, out, _ = await dead("list", "--priority", "low")
    assert [line.split()[:4] for line in out.splitlines()[1:]] == [["r2", "low", "engine_failed", "1"]]


async def test_a_letter_is_shown_whole(dead, poison):
    await poison("r1", b'{"prompt":"why","max_tokens":3}', Llm_Tenant="me", Nats_Expected_Stream="LLM")
    code, out, _ = await dead("show", "r1")
    assert code == 0
    for part in (
        "engine_failed: it crashed the engine",
        "Llm-Tenant: me",
        'body:\n{\n  "prompt": "why",\n  "max_tokens": 3\n}',
    ):
        assert part in out
    assert "Nats-" not in out


async def test_what_a_stranger_wrote_does_not_steer_the_terminal(dead, poison):
    await poison("r1", b"plain \x1b[2J text\nand more")
    _, out, _ = await dead("show", "r1")
    assert "plain \\x1b[2J text\nand more" in out
    assert "\x1b" not in out


async def test_a_list_escapes_what_a_stranger_wrote(dead, bus):
    headers = {MSG_ID: "1", "Llm-Id": "a\x1b[2J\tb\x7f\xa0c", "Llm-Trace-Id": "\x1b]0;t\x07"}
    await bus.store("llm.dead.high", b"x", headers=headers)
    for options in ((), ("--json",)):
        _, out, _ = await dead("list", *options)
        assert not set(out) & set("\x1b\t\x07\x7f\xa0")
    (row,) = json.loads(out)
    assert (row["id"], row["trace_id"]) == (headers["Llm-Id"], headers["Llm-Trace-Id"])
    _, out, _ = await dead("replay", "--all")
    assert not set(out) & set("\x1b\t\x07\x7f")


@pytest.mark.parametrize("action", ["show", "replay", "purge"])
async def test_an_id_that_no_letter_has_is_an_error(dead, bus, action):
    code, out, err = await dead(action, "ghost")
    assert (code, out) == (1, "")
    assert "ghost" in err


async def test_a_replayed_request_is_answered_under_its_own_id_and_its_old_error_makes_way(dead, poison, client):
    await poison("r1", b'{"prompt":"x","stream":true}')
    assert (await client.answer("r1")).error.code == "engine_failed"
    code, out, _ = await dead("replay", "r1")
    assert (code, out) == (0, "r1: queued on llm.request.high\n")
    again = await poison.engine.generation("r1", 2)
    again.finish("yes")
    answer = await eventually(lambda: _completion(client, "r1"))
    assert answer.choices[0].message.content == "yes"
    assert answer.headrace.attempts == 1

    async def without_an_error():
        return not any(getattr(message, "error", None) for message in await client.record("r1"))

    await eventually(without_an_error)
    await client.none_waits()
    assert await letters(client.bus) == 0


async def _completion(client, request_id):
    record = await client.record(request_id)
    return record[-1] if record and hasattr(record[-1], "headrace") else None


async def test_a_request_that_dies_again_at_once_is_a_letter_again(dead, poison, client):
    await poison("r1")
    for number in (2, 3):
        code, _, _ = await dead("replay", "r1")
        assert code == 0
        await poison.fail("r1", number)
        await eventually(lambda: letters(client.bus), what="a letter")
        await client.none_waits()
    assert await letters(client.bus) == 1


async def test_a_custom_reply_subject_gets_the_replayed_answer(dead, poison, client):
    await poison("r1", Reply_To="llm.reply.mine")
    assert (await client.answer("mine")).error.code == "engine_failed"
    await dead("replay", "r1")
    (await poison.engine.generation("r1", 2)).finish("yes")
    answer = await eventually(lambda: _completion(client, "mine"))
    assert answer.choices[0].message.content == "yes"

    async def alone():
        return await client.record("mine") == [answer]

    await eventually(alone, what="the error before it is gone")


async def test_everything_of_a_priority_is_replayed_oldest_first(dead, poison, client):
    for number in range(3):
        await poison(f"h{number}")
    await poison("l0", lane="low")
    code, out, _ = await dead("replay", "--all", "--priority", "high")
    assert (code, [line.split(":")[0] for line in out.splitlines()]) == (0, ["h0", "h1", "h2"])
    for number in range(3):
        (await poison.engine.generation(f"h{number}", 2)).finish("yes")
    await client.none_waits()
    _, out, _ = await dead("list", "--json")
    assert [letter["id"] for letter in json.loads(out)] == ["l0"]


async def test_replaying_without_letters_is_said(dead, bus):
    code, out, err = await dead("replay", "--all")
    assert (code, out, err) == (1, "", "headrace: There are no dead letters.\n")


async def test_a_replay_that_died_between_its_two_steps_stores_one_request(dead, client, bus):
    await _bury(bus, "r1")
    stored = await bus.stored(STREAM_DEAD, 1)
    subject, headers = read_letter(stored.subject, 1, stored.stored_at, stored.headers, stored.data).replay(
        time.time(), bus.moves
    )
    await bus.store(subject, stored.data, headers=headers)
    code, _, _ = await dead("replay", "r1")
    assert code == 0
    assert (await bus.stream_state(STREAM_REQUESTS)).messages == 1
    assert await letters(bus) == 0


async def test_a_request_that_its_lane_does_not_take_stays_a_letter(dead, bus, config):
    await topology.apply(bus.js, msgspec.structs.replace(config, lane_max_messages=1))
    await bus.store("llm.request.high", b"x", headers={MSG_ID: "full"})
    await _bury(bus, "r1")
    code, out, err = await dead("replay", "--all")
    assert (code, out) == (1, "")
    assert "llm.request.high is full" in err
    assert await letters(bus) == 1


async def _bury(bus, request_id: str, priority: str = "high") -> None:
    headers = {MSG_ID: f"{request_id}@x:1", "Llm-Id": request_id, "Llm-Subject": f"llm.request.{priority}"}
    await bus.store(f"llm.dead.{priority}", b'{"prompt":"x"}', headers=headers)


async def test_letters_are_purged_by_id_by_priority_by_age_or_all(dead, bus):
    for request_id, priority in (("a", "high"), ("b", "low"), ("c", "low"), ("d", "medium"), ("e", "high")):
        await _bury(bus, request_id, priority)

    async def left() -> list[str]:
        return [letter["id"] for letter in json.loads((await dead("list", "--json"))[1])]

    assert await dead("purge", "a") == (0, "1 dead letter deleted\n", "")
    assert await left() == ["b", "c", "d", "e"]
    assert (await dead("purge", "--older-than", "1h"))[1] == "0 dead letters deleted\n"
    assert (await dead("purge", "--all", "--priority", "low"))[1] == "2 dead letters deleted\n"
    assert await left() == ["d", "e"]
    assert (await dead("purge", "--older-than", "0s"))[1] == "2 dead letters deleted\n"
    assert await left() == []


async def test_a_letter_that_is_none_of_ours_is_listed_all_the_same(dead, bus):
    await bus.store("llm.dead.nonsense", b"\xff", headers={MSG_ID: "x", "Llm-Error": "{", "Llm-Attempts": "many"})
    code, out, _ = await dead("list", "--json")
    assert code == 0
    (letter,) = json.loads(out)
    assert letter["attempts"] == 0
    assert (await dead("show", letter["id"]))[0] == 0


async def test_long_letters_are_read_in_portions(dead, bus):
    for number in range(20):
        await bus.store("llm.dead.high", b"x" * 1_000_000, headers={MSG_ID: str(number), "Llm-Id": f"r{number}"})
    _, out, _ = await dead("list", "--json")
    assert [letter["id"] for letter in json.loads(out)] == [f"r{number}" for number in range(20)]


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("1.5m", 90), ("2h", 7200), ("7d", 604_800)])
def test_an_age_is_a_number_and_a_unit(text, seconds):
    assert age_s(text) == seconds


@pytest.mark.parametrize("text", ["", "7", "d", "-1d", "7 d", "7w", "1e3s", "٣d"])
def test_nothing_else_is_an_age(text):
    with pytest.raises(ValueError):
        age_s(text)


def test_a_bad_age_is_a_usage_error(capsys):
    assert cli.main(["dead", "purge", "--older-than", "7w", "--nats-url", "nats://127.0.0.1:9"]) == 2
    assert "90s, 30m, 12h or 7d" in capsys.readouterr().err

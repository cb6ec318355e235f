"""Machines whose clocks are a minute off: requests are answered in time, and `doctor` names the offset."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import msgspec
import pytest

from pipeline.broker import topology
from pipeline.broker.connection import Unreachable
from pipeline.broker.jetstream import Bus
from pipeline.config import Config
from pipeline.wire.answers import Completion, decode_answer, is_last
from pipeline.wire.subjects import MSG_ID, STREAM_REPLIES, TIMEOUT
from tests.faketime import clock_off_by
from tests.support import ROOT
from tests.waiting import eventually

OFF_S = 60.0
HEADRACE = (sys.executable, "-m", "pipeline.cli")
SIMULATED = ("--engine", "simulated", "--simulated-answer-tokens", "8")


@contextmanager
def running(config: Config, role: str, *options: str, off_s: float) -> Iterator[Path]:
    """One role in a process of its own, on a machine whose clock is off. Yields its log."""
    log = Path(f"{config.state_dir}-{role}{off_s:+g}.log")
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*HEADRACE, "run", role, "--nats-url", config.nats_url, "--state-dir", config.state_dir, *options],
            cwd=ROOT,
            env=os.environ | clock_off_by(off_s),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    try:
        yield log
    finally:
        process.terminate()
        try:
            process.wait(15)
        finally:
            process.kill()
            process.wait()
            print(log.read_text())


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


async def ask(bus: Bus, request_id: str) -> None:
    headers = {MSG_ID: request_id, TIMEOUT: "50"}
    await bus.store("llm.request.medium", b"Why is the sky blue?", headers=headers)


async def answer(bus: Bus, request_id: str):
    async def closed():
        found = await bus.last_message(STREAM_REPLIES, f"llm.reply.{request_id}")
        message = None if found is None else decode_answer(found[1])
        return message if message is not None and is_last(message) else None

    return await eventually(closed, what=f"an answer to {request_id}")


@pytest.mark.parametrize("off_s", [OFF_S, -OFF_S])
async def test_a_worker_whose_clock_is_a_minute_off_is_ready_and_answers_in_time(bus, config, stack, off_s):
    # All others agree with the broker: what is measured is one machine against the rest.
    stack.enter_context(running(config, "monitor", off_s=0))
    stack.enter_context(running(config, "mlx", *SIMULATED, off_s=off_s))

    async def ready():
        try:
            stats = msgspec.json.decode((await bus.request("llm.queue.stats")).data)
        except Unreachable:
            return None  # the monitor is starting
        return stats["engines"].get("mlx", {}).get("slots", {}).get("total")

    async def listed():
        return msgspec.json.decode((await bus.request("llm.models")).data)["data"]

    await eventually(ready, what="the monitor counts the worker as ready")
    assert await listed()
    await asyncio.gather(*(ask(bus, f"r{number}") for number in range(8)))
    for number in range(8):
        message = await answer(bus, f"r{number}")
        assert isinstance(message, Completion), message
        account = message.headrace
        assert 0 <= account.queue_ms <= account.ttft_ms <= account.total_ms < 50_000
        assert account.attempts == 1


async def test_every_role_may_be_on_another_clock(bus, config, stack):
    """A gateway a minute ahead and a monitor a minute behind see the worker, and read its answers as they come."""
    for off_s in (OFF_S, -OFF_S):
        stack.enter_context(running(config, "mlx", *SIMULATED, off_s=off_s))
    stack.enter_context(running(config, "monitor", off_s=-OFF_S))
    # It chooses its port itself: one that was found free here could be another process's by then.
    log = stack.enter_context(running(config, "gateway", "--http-port", "0", off_s=OFF_S))
    url = await eventually(lambda: re.search(r"ready: (http://\S+)", log.read_text()), what="the gateway's URL")
    async with httpx.AsyncClient(base_url=url[1], timeout=60) as web:

        async def usable():
            try:
                return (await web.get("/readyz")).status_code == 200
            except httpx.TransportError:
                return False

        await eventually(usable, what="the gateway sees broker, monitor and engine")
        bodies = [{"messages": [{"role": "user", "content": f"question {n}"}]} for n in range(8)]
        headers = {"Llm-Timeout": "50"}
        answers = await asyncio.gather(*(web.post("/v1/chat/completions", json=b, headers=headers) for b in bodies))
        assert [one.status_code for one in answers] == [200] * 8


@pytest.mark.parametrize(("off_s", "said"), [(OFF_S, "ahead of"), (-OFF_S, "behind")])
async def test_the_doctor_names_the_offset(bus, config, off_s, said):
    doctor = await asyncio.create_subprocess_exec(
        *(*HEADRACE, "doctor", "--engine", "simulated", "--nats-url", config.nats_url),
        env=os.environ | clock_off_by(off_s),
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await doctor.communicate()
    (line,) = [line for line in output.decode().splitlines() if line.split()[1] == "clock"]
    level, _, seconds, *_ = line.split()
    assert level == "warn"
    assert abs(float(seconds) - abs(off_s)) < 1
    assert f" s {said} the broker's" in line


async def test_the_doctor_is_content_with_a_clock_that_agrees(bus, config):
    await topology.apply(bus.js, config)
    doctor = await asyncio.create_subprocess_exec(
        *(*HEADRACE, "doctor", "--engine", "simulated", "--nats-url", config.nats_url), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await doctor.communicate()
    findings = [line.split()[:2] for line in output.decode().splitlines()]
    assert ["ok", "clock"] in findings

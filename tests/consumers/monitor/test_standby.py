"""Several monitors, one voice."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager

import msgspec
import pytest
from nats.js.api import RetentionPolicy, StreamConfig

from consumers.monitor import cancelling
from pipeline.broker import topology
from pipeline.broker.connection import Unreachable
from pipeline.broker.jetstream import Fenced
from pipeline.config import to_environment
from pipeline.wire.messages import Position
from pipeline.wire.subjects import LEADER_MONITOR, QUEUE_POSITION, QUEUE_STATS, STREAM_STATE
from tests.consumers.monitor.conftest import ask_service
from tests.pipeline.worker.conftest import client
from tests.support import ROOT
from tests.waiting import TIMEOUT_S, eventually

__all__ = ["client"]  # fixture


class Voices:
    """Hears all that answer a question, and which monitor each of them is."""

    def __init__(self, bus) -> None:
        self._bus = bus
        self._prefix = bus.new_inbox()
        self.answers = Counter()
        self._number = 0

    async def start(self):
        await self._bus.subscribe(f"{self._prefix}.*", self._on_answer)

    async def _on_answer(self, message):
        if message.data:
            self.answers[message.subject] += 1

    async def ask(self, patience_s=TIMEOUT_S):
        """Ask, and wait for an answer; one more would be no later than the answer to the question after it."""
        self._number += 1
        inbox = f"{self._prefix}.{self._number}"
        await self._bus.publish(QUEUE_STATS, b"", reply=inbox)
        try:
            await eventually(lambda: self.answers[inbox], timeout_s=patience_s)
        except AssertionError:
            return False
        return True

    @property
    def most(self):
        return max(self.answers.values())


@pytest.fixture
async def voices(bus):
    found = Voices(bus)
    await found.start()
    return found


async def test_of_two_monitors_one_answers_and_the_other_follows_when_it_dies(monitor, bus, client, voices):
    first, second = await monitor.start(), await monitor.start()
    assert (first.ready, second.ready) == ("", "standing by: another monitor leads")
    await eventually(first.it.candidate.leads)
    assert not second.it.candidate.leads()
    for _ in range(5):
        assert await voices.ask()
    await client.ask("r1")
    await first.kill()
    await eventually(lambda: voices.ask(0.5), what="the second one answers")
    await eventually(second.it.candidate.leads)
    assert (await ask_service(bus, "llm.queue.position", b"r1"))["state"] == "queued"
    assert (await ask_service(bus, "llm.cancel.r1"))["state"] == "cancelled"
    for _ in range(5):
        assert await voices.ask()
    assert voices.most == 1


async def test_the_one_that_stands_by_publishes_no_loads(monitor, bus):
    first, second = await monitor.start(), await monitor.start()
    published = []
    second.me.bus.publish = lambda subject, *_, **__: published.append(subject)
    heard = []

    async def on_load(message):
        heard.append(message.subject)

    await bus.subscribe("llm.load.mlx", on_load)
    for _ in range(3):
        before = len(heard)
        first.it.load._published_at.clear()
        second.it.load._published_at.clear()
        first.it.load.wake()
        second.it.load.wake()
        await eventually(lambda before=before: len(heard) > before)
    assert published == []


async def test_a_cancel_that_only_the_one_standing_by_has_heard_is_carried_out_when_it_leads(monitor, bus, client):
    first, second = await monitor.start(), await monitor.start()
    await client.ask("r1")
    await eventually(lambda: second.it.view.find("r1"))
    await first.kill()
    await bus.publish("llm.cancel.r1", b"")
    assert await client.code("r1") == "cancelled"
    await client.none_waits()


async def old(_subject, _body):
    return msgspec.json.encode(Position("", "unknown"))


async def statistics(bus):
    """None where no monitor answers: one answers a moment after it has taken the lease.

    One that stands by from now on may leave a question without an answer.
    """
    try:
        return await ask_service(bus, QUEUE_STATS)
    except Unreachable:
        return None


async def is_silent(bus):
    return await statistics(bus) is None


async def test_a_monitor_whose_lease_was_taken_stands_by_as_long_as_the_other_one_answers(monitor, bus):
    running = await monitor.start()
    stop = await bus.serve("another", "which has taken the lease", {QUEUE_POSITION: old})

    async def taken():
        sequence, _ = await bus.last_message(STREAM_STATE, LEADER_MONITOR)
        try:
            await bus.store(LEADER_MONITOR, b'{"holder":"another","token":"other"}', expected_last=sequence)
        except Fenced:
            return False  # it was renewed in between
        return True

    await eventually(taken)
    await eventually(lambda: not running.it.candidate.leads(), what="it has learned of the other one")
    await eventually(lambda: is_silent(bus), what="it answers no more")
    await stop()
    await eventually(running.it.candidate.leads, what="it leads once the other one is gone")
    assert (await eventually(lambda: statistics(bus), what="it answers again"))["high"]["queued"] == 0


async def test_a_monitor_without_a_lease_is_left_alone_while_it_answers(monitor, bus):
    """The version before the lease."""
    stop = await bus.serve("headrace-queue", "as before", {QUEUE_POSITION: old})
    running = await monitor.start()
    assert (running.ready, running.it.candidate.leads()) == ("standing by: another monitor leads", False)
    await stop()
    await eventually(running.it.candidate.leads, what="it leads once the old one is gone")


async def old_subjects(bus):
    config = (await bus.js.stream_info(STREAM_STATE)).config
    config.subjects = ["llm.load.*", "llm.returned.*"]
    await bus.js.update_stream(config)


async def test_the_lease_is_stored_again_after_an_older_role_has_put_its_subject_aside(monitor, bus):
    running = await monitor.start()
    await old_subjects(bus)

    async def renewed():
        return LEADER_MONITOR.rpartition(".")[0] + ".*" in (await bus.js.stream_info(STREAM_STATE)).config.subjects

    await eventually(renewed)
    await eventually(running.it.candidate.leads)


async def test_a_stream_of_the_version_before_takes_the_lease_and_keeps_what_it_holds(bus, config):
    await bus.js.delete_stream(STREAM_STATE)
    old = StreamConfig(
        name=STREAM_STATE,
        subjects=["llm.load.*", "llm.returned.*"],
        retention=RetentionPolicy.LIMITS,
        max_msgs_per_subject=1,
        duplicate_window=120,
        allow_msg_ttl=True,
        allow_direct=True,
    )
    await bus.js.add_stream(old)
    await bus.store("llm.returned.high-7", b"3", expected_last=0)
    await topology.apply(bus.js, config)
    assert await bus.last_message(STREAM_STATE, "llm.returned.high-7") == (1, b"3")
    assert await bus.store(LEADER_MONITOR, b"{}", expected_last=0) == 2


# ---- processes


@contextmanager
def process(config):
    command = [sys.executable, "-m", "pipeline.cli", "run", "monitor"]
    environ = {**os.environ, **to_environment(config)}
    started = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield started
    finally:
        started.kill()
        started.wait()


async def up_since(bus):
    """Which monitor answers, told by how long it has been up, None where none does."""
    try:
        return round(asyncio.get_running_loop().time() - (await ask_service(bus, QUEUE_STATS))["uptime_s"], 1)
    except (Unreachable, msgspec.DecodeError):
        return None


async def test_a_frozen_monitor_is_followed_and_stands_by_when_it_goes_on(monitor, bus, config, voices):
    with process(config) as first:
        assert await eventually(lambda: up_since(bus), what="the first one answers", timeout_s=60)
        second = await monitor.start()
        assert not second.it.candidate.leads()
        first.send_signal(signal.SIGSTOP)
        await eventually(second.it.candidate.leads, what="the second one leads")
        # It answers a moment after it has taken the lease.
        await eventually(lambda: voices.ask(0.5), what="the second one answers")
        first.send_signal(signal.SIGCONT)
        # What it had not read while it was frozen it answers now, too late for any reader.
        await eventually(lambda: _answers_once(bus), what="the first one stands by")
        voices.answers.clear()
        for _ in range(5):
            assert await voices.ask()
        assert voices.most == 1
        await eventually(second.it.candidate.leads)


async def _answers_once(bus):
    voices = Voices(bus)
    await voices.start()
    for _ in range(3):
        if not await voices.ask(0.5):
            return False
    return voices.most == 1


async def test_a_cancel_waits_for_a_takeover_however_long_that_takes(monitor, bus, client, monkeypatch):
    monkeypatch.setattr(cancelling, "_TAKEOVER_S", 0.01)
    first, second = await monitor.start(), await monitor.start()
    await client.ask("r1")
    await eventually(lambda: second.it.view.find("r1"))
    await first.kill()
    await bus.publish("llm.cancel.r1", b"")
    assert await client.code("r1") == "cancelled"

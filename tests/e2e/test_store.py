"""A store that cannot be written: the disk is full, or the server fails to write; and what becomes of the requests."""

from __future__ import annotations

import asyncio
import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from nats.errors import Error as NatsError
from nats.js.errors import APIError

from pipeline.broker import topology
from pipeline.broker.jetstream import Bus
from pipeline.config import Config
from pipeline.wire.subjects import LANES, MSG_ID, STREAM_OLLAMA, STREAM_REQUESTS, Priority, ollama_consumer
from tests.disks import small_disk
from tests.e2e.conftest import LAST, Asker, Pipeline, asking, chat, running
from tests.support import ROOT, NatsServer
from tests.waiting import eventually

OPTIONS = ("--engine", "simulated", "--no-ollama-standin", "--nats-port", "0", "--http-port", "0")


async def readiness(pipeline: Pipeline) -> tuple[int, dict]:
    async with httpx.AsyncClient(base_url=pipeline.http, timeout=10) as web:
        answer = await web.get("/readyz")
    return answer.status_code, answer.json()


class Load:
    """A client that publishes requests one after another. `accepted`: those that the broker confirmed."""

    def __init__(self, asker: Asker) -> None:
        self._asker = asker
        self.accepted: list[str] = []
        self.refused = 0

    async def run(self) -> None:
        number = 0
        while True:
            number += 1
            name = f"load-{number}"
            try:
                body = chat("Say something." * 20, stream=True, max_tokens=20)
                await asyncio.wait_for(self._asker.ask("llm.request.medium", body, Nats_Msg_Id=name), 1)
                self.accepted.append(name)
            except (NatsError, APIError, TimeoutError):
                self.refused += 1
            await asyncio.sleep(0.02)


async def all_answered(asker: Asker, accepted: list[str]) -> None:
    """Each accepted request has one last message, which is its answer, and there is no dead letter.

    Read from the stream: a subscriber misses what is said while the broker restarts.
    """

    async def last(request_id: str) -> dict | None:
        try:
            stored = await asker.js.get_last_msg("LLM_REPLIES", f"llm.reply.{request_id}")
        except (NatsError, APIError, TimeoutError):
            return None
        message = json.loads(stored.data or b"{}")
        return message if message["object"] in LAST else None

    open_ids = set(accepted)
    ends: dict[str, str] = {}

    async def read() -> bool:
        for request_id in list(open_ids):
            if (message := await last(request_id)) is not None:
                ends[request_id] = message["object"]
                open_ids.discard(request_id)
        return not open_ids

    try:
        await eventually(read, every_s=0.2)
    finally:
        print("without an answer:", sorted(open_ids))
    assert set(ends.values()) <= {"chat.completion"}
    assert all(asker.lasts(i) <= 1 for i in accepted)
    assert (await asker.request("llm.queue.stats"))["dead"] == 0


@pytest.mark.parametrize("full_s", [10, pytest.param(40, marks=pytest.mark.slow)])
async def test_a_full_disk_loses_nothing_and_heals_by_itself(tmp_path, full_s):
    with small_disk(tmp_path / "disk", "24m") as disk, running(disk.folder, *OPTIONS) as pipeline:
        async with asking(pipeline.url) as asker:
            load = Load(asker)
            publishing = asyncio.create_task(load.run())
            await eventually(lambda: len(load.accepted) > 20)
            # These are queued and running when the disk is full.
            body = chat("Say something.", stream=True, max_tokens=300)
            names = [f"burst-{number}" for number in range(60)]
            await asyncio.gather(*(asker.ask("llm.request.low", body, Nats_Msg_Id=name) for name in names))
            load.accepted += names
            disk.fill()
            now = asyncio.get_running_loop().time
            full_at = now()
            ready = await eventually(lambda: _when(pipeline, 503))
            told_s = now() - full_at
            assert "disk" in ready["reason"]
            await eventually(lambda: _monitor_says(asker, "full", "failed"))
            async with httpx.AsyncClient(base_url=pipeline.http, timeout=10) as web:
                refused = await web.post("/v1/chat/completions", json=chat("hello"))
                assert refused.status_code == 503
                assert refused.json()["error"]["code"] in ("queue_full", "unavailable")
                assert "disk" in refused.json()["error"]["message"]
            sent_s = await _sent_in_vain(pipeline)
            await asyncio.sleep(full_s - (now() - full_at))
            before = len(load.accepted)
            disk.empty()
            room_at = now()
            await eventually(lambda: len(load.accepted) > before)
            stored_s = now() - room_at
            await eventually(lambda: _when(pipeline, 200))
            ready_s = now() - room_at
            await eventually(lambda: len(load.accepted) > before + 20)
            publishing.cancel()
            print(
                f"full for {full_s} s: 503 after {told_s:.1f} s; `headrace send` ended after {sent_s:.1f} s; "
                f"with room again, stored after {stored_s:.1f} s and "
                f"ready after {ready_s:.1f} s; {len(load.accepted)} accepted, {load.refused} refused"
            )
            await all_answered(asker, load.accepted)


async def test_before_the_disk_is_full_new_requests_are_refused_and_accepted_ones_are_answered(tmp_path):
    with small_disk(tmp_path / "disk", "24m") as disk, running(disk.folder, *OPTIONS) as pipeline:
        async with asking(pipeline.url) as asker:
            body = chat("Say something.", stream=True, max_tokens=100)
            names = [f"before-{number}" for number in range(20)]
            await asyncio.gather(*(asker.ask("llm.request.low", body, Nats_Msg_Id=name) for name in names))
            disk.fill(but=1500 << 10)
            await eventually(lambda: _when(pipeline, 503))
            await eventually(lambda: _monitor_says(asker, "full"))
            async with httpx.AsyncClient(base_url=pipeline.http, timeout=10) as web:
                refused = await web.post("/v1/chat/completions", json=chat("hello"))
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
            asked = await asker.request("llm.ask.high", "hello")
            assert asked["error"]["code"] == "queue_full"
            await eventually(lambda: _refused_by_the_stream(asker))
            await all_answered(asker, names)
            assert "restarting" not in pipeline.screen
            disk.empty()
            await eventually(lambda: _when(pipeline, 200))
            await eventually(lambda: _accepted(asker))


async def _refused_by_the_stream(asker: Asker) -> bool:
    try:
        await asker.ask("llm.request.high", b"hello" * 100)
    except APIError as error:
        return error.err_code == 10077
    return False


async def _accepted(asker: Asker) -> bool:
    return not await _refused_by_the_stream(asker)


async def _sent_in_vain(pipeline: Pipeline) -> float:
    """`headrace send` says why nothing is stored; for how long it ran, seconds."""
    command = [sys.executable, "-m", "pipeline.cli", "send", "--nats-url", pipeline.url, "hello"]
    begun_at = time.monotonic()
    sent = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (sent.returncode, sent.stdout) == (1, "")
    assert re.search(r"disk|lane .* is full", sent.stderr), sent.stderr
    return time.monotonic() - begun_at


async def _monitor_says(asker: Asker, *states: str) -> bool:
    """Whether the monitor has heard of the store's state. The gateway may have heard of it sooner."""
    store = (await asker.request("llm.queue.stats"))["store"]
    return store is not None and store["state"] in states


async def _when(pipeline: Pipeline, status: int) -> dict | None:
    found, body = await readiness(pipeline)
    return body if found == status else None


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux limits another process")
async def test_a_server_that_cannot_write_is_restarted_and_loses_nothing(tmp_path):
    """Without a full disk: the server may write no file beyond a size, and logs the same failures."""
    with running(tmp_path, *OPTIONS) as pipeline:
        async with asking(pipeline.url) as asker:
            load = Load(asker)
            publishing = asyncio.create_task(load.run())
            await eventually(lambda: len(load.accepted) > 20)
            blocks = (tmp_path / "state" / "nats").glob("jetstream/*/streams/*/msgs/*.blk")
            largest = max(block.stat().st_size for block in blocks)
            resource.prlimit(pipeline.pid("nats-server"), resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
            await eventually(lambda: "cannot write to its store" in pipeline.screen)
            before = len(load.accepted)
            await eventually(lambda: len(load.accepted) > before + 20)
            await eventually(lambda: _when(pipeline, 200))
            publishing.cancel()
            await all_answered(asker, load.accepted)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux limits another process")
async def test_a_broker_of_another_owner_that_cannot_write_is_noticed_and_may_be_restarted_later(tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    server = NatsServer(store)
    server.start()
    try:
        with running(tmp_path, *OPTIONS, "--nats-url", server.url) as pipeline:
            async with asking(pipeline.url) as asker:
                load = Load(asker)
                publishing = asyncio.create_task(load.run())
                await eventually(lambda: len(load.accepted) > 20)
                largest = max(block.stat().st_size for block in store.glob("jetstream/*/streams/*/msgs/*.blk"))
                resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
                ready = await eventually(lambda: _when(pipeline, 503))
                assert "restart nats-server" in ready["reason"]
                await eventually(lambda: _monitor_says(asker, "failed"))
                await asyncio.to_thread(server.stop)
                await asyncio.to_thread(server.start)
                before = len(load.accepted)
                await eventually(lambda: len(load.accepted) > before + 20)
                await eventually(lambda: _when(pipeline, 200))
                publishing.cancel()
                await all_answered(asker, load.accepted)
    finally:
        server.stop()


def sequences_lost(screen: str) -> set[int]:
    """The sequences of the stream of requests that the screen lists as lost."""
    lost: set[int] = set()
    said = re.search(r"Stream LLM lost what its sequences ([\d, to]+) held", " ".join(screen.split()))
    for first, last in re.findall(r"(\d+)(?: to (\d+))?", said[1] if said else ""):
        lost |= set(range(int(first), int(last or first) + 1))
    return lost


def damaged(store: Path, name: str, how: str) -> None:
    path = store / "jetstream" / "$G" / "streams" / name
    data = path.read_bytes()
    match how:
        case "removed":
            path.unlink()
        case "cut":
            path.write_bytes(data[: len(data) // 2])
        case "zeroed":
            path.write_bytes(bytes(len(data)))
        case "garbled":
            path.write_bytes(bytes(byte ^ 0x5A for byte in data))


async def queued_in(store: Path) -> dict[str, int]:
    """Queue requests on a broker of the store, without engines. Returns the sequence of each, by id."""
    server = NatsServer(store)
    server.start()
    async with Bus.connect(server.url, name="test") as bus:
        await topology.apply(bus.js, Config(nats_url=server.url))
        sequences = {}
        for number in range(12):
            subject = f"llm.request.{('high', 'medium', 'low')[number % 3]}"
            sequences[f"q{number}"] = await bus.store(subject, b"hello", headers={MSG_ID: f"q{number}"})
    server.stop()
    return sequences


FILES = ("meta.inf", "meta.sum", "msgs/1.blk", "msgs/index.db", "obs/high/o.dat", "obs/low/meta.inf")
# Requests are lost and listed. `make store` damages the other files too; test_mending.py mends each without a pipeline.
QUICK = [("LLM/msgs/1.blk", "cut")]
ALL = [(f"LLM/{name}", how) for name in FILES for how in ("zeroed", "garbled", "cut", "removed")]


@pytest.mark.parametrize(
    ("name", "how"), [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in ALL if each not in QUICK)]
)
async def test_up_starts_on_a_damaged_store_and_answers_what_is_not_listed_as_lost(tmp_path, name, how):
    store = tmp_path / "state" / "nats"
    store.mkdir(parents=True)
    sequences = await queued_in(store)
    damaged(store, name, how)
    with running(tmp_path, *OPTIONS) as pipeline:
        lost = sequences_lost(pipeline.screen)
        async with asking(pipeline.url) as asker:
            await all_answered(asker, [i for i, sequence in sequences.items() if sequence not in lost])
            await asker.ask("llm.request.high", b"hello", Nats_Msg_Id="new")
            await all_answered(asker, ["new"])
        assert bool(lost) is ("1.blk" in name)
        assert "store " in pipeline.screen or "index.db" in name or (name[-5:], how) == ("o.dat", "removed")


LANES_AND_CONSUMERS = [(lane.subject, STREAM_REQUESTS, lane.consumer) for lane in LANES]


async def test_every_consumer_that_is_deleted_while_up_runs_is_made_again_and_its_lane_is_served(tmp_path):
    with running(tmp_path, *OPTIONS) as pipeline:
        async with asking(pipeline.url) as asker:
            for subject, stream, consumer in LANES_AND_CONSUMERS:
                await asker.js.delete_consumer(stream, consumer)
                await asker.ask(subject, b"hello", Nats_Msg_Id=f"after-{consumer}")
            for priority in Priority:
                await asker.js.delete_consumer(STREAM_OLLAMA, ollama_consumer(priority))
            await all_answered(asker, [f"after-{consumer}" for *_, consumer in LANES_AND_CONSUMERS])
            await eventually(lambda: consumers_of(asker, STREAM_OLLAMA, len(Priority)))


async def test_every_stream_that_is_deleted_while_up_runs_is_made_again_and_requests_are_answered(tmp_path):
    with running(tmp_path, *OPTIONS) as pipeline:
        async with asking(pipeline.url) as asker:
            names = {stream.name for stream in topology.streams(Config())}
            assert names == await stream_names(asker)
            for name in sorted(names):
                await asker.js.delete_stream(name)
                await eventually(lambda: has_streams(asker, names))
                await asker.ask("llm.request.high", b"hello", Nats_Msg_Id=f"after-{name}")
                await all_answered(asker, [f"after-{name}"])


async def stream_names(asker: Asker) -> set[str]:
    return {info.config.name or "" for info in await asker.js.streams_info()}


async def has_streams(asker: Asker, names: set[str]) -> bool:
    return await stream_names(asker) == names


async def consumers_of(asker: Asker, stream: str, count: int) -> bool:
    return len(await asker.js.consumers_info(stream)) == count

"""A broker starts on a store of which any file is damaged, and what it held is delivered or listed as lost."""

from __future__ import annotations

import re
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from pipeline.broker import topology
from pipeline.broker.bulk import readable
from pipeline.broker.jetstream import Bus
from pipeline.config import Config
from pipeline.delivery.puller import Puller
from pipeline.up.mending import Mending
from pipeline.wire.subjects import (
    FILE_CHUNKS,
    LANES,
    MSG_ID,
    STREAM_BATCH,
    STREAM_FILES,
    STREAM_REQUESTS,
    STREAM_USED,
)
from tests.support import NatsServer
from tests.waiting import eventually, taken

DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "zeroed": lambda data: bytes(len(data)),
    "garbled": lambda data: bytes(byte ^ 0x5A for byte in data),
    "cut": lambda data: data[: len(data) // 2],
    "emptied": lambda _: b"",
    "removed": lambda _: None,
}
# Of each kind of file one, and all of those that hold messages.
FILES = [
    "LLM/meta.inf",
    "LLM/meta.sum",
    "LLM/msgs/1.blk",
    "LLM/msgs/index.db",
    "LLM/obs/high/meta.inf",
    "LLM/obs/high/meta.sum",
    "LLM/obs/high/o.dat",
    "LLM_OLLAMA/msgs/1.blk",
    "LLM_OLLAMA/obs/ollama_low/o.dat",
    "LLM_REPLIES/meta.inf",
    "LLM_REPLIES/msgs/1.blk",
    "LLM_STATE/msgs/1.blk",
    "LLM_STATE/msgs/thw.db",
    "LLM_DEAD/meta.sum",
    "LLM_BATCH/msgs/1.blk",
    "LLM_USAGE/meta.inf",
    "LLM_USED/msgs/1.blk",
    "OBJ_LLM_FILES/msgs/1.blk",
]
CHECKSUM_BYTES = 8
REQUESTS = [f"r{number}" for number in range(1, 9)]


async def nothing(_: object) -> None:
    raise AssertionError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a store of which the tests damage copies."""
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
async def store(whole: Path, tmp_path: Path) -> Path:
    """A store with eight requests on the lane `high`: two were delivered, and the first of them was acknowledged."""
    if not (whole / "jetstream").exists():
        server = NatsServer(whole)
        server.start()
        async with Bus.connect(server.url, name="test") as bus:
            await topology.apply(bus.js, Config(nats_url=server.url))
            for name in REQUESTS:
                await bus.store("llm.request.high", b"x" * 300, headers={MSG_ID: name})
            await bus.store("llm.ollama.low", b"x", headers={MSG_ID: "o1"})
            await bus.store("llm.dead.low", b"x", headers={MSG_ID: "d1"})
            for subject in ("llm.batch.b1.order", "llm.batch.b1.result", "llm.usage.hour.1", "llm.used"):
                await bus.store(subject, b"x" * 300)
            await bus.store(f"{FILE_CHUNKS}.f1", b"x" * 300)
            await bus.store("llm.out.r1", b"{}", expected_last=0)
            await bus.store("llm.returned.high-2", b"1", headers={"Nats-TTL": "3600s"})
            puller = Puller(bus, STREAM_REQUESTS, nothing, 30.0)
            await puller.start()
            first = await taken(puller, "high")
            await taken(puller, "high")
            await first.ack()
            await eventually(lambda: _holds(bus, 7))
        server.stop()
    shutil.copytree(whole / "jetstream", tmp_path / "jetstream")
    return tmp_path


async def _holds(bus: Bus, messages: int) -> bool:
    return (await bus.stream_state(STREAM_REQUESTS)).messages == messages


@pytest.fixture
async def started(store: Path) -> AsyncIterator[Callable[[], object]]:
    servers: list[NatsServer] = []

    async def start() -> tuple[str, list[str]]:
        """Start as `headrace up` does. Returns the broker's URL and what is said of the store."""
        mending = Mending(store, store / "log")
        mending.look()
        server = NatsServer(store)
        servers.append(server)
        server.start()
        async with Bus.connect(server.url, name="up") as bus:
            said = await mending.mend(bus)
            await topology.apply(bus.js, Config(nats_url=server.url))
            return server.url, said + await mending.losses(bus)

    yield start
    for server in servers:
        server.kill()


def file_of(store: Path, name: str) -> Path:
    return store / "jetstream" / "$G" / "streams" / name


def damage(path: Path, how: str) -> bytes:
    before = path.read_bytes()
    after = DAMAGES[how](before)
    if after is None:
        path.unlink()
    else:
        path.write_bytes(after)
    return before


def listed(said: list[str], stream: str) -> set[int]:
    """The sequences that are said to be lost."""
    lost: set[int] = set()
    for sentence in said:
        if sentence.startswith(f"Stream {stream} lost"):
            for first, last in re.findall(r"(\d+)(?: to (\d+))?", sentence.partition(" held:")[0]):
                lost |= set(range(int(first), int(last or first) + 1))
    return lost


async def delivered(bus: Bus) -> set[int]:
    """The sequences that the lane `high` delivers, those that are in another worker's hand as well."""
    await bus.request("$JS.API.CONSUMER.DELETE.LLM.high")
    await topology.apply(bus.js, Config())
    puller = Puller(bus, STREAM_REQUESTS, nothing, 30.0)
    await puller.start()
    found = set()
    for _ in range((await bus.stream_state(STREAM_REQUESTS)).messages):
        found.add((await taken(puller, "high")).sequence)
    return found


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", FILES)
async def test_it_starts_and_each_request_is_delivered_or_listed(store, started, name, how):
    damage(file_of(store, name), how)
    url, said = await started()
    async with Bus.connect(url, name="test") as bus:
        assert len(await bus.consumers(STREAM_REQUESTS)) == len(LANES) + 1
        lost = listed(said, "LLM")
        assert await delivered(bus) - {1} == set(range(2, 9)) - lost
        await bus.store("llm.request.low", b"new", headers={MSG_ID: "new"})
    assert bool(lost) is (name == "LLM/msgs/1.blk")


@pytest.mark.parametrize(
    ("name", "how", "kept", "says"),
    [
        ("LLM/obs/high/o.dat", "zeroed", "LLM/obs/high/o.dat", "The consumer high of stream LLM was damaged."),
        ("LLM/obs/high/o.dat", "garbled", "LLM/obs/high/o.dat", "The consumer high of stream LLM was damaged."),
        ("LLM/msgs/1.blk", "cut", "LLM/msgs/1.blk", "Block 1.blk of stream LLM was damaged."),
        ("LLM/meta.inf", "garbled", "LLM/meta.inf", "The description of stream LLM was damaged."),
        ("LLM_BATCH/msgs/1.blk", "garbled", "LLM_BATCH/msgs/1.blk", "Block 1.blk of stream LLM_BATCH was damaged."),
        ("LLM_USED/msgs/1.blk", "cut", "LLM_USED/msgs/1.blk", "Block 1.blk of stream LLM_USED was damaged."),
        ("LLM_USAGE/meta.inf", "zeroed", "LLM_USAGE/meta.inf", "The description of stream LLM_USAGE was damaged."),
        ("OBJ_LLM_FILES/meta.inf", "cut", "OBJ_LLM_FILES/meta.inf", "The description of stream OBJ_LLM_FILES was"),
    ],
)
async def test_what_is_damaged_is_set_aside_and_said(store, started, name, how, kept, says):
    damage(file_of(store, name), how)
    damaged = file_of(store, name).read_bytes()
    _, said = await started()
    assert any(sentence.startswith(says) for sentence in said)
    (copy,) = (store / "set-aside").glob(f"*/$G/streams/{kept}")
    assert copy.read_bytes() == damaged


@pytest.mark.parametrize("sequence", [2, 5, 8])
async def test_a_message_whose_body_was_damaged_is_listed(store, started, sequence):
    """The server skips it without a word."""
    block = file_of(store, "LLM/msgs/1.blk")
    data = bytearray(block.read_bytes())
    data[data.index(b"x" * 300, data.index(f"r{sequence}\r\n".encode())) + 50] = 0
    block.write_bytes(data)
    url, said = await started()
    assert listed(said, "LLM") == {sequence}
    async with Bus.connect(url, name="test") as bus:
        assert await readable(bus, STREAM_REQUESTS) == set(range(2, 9)) - {sequence}


@pytest.mark.parametrize(("name", "lost"), [("LLM_BATCH", {2}), ("LLM_USAGE", {1}), ("OBJ_LLM_FILES", {1})])
async def test_what_a_damaged_block_of_any_stream_held_is_listed(store, started, name, lost):
    block = file_of(store, f"{name}/msgs/1.blk")
    block.write_bytes(block.read_bytes()[:-100])
    _, said = await started()
    assert listed(said, name) == lost


@pytest.mark.parametrize("sequence", [3, 8])
async def test_a_block_that_ends_behind_a_whole_message_is_noticed(store, started, sequence):
    """The server's index tells of messages that the block has no longer."""
    block = file_of(store, "LLM/msgs/1.blk")
    data = block.read_bytes()
    end = data.index(b"x" * 300, data.index(f"r{sequence - 1}\r\n".encode())) + 300 + CHECKSUM_BYTES
    block.write_bytes(data[:end])
    _, said = await started()
    assert listed(said, "LLM") == set(range(sequence, 9))


async def test_after_a_kill_nothing_is_said(store, started):
    server = NatsServer(store)
    server.start()
    async with Bus.connect(server.url, name="test") as bus:
        puller = Puller(bus, STREAM_REQUESTS, nothing, 30.0)
        await puller.start()
        for _ in range(3):
            await (await taken(puller, "high")).ack()
        for number in range(3):
            await bus.store("llm.request.high", b"x" * 300, headers={MSG_ID: f"late-{number}"})
        await eventually(lambda: _holds(bus, 7))
    server.kill()
    assert (await started())[1] == []


@pytest.mark.parametrize("killed", [False, True])
async def test_of_what_was_replaced_and_purged_nothing_is_said(store, started, killed):
    server = NatsServer(store)
    server.start()
    async with Bus.connect(server.url, name="test") as bus:
        for number in range(5):
            await bus.store("llm.batch.b1.state", b"%d" % number, headers={"Nats-Rollup": "sub"})
            await bus.store("llm.batch.b1.result", b"x" * 300)
            await bus.store("llm.usage.hour.1", b"%d" % number)
        last = await bus.last_message(STREAM_BATCH, "llm.batch.b1.result")
        await bus.purge(STREAM_BATCH, "llm.batch.b1.result", up_to=last[0])
        await bus.purge(STREAM_FILES, f"{FILE_CHUNKS}.f1", up_to=1)
        await bus.delete(STREAM_USED, 1)
    (server.kill if killed else server.stop)()
    assert (await started())[1] == []


async def test_of_a_store_that_is_whole_nothing_is_said(store, started):
    assert (await started())[1] == []
    assert not (store / "set-aside").exists()

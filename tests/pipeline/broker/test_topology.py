"""A broker is brought to what is configured, once, and what cannot be changed is said."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from nats.js.api import AckPolicy, ConsumerConfig, StorageType, StreamConfig
from nats.js.errors import APIError, BadRequestError

from pipeline.broker import topology
from pipeline.broker.connection import Unreachable
from pipeline.broker.jetstream import Bus, LaneFull
from pipeline.broker.secret import learn_moves
from pipeline.config import Config
from pipeline.wire.subjects import (
    FORMER_CONSUMERS,
    GUARD_LANE,
    LANES,
    MSG_ID,
    STREAM_OLLAMA,
    STREAM_REQUESTS,
    STREAM_STATE,
    TENANT_SUBJECTS,
    Lane,
    Priority,
    Task,
)
from tests.waiting import eventually


@pytest.fixture
async def bare(nats_server):
    """A connection to a broker that has nothing yet."""
    async with Bus.connect(nats_server.url, name="test") as bus:
        yield bus


def changed(config: Config, **settings) -> Config:
    return msgspec.structs.replace(config, **settings)


async def test_everything_is_created_once_and_the_second_start_changes_nothing(bare, config):
    made = await topology.apply(bare.js, config)
    assert {change.action for change in made} == {"created"}
    assert len(made) == len({change.what for change in made}) == 9 + 10 + 3
    assert await topology.apply(bare.js, config) == []
    assert {state.name for state in await bare.consumers(STREAM_REQUESTS)} == {
        lane.consumer for lane in (*LANES, GUARD_LANE)
    }


async def test_everything_is_there_after_the_broker_was_killed(bare, config, nats_server):
    await topology.apply(bare.js, config)
    back = asyncio.Event()
    bare.on_reconnect(back.set)
    nats_server.kill()
    nats_server.start()
    await back.wait()
    assert await topology.apply(bare.js, config) == []


async def test_another_bound_and_another_lease_are_migrated_without_losing_a_request(bare, config):
    await topology.apply(bare.js, config)
    await bare.store("llm.request.high", b"x", headers={MSG_ID: "r1"})
    changes = await topology.apply(bare.js, changed(config, lane_max_messages=7, lease_s=9.0))
    by_name = {change.what: change.action for change in changes}
    assert "max_msgs_per_subject" in by_name[f"stream {STREAM_REQUESTS}"]
    assert "ack_wait" in by_name[f"consumer {STREAM_REQUESTS}/high_simple"]
    info = await bare.js.stream_info(STREAM_REQUESTS)
    assert (info.config.max_msgs_per_subject, info.state.messages) == (7, 1)
    assert (await bare.js.consumer_info(STREAM_REQUESTS, "low")).config.ack_wait == 9.0
    assert await topology.apply(bare.js, changed(config, lane_max_messages=7, lease_s=9.0)) == []


async def test_what_the_server_refuses_to_change_is_said_with_what_to_do(bare, config):
    await bare.js.add_stream(StreamConfig(name=STREAM_STATE, subjects=["llm.load.*"], storage=StorageType.MEMORY))
    with pytest.raises(topology.TopologyError, match=STREAM_STATE) as refused:
        await topology.apply(bare.js, config)
    assert "storage" in str(refused.value)
    assert "nats stream rm" in str(refused.value)


async def test_a_stream_of_somebody_else_on_our_subjects_is_said(bare, config):
    await bare.js.add_stream(StreamConfig(name="THEIRS", subjects=["llm.>"]))
    with pytest.raises(topology.TopologyError, match=STREAM_REQUESTS):
        await topology.apply(bare.js, config)


async def test_a_broker_that_does_not_answer_is_unreachable(bare, config, nats_server):
    nats_server.stop()
    with pytest.raises(Unreachable):
        await topology.apply(bare.js, config)


@pytest.mark.parametrize("subject", ["llm.request.low.simple", "llm.request.high"])
async def test_a_full_lane_refuses_and_the_others_go_on(bare, config, subject):
    await topology.apply(bare.js, changed(config, lane_max_messages=3))
    for number in range(3):
        await bare.store(subject, b"x", headers={MSG_ID: f"r{number}"})
    with pytest.raises(LaneFull):
        await bare.store(subject, b"x", headers={MSG_ID: "r3"})
    await bare.store("llm.request.medium", b"x", headers={MSG_ID: "r3"})


async def test_a_publisher_of_any_kind_reads_10077_from_a_full_lane(bare, config):
    await topology.apply(bare.js, changed(config, lane_max_messages=1))
    for number in range(2):
        answer = await bare.request("llm.request.high", b"x", headers={MSG_ID: f"r{number}"})
    assert msgspec.json.decode(answer.data)["error"]["err_code"] == 10077


async def test_only_the_subjects_of_lanes_are_taken(bare, config):
    await topology.apply(bare.js, config)
    for subject in ("llm.request.urgent", "llm.request.high.hard", "llm.ollama.urgent", "llm.request.high.simple.x"):
        with pytest.raises(Unreachable):
            await bare.store(subject, b"x", patience_s=0)


async def test_every_stored_request_is_announced_without_its_body(bare, config):
    await topology.apply(bare.js, config)
    heard = []

    async def on_announcement(message):
        heard.append(message)

    await bare.subscribe("llm.queued.>", on_announcement)
    await bare.nc.flush()
    await bare.store("llm.request.low.complex", b"secret", headers={MSG_ID: "r1"})
    await bare.store("llm.ollama.low", b"secret", headers={MSG_ID: "r2"})
    await eventually(lambda: len(heard) == 2)
    assert [message.headers[MSG_ID] for message in heard] == ["r1", "r2"]
    assert [message.headers["Nats-Subject"] for message in heard] == ["llm.request.low.complex", "llm.ollama.low"]
    assert [message.data for message in heard] == [b"", b""]
    assert (await bare.stream_state(STREAM_OLLAMA)).messages == 1


async def test_streams_of_an_older_version_are_left_alone_while_its_workers_run(bare, config):
    older = next(stream.config for stream in topology.streams(config) if stream.name == STREAM_REQUESTS)
    older.deny_purge = False
    await bare.js.add_stream(older)

    async def report() -> None:
        while True:
            await bare.publish("llm.worker.mlx-old-1", b"{}")
            await asyncio.sleep(0.05)

    reporting = asyncio.create_task(report())
    with pytest.raises(topology.TopologyError, match="mlx-old-1 of an older version"):
        await topology.apply(bare.js, config)
    reporting.cancel()
    changes = await topology.apply(bare.js, config)
    assert "deny_purge" in {change.what: change.action for change in changes}["stream LLM"]
    # The older version wants the stream as it was, and the server refuses that.
    with pytest.raises(APIError, match="purge"):
        await bare.js.update_stream(older)


async def test_all_processes_share_one_secret_which_covers_what_is_stored_later(bare, config, nats_server):
    await topology.apply(bare.js, config)
    await bare.store("llm.request.high", b"x", headers={MSG_ID: "r1:complex:1-2"})
    async with Bus.connect(nats_server.url, name="other") as other:
        await asyncio.gather(learn_moves(bare), learn_moves(other))
        assert bare.moves == other.moves
    assert (len(bare.moves.key), bare.moves.before) == (32, 1)


# ---- the consumers of tenants


def former(name: str) -> ConsumerConfig:
    """A consumer of a version in which one consumer served all named tenants."""
    priority, _, *task = name.split("_")
    subject = ".".join(["llm.request", priority, "t.*", *task])
    return ConsumerConfig(durable_name=name, filter_subject=subject, ack_policy=AckPolicy.EXPLICIT)


async def as_before(bare, config):
    """The stream as that version leaves it, with a request of a tenant in a worker's hands."""
    await topology.apply(bare.js, config)
    await bare.js.delete_consumer(STREAM_REQUESTS, GUARD_LANE.consumer)
    for name in FORMER_CONSUMERS:
        await bare.js.add_consumer(STREAM_REQUESTS, former(name))
    await bare.store("llm.request.low.t.ann", b"x", headers={MSG_ID: "t.ann.r1"})
    pull = await bare.js.pull_subscribe_bind(consumer="low_t", stream=STREAM_REQUESTS)
    assert len(await pull.fetch(1)) == 1


async def test_the_consumers_that_served_all_tenants_are_removed_and_their_requests_stay(bare, config):
    await as_before(bare, config)
    changes = await topology.apply(bare.js, config)
    assert {change.what for change in changes if change.action == "removed"} == {
        f"consumer {STREAM_REQUESTS}/{name}" for name in FORMER_CONSUMERS
    }
    assert await topology.apply(bare.js, config) == []
    lane = Lane(Priority.LOW, Task.UNTRIAGED, "ann")
    await topology.keep_consumer(bare.js, topology.lane_consumer(lane, config))
    assert (await bare.consumer(STREAM_REQUESTS, lane.consumer)).num_pending == 1


async def test_an_older_version_does_not_start_on_the_consumers_of_this_one(bare, config):
    """It makes this one before all others of tenants."""
    await topology.apply(bare.js, config)
    with pytest.raises(BadRequestError):
        await bare.js.add_consumer(STREAM_REQUESTS, former(FORMER_CONSUMERS[0]))


async def test_while_an_older_worker_runs_its_consumers_are_left_alone(bare, config):
    await as_before(bare, config)

    async def report():
        while True:
            await bare.publish("llm.worker.old", b"{}")
            await asyncio.sleep(0.05)

    reporting = asyncio.create_task(report())
    try:
        with pytest.raises(topology.TopologyError, match="Worker old"):
            await topology.apply(bare.js, config)
    finally:
        reporting.cancel()
    assert FORMER_CONSUMERS[0] in {state.name for state in await bare.consumers(STREAM_REQUESTS)}


async def test_more_consumers_than_the_server_lists_at_once_are_all_found(bare, config):
    await topology.apply(bare.js, config)
    lanes = [Lane(Priority.LOW, Task.UNTRIAGED, f"t{number}") for number in range(300)]
    for lane in lanes:
        await topology.keep_consumer(bare.js, topology.lane_consumer(lane, config))
        await bare.store(lane.subject, b"x", headers={MSG_ID: lane.tenant})
    assert {lane.consumer for lane in lanes} < {state.name for state in await bare.consumers(STREAM_REQUESTS)}
    assert await bare.subjects(STREAM_REQUESTS, TENANT_SUBJECTS) == {lane.subject: 1 for lane in lanes}
    await topology.remove_consumer(bare.js, lanes[0].consumer)
    await topology.remove_consumer(bare.js, lanes[0].consumer)
    assert await bare.consumer(STREAM_REQUESTS, lanes[0].consumer) is None


async def test_a_consumer_is_listed_although_others_are_removed_while_they_are_listed(bare, config, monkeypatch):
    await topology.apply(bare.js, config)
    lanes = [Lane(Priority.HIGH, Task.UNTRIAGED, f"t{number}") for number in range(270)]
    for lane in lanes:
        await topology.keep_consumer(bare.js, topology.lane_consumer(lane, config))
    request = Bus.request

    async def while_some_are_removed(self, subject, *args):
        answer = await request(self, subject, *args)
        if "CONSUMER.LIST" in subject:
            for lane in [lanes.pop() for _ in range(20)]:
                await topology.remove_consumer(bare.js, lane.consumer)
        return answer

    monkeypatch.setattr(Bus, "request", while_some_are_removed)
    found = {state.name for state in await bare.consumers(STREAM_REQUESTS)}
    assert found >= {lane.consumer for lane in (*LANES, *lanes)}


async def test_all_tenants_together_fill_the_stream_at_last(bare, config):
    await topology.apply(bare.js, changed(config, lane_max_messages=1, tenants_max_messages=1))
    for number in range(9 + 3):
        await bare.store(f"llm.request.low.t.t{number}", b"x", headers={MSG_ID: f"r{number}"})
    with pytest.raises(LaneFull, match="all tenants"):
        await bare.store("llm.request.low.t.more", b"x", headers={MSG_ID: "more"})

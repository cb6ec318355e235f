"""What is known of the queue is true, said at once, and a cancelled request reaches no engine."""

from __future__ import annotations

import socket
import time

import msgspec
import pytest

from consumers.monitor import load
from pipeline.delivery.puller import Puller
from pipeline.wire.messages import Load, PerPriorityCount, RequestEvent, Slots, WorkerStatus, encode
from pipeline.wire.subjects import STREAM_REQUESTS, STREAM_STATE, Priority
from tests.consumers.monitor.conftest import ask_service, cancel, position
from tests.pipeline.worker.conftest import Client
from tests.waiting import eventually, taken


@pytest.fixture
async def client(bus):
    return Client(bus)


class Loads:
    """The load events of one engine as a subscriber hears them."""

    def __init__(self) -> None:
        self.heard = []

    async def on_load(self, message):
        self.heard.append(msgspec.json.decode(message.data, type=Load))

    @property
    def last(self):
        return self.heard[-1]

    async def until(self, level):
        await eventually(lambda: self.heard and self.last.level == level, what=level)
        return self.heard[-1]


@pytest.fixture
async def loads(bus):
    loads = Loads()
    await bus.subscribe("llm.load.mlx", loads.on_load)
    return loads


def status(used=0, total=4, *, state="ready", worker="w1", models=("m",), engine="mlx", pending=0.0, simulated=False):
    return WorkerStatus(
        worker=worker,
        engine=engine,
        state=state,
        models=list(models),
        slots=Slots(used, total),
        running=PerPriorityCount(high=used),
        pending_tokens=pending,
        tokens_per_s=100.0,
        tokens_per_request=50.0,
        kv_bytes=0,
        kv_bytes_limit=0,
        at=time.time(),
        simulated=simulated,
    )


async def say(bus, message):
    await bus.publish(f"llm.worker.{message.worker}", encode(message))


@pytest.fixture
def only_changes(monkeypatch):
    """Nothing is looked at or published because time has passed: what is heard causes everything."""
    monkeypatch.setattr(load, "_EVERY_S", 3600.0)
    monkeypatch.setattr(load, "_EVERY_IDLE_S", 3600.0)


async def test_load_goes_up_and_down_through_its_levels_at_once(only_changes, monitor, bus, loads):
    await say(bus, status())
    await monitor()
    await say(bus, status())
    await loads.until("normal")
    calm = len(loads.heard)
    await say(bus, status(4, pending=400.0))
    full = await loads.until("saturated")
    assert (full.slots.used, full.slots.total) == (4, 4)
    assert full.saturation >= 1.0
    assert [heard.level for heard in loads.heard[calm:]][:2] == ["busy", "saturated"]

    async def idle_again():
        await say(bus, status())
        return loads.last.level == "normal"

    await eventually(idle_again)
    assert "busy" in [heard.level for heard in loads.heard[calm + 2 :]]


async def test_while_it_is_saturated_what_waits_is_told_as_it_grows(only_changes, monitor, bus, client, loads):
    """An overload begins with all slots in use and nothing waiting: by that alone nothing would be spilled yet."""
    await say(bus, status())
    await monitor()
    await say(bus, status())
    await loads.until("normal")
    await say(bus, status(4, pending=400.0))
    await loads.until("saturated")
    told = len(loads.heard)
    for number in range(8):
        await client.ask(f"r{number}", lane="low")
    await eventually(lambda: loads.last.predicted_wait_ms.low > 0)
    await eventually(lambda: len(loads.heard) > told + 10, what="ten more, though the level stays")
    assert {heard.level for heard in loads.heard[told:]} == {"saturated"}


async def test_what_keeps_arriving_counts_in_the_predicted_waits(monitor, bus, client):
    it = await monitor()
    for number in range(6):
        await client.ask(f"high-{number}")
    await client.ask("low", lane="low")
    await eventually(lambda: it.load._inflow["mlx"].per_s(bus.clock.now())[Priority.HIGH] > 0)
    assert it.load._inflow["ollama"].per_s(bus.clock.now())[Priority.HIGH] == 0


async def test_requests_that_are_stored_count_at_once(only_changes, monitor, bus, loads, client):
    await monitor()
    await say(bus, status(4))
    await loads.until("saturated")
    for number in range(3):
        await client.ask(f"r{number}", lane="low.simple")
    await say(bus, status(4))
    await eventually(lambda: loads.last.queued.low == 3)
    assert loads.last.predicted_wait_ms.low > loads.last.predicted_wait_ms.high


@pytest.mark.parametrize(("simulated", "keeps"), [(False, "mlx is measured alone before a request spills"), (True, "")])
async def test_an_engine_that_runs_is_measured_alone_first_and_a_simulated_one_is_not(
    only_changes, monitor, bus, loads, client, simulated, keeps
):
    await monitor()
    await say(bus, status(simulated=simulated))
    await client.ask("r", lane="low.simple")
    await say(bus, status(4, pending=400.0, simulated=simulated))
    await eventually(lambda: loads.heard and loads.last.queued.low and loads.last.level == "saturated")
    assert loads.last.keeps == keeps


async def test_the_last_load_is_kept_for_whoever_comes_late(monitor, bus, loads):
    await monitor()
    await say(bus, status(2))
    await eventually(lambda: loads.heard and loads.last.slots.used == 2)
    _, kept = await eventually(lambda: bus.last_message(STREAM_STATE, "llm.load.mlx"))
    assert msgspec.json.decode(kept, type=Load).engine == "mlx"


async def test_an_engine_without_a_worker_is_away_and_says_why(monitor, bus, loads):
    await monitor()
    await eventually(lambda: loads.heard)
    assert (loads.last.available, loads.last.level) == (False, "normal")
    assert "no worker" in loads.last.reason
    await say(bus, status())
    await eventually(lambda: loads.last.available)


async def test_the_statistics_count_what_happened(monitor, bus, client):
    await monitor()
    await client.ask("r1")
    for event in (
        RequestEvent("r0", "started", "high", "mlx", wait_ms=12.0),
        RequestEvent("r0", "done", "high", "mlx", wait_ms=12.0, ttft_ms=34.0, total_ms=50.0),
        RequestEvent("x", "failed", "low", "mlx", code="invalid_request"),
        RequestEvent("x", "spilled", "medium"),
        RequestEvent("x", "expired", "medium", code="deadline_exceeded"),
    ):
        await bus.publish(f"llm.event.{event.priority}.{event.kind}", encode(event))
    await say(bus, status(3))

    async def counted():
        statistics = await ask_service(bus, "llm.queue.stats")
        high, medium, low = (statistics[p] for p in ("high", "medium", "low"))
        if (high["queued"], high["running"], high["done"]) != (1, 3, 1):
            return None
        assert (low["failed"], medium["spilled"], medium["expired"]) == (1, 1, 1)
        assert (high["wait_ms"]["p50"], high["ttft_ms"]["p99"]) == (12.0, 34.0)
        return statistics

    statistics = await eventually(counted)
    assert set(statistics["engines"]) == {"mlx", "ollama"}
    assert statistics["engines"]["mlx"]["object"] == "headrace.load"
    assert statistics["dead"] == 0
    assert statistics["uptime_s"] >= 0
    assert (statistics["filled"], "positions" in statistics["unknown"]) == (1.0, False)


async def test_a_position_counts_those_before_it_in_the_same_lane(monitor, bus, client):
    await monitor()
    for number in range(3):
        await client.ask(f"r{number}", lane="medium")
    await client.ask("other", lane="high")
    await say(bus, status(4))

    async def third():
        found = await position(bus, "r2")
        return found if (found["position"], found["state"]) == (2, "queued") and found["eta_ms"] > 0 else None

    assert await eventually(third)
    assert (await position(bus, "r0"))["position"] == 0
    assert (await position(bus, "nobody"))["state"] == "unknown"
    assert (await position(bus, "* evil >"))["state"] == "unknown"


async def test_a_monitor_that_comes_later_knows_what_runs(monitor, bus, client):
    async def surplus(_):
        raise AssertionError

    for number in range(3):
        await client.ask(f"r{number}", lane="medium.simple")
    puller = Puller(bus, STREAM_REQUESTS, surplus, 30.0)
    await puller.start()
    await taken(puller, "medium_simple")
    await monitor()
    found = [await ask_service(bus, "llm.queue.position", f"r{number}".encode()) for number in range(3)]
    assert [(one["state"], one["position"]) for one in found] == [("running", 0), ("queued", 0), ("queued", 1)]


async def test_models_are_listed_once_and_internal_ones_never(monitor, bus):
    await monitor()
    await say(bus, status(models=("m", "tinyllama")))
    await say(bus, status(worker="w2", models=("qwen", "tinyllama:1.1b", "m"), engine="ollama"))

    async def listed():
        return [model["id"] for model in (await ask_service(bus, "llm.models"))["data"]] == ["m", "qwen"]

    await eventually(listed)


@pytest.mark.parametrize("first", ["the request", "the monitor"])
async def test_a_queued_request_that_is_cancelled_is_gone_and_its_reader_knows(monitor, bus, client, first):
    if first == "the monitor":
        await monitor()
    seen = await client.listen("_INBOX.me.1")
    await client.ask("r1", Reply_To="_INBOX.me.1")
    await client.ask("r2")
    if first == "the request":
        await monitor()
    assert await eventually(lambda: cancel(bus, "r1")) == "cancelled"
    answer = await client.answer("r1")
    assert answer.error.code == "cancelled"
    assert (await bus.stream_state(STREAM_REQUESTS)).messages == 1
    await eventually(lambda: seen)
    assert seen == [answer]

    async def counted():
        return (await ask_service(bus, "llm.queue.stats"))["high"]["cancelled"] == 1

    await eventually(counted)
    assert await cancel(bus, "r1") == "cancelled", "it is, however often that is said"
    assert await cancel(bus, "nobody") == "unknown"
    assert len(await client.record("r1")) == 1


async def test_a_request_nobody_knows_to_be_done_is_finished_when_it_is(monitor, bus, client):
    """Events may be lost: the record has the last word."""
    await monitor()
    await client.ask("r1")
    await eventually(lambda: _queued(bus, "r1"))
    body = b'{"object":"error","id":"r1","created":1,"error":{"code":"deadline_exceeded","message":"","type":"","param":null,"retryable":false}}'  # noqa: E501
    await bus.store("llm.out.r1", body, expected_last=0)
    await bus.delete(STREAM_REQUESTS, 1)
    assert await cancel(bus, "r1") == "finished"


async def _queued(bus, request_id):
    return (await ask_service(bus, "llm.queue.position", request_id.encode()))["state"] == "queued"


async def test_requests_with_headers_nobody_can_read_stop_no_monitor(monitor, bus, nats_server, client):
    headers = b"NATS/1.0"
    with socket.create_connection(("127.0.0.1", nats_server.port), timeout=5) as raw:
        raw.sendall(b'CONNECT {"headers":true,"verbose":false}\r\n')
        raw.sendall(b"HPUB llm.request.high %d %d\r\n" % (len(headers), len(headers) + 1) + headers + b"x\r\nPING\r\n")
        while not raw.recv(4096).endswith(b"PONG\r\n"):
            pass

    async def stored():
        return (await bus.stream_state(STREAM_REQUESTS)).messages == 1

    await eventually(stored)
    await client.ask("r2")
    await monitor()
    assert await eventually(lambda: _queued(bus, "r2"))
    assert await cancel(bus, "LLM-1") == "cancelled"


async def test_what_no_monitor_understands_stops_none(monitor, bus, client):
    await monitor()
    await bus.publish("llm.event.high.done", b"nonsense")
    await bus.publish("llm.worker.evil", b"nonsense")
    await bus.publish("llm.load.mlx", b"nonsense")
    await bus.publish("llm.queued.high", b"", headers={"Nats-Subject": "llm.request.high", "Nats-Sequence": "x"})
    await client.ask("r1")
    assert await eventually(lambda: _queued(bus, "r1"))


@pytest.mark.parametrize(("stream", "consumer"), [(STREAM_REQUESTS, "high"), ("LLM_OLLAMA", "ollama_low")])
async def test_a_consumer_that_was_deleted_is_created_again(monitor, bus, stream, consumer):
    await monitor()
    assert consumer in {state.name for state in await bus.consumers(stream)}
    await bus.js.delete_consumer(stream, consumer)

    async def back():
        return consumer in {state.name for state in await bus.consumers(stream)}

    await eventually(back)

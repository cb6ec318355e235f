"""What a person watches: a stream of all there is and then of changes, each caller's own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec
import pytest

from pipeline.broker.jetstream import Bus
from pipeline.broker.peers import Peers
from pipeline.config import Config
from pipeline.core.statistics import LaneStatistics, QueueStatistics
from pipeline.gateway import live
from pipeline.gateway.identity import Caller, make_key
from pipeline.gateway.live import Views, Watch
from pipeline.gateway.queue import StatisticsCache
from pipeline.gateway.responses import Registry
from pipeline.process.role import Role
from pipeline.telemetry import Tracing
from pipeline.wire.messages import Load, PerPriority, PerPriorityCount, RequestEvent, Slots, WorkerStatus, encode
from pipeline.wire.subjects import EVENT, LOAD, QUEUE_STATS, WORKER, Move, Priority
from tests.pipeline.gateway.conftest import Engine, Serve
from tests.support import NatsServer
from tests.waiting import eventually

SECRET, KEY = make_key("alice")
OTHER_SECRET, OTHER = make_key("bob")
BOSS_SECRET, BOSS = make_key("boss")
OPERATOR = msgspec.structs.replace(BOSS, operator=True)
ASK = "/v1/chat/completions"
CHAT = {"messages": [{"role": "user", "content": "hello"}]}
LATER = {"Prefer": "respond-async"}


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


class Watcher:
    """Reads the stream and keeps what a page would show."""

    def __init__(self) -> None:
        self.views: list[dict[str, Any]] = []
        self.text = ""
        self.shown: dict[str, Any] = {"requests": {}, "moves": [], "points": {"mlx": [], "ollama": []}}
        self.ended = False

    async def read(self, response: httpx.Response) -> None:
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                self.text += line
                self.take(json.loads(line.removeprefix("data: ")))
        self.ended = True

    def take(self, view: dict[str, Any]) -> None:
        self.views.append(view)
        for name, value in view.items():
            if name == "requests":
                self.shown["requests"] |= {request["id"]: request for request in value}
            elif name == "moves":
                self.shown["moves"] += value
            elif name == "points":
                for engine, points in value.items():
                    self.shown["points"][engine] += points
            else:
                self.shown[name] = value

    def state(self, request_id: str) -> str | None:
        return self.shown["requests"].get(request_id, {}).get("state")


@asynccontextmanager
async def watching(client: httpx.AsyncClient, headers: dict[str, str] | None = None) -> AsyncIterator[Watcher]:
    watcher = Watcher()
    async with client.stream("GET", "/queue/live", headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        reading = asyncio.create_task(watcher.read(response))
        await eventually(lambda: watcher.views, what="the first view")
        yield watcher
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reading


async def tell(bus: Bus, request_id: str, kind: str, **more: Any) -> None:
    event = RequestEvent(id=request_id, kind=kind, priority=Priority.HIGH, **more)
    await bus.publish(f"{EVENT}.high.{kind}", encode(event))


def status(**more: Any) -> WorkerStatus:
    fields: dict[str, Any] = {
        "worker": "mlx-1",
        "engine": "mlx",
        "state": "ready",
        "models": ["headrace-demo"],
        "slots": Slots(1, 2),
        "running": PerPriorityCount(high=1),
        "pending_tokens": 5.0,
        "tokens_per_s": 100.0,
        "tokens_per_request": 7.0,
        "kv_bytes": 1024,
        "kv_bytes_limit": 0,
        "at": time.time(),
    }
    return WorkerStatus(**(fields | more))


def load(saturation: float, *, level: str = "normal", reason: str = "because") -> Load:
    return Load(
        "mlx",
        level,
        saturation,
        PerPriority(high=5.0),
        PerPriorityCount(high=3),
        Slots(1, 2),
        100.0,
        reason,
        time.time(),
    )


async def test_a_request_is_followed_from_its_lane_to_its_end(serve: Serve, engine: Engine):
    async with serve() as client, watching(client) as watcher:
        accepted = await client.post(ASK, json=CHAT, headers={**LATER, "X-Priority": "high"})
        request_id = accepted.json()["id"]
        await eventually(lambda: watcher.state(request_id) == "queued")
        await tell(engine.bus, request_id, "started", engine="mlx", wait_ms=3.0)
        await eventually(lambda: watcher.state(request_id) == "running")
        await tell(engine.bus, request_id, "done", engine="mlx", wait_ms=3.0, ttft_ms=9.0, total_ms=20.0)
        await eventually(lambda: watcher.state(request_id) == "done")
        shown = watcher.shown["requests"][request_id]
        assert (shown["started_ms"], shown["first_ms"], shown["ended_ms"]) == (3.0, 9.0, 20.0)


async def test_who_comes_late_sees_what_was_before(serve: Serve, engine: Engine):
    async with serve() as client:
        async with watching(client) as first:
            request_id = (await client.post(ASK, json=CHAT, headers=LATER)).json()["id"]
            await engine.bus.publish(f"{LOAD}.mlx", encode(load(1.5, level="saturated")))
            await tell(engine.bus, request_id, "cancelled")
            await eventually(lambda: first.state(request_id) == "cancelled" and first.shown["points"]["mlx"])
        async with watching(client) as late:
            assert late.state(request_id) == "cancelled"
            assert [point[1:3] for point in late.shown["points"]["mlx"]] == [[1.5, "saturated"]]
            assert late.shown["about"]["saturated_at"] == 1.0


async def test_a_spill_comes_with_its_reason_and_what_answers_with_what_it_is(serve: Serve, engine: Engine):
    async with serve() as client, watching(client) as watcher:
        stand_in = status(worker="ollama-1", engine="ollama", models=["headrace-demo-mini"], standin=True)
        await engine.bus.publish(f"{WORKER}.ollama-1", encode(stand_in))
        headers = {
            "Nats-Msg-Id": engine.bus.moves.make("r1", Move.SPILLED, 1, 0.0),
            "Llm-Stored-At": repr(time.time() - 2),
            "Llm-Reason": "mlx is saturated: short",
        }
        await engine.bus.store("llm.ollama.low", b"hello", headers=headers)
        await eventually(lambda: watcher.state("r1") == "spilled" and watcher.shown["workers"])
        (move,) = watcher.shown["moves"]
        assert (move["id"], move["to"], move["reason"]) == ("r1", "ollama", "mlx is saturated: short")
        assert 1900 < watcher.shown["requests"]["r1"]["moved_ms"] < 60_000
        (worker,) = watcher.shown["workers"]
        assert (worker["standin"], worker["simulated"]) == (True, False)


async def test_a_tenant_sees_its_own_and_an_operator_everybodys(serve: Serve, engine: Engine):
    async with serve(http_keys=[KEY, OTHER, OPERATOR]) as client:
        assert (await client.get("/queue/live")).status_code == 401
        watched = [watching(client, bearer(secret)) for secret in (SECRET, OTHER_SECRET, BOSS_SECRET)]
        async with watched[0] as alice, watched[1] as bob, watched[2] as boss:
            for secret, name in ((SECRET, "job"), (OTHER_SECRET, "work")):
                await client.post(ASK, json=CHAT, headers={**bearer(secret), **LATER, "Idempotency-Key": name})
            await engine.bus.store("llm.request.low", b"hello", headers={"Nats-Msg-Id": "stray"})
            await eventually(lambda: {"alice-job", "bob-work", "stray"} <= set(boss.shown["requests"]))
            await eventually(lambda: alice.state("alice-job") and bob.state("bob-work"))
            assert set(alice.shown["requests"]) == {"alice-job"}
            assert set(bob.shown["requests"]) == {"bob-work"}
            assert (alice.shown["about"]["tenant"], alice.shown["about"]["sees_all"]) == ("alice", False)
            assert boss.shown["about"]["sees_all"] is True
        # Late comers are told no more than those who were there.
        async with watching(client, bearer(SECRET)) as alice:
            assert set(alice.shown["requests"]) == {"alice-job"}


async def test_only_an_operator_reaches_the_requests_of_others(serve: Serve, engine: Engine):
    async with serve(http_keys=[KEY, OPERATOR]) as client:
        # As the monitor answers where a request is known.
        async def known(_: str, body: bytes) -> bytes:
            return msgspec.json.encode({"id": body.decode(), "state": "queued" if body == b"alice-job" else "unknown"})

        await engine.bus.serve("queue", "a monitor", {"llm.queue.position": known})
        await engine.bus.nc.flush()
        assert (await client.get("/queue/requests/job", headers=bearer(SECRET))).status_code == 200
        assert (await client.get("/queue/requests/alice-job", headers=bearer(BOSS_SECRET))).status_code == 200
        assert (await client.get("/queue/requests/job", headers=bearer(BOSS_SECRET))).status_code == 404


async def test_an_internal_model_is_named_nowhere(serve: Serve, engine: Engine):
    async with serve() as client, watching(client) as watcher:
        models = ["qwen3:0.6b", "tinyllama:latest", "mlx-community/TinyLlama-1.1B"]
        said = status(engine="ollama", models=models, reason="pulling tinyllama")
        await engine.bus.publish(f"{WORKER}.mlx-1", encode(said))
        await tell(engine.bus, "r1", "triaged", wait_ms=1.0, reason="tinyllama says so")
        await eventually(lambda: watcher.state("r1") and watcher.shown["workers"])
        assert watcher.shown["workers"][0]["models"] == ["qwen3:0.6b"]
        assert "tinyllama" not in watcher.text.lower()


async def test_nonsense_on_the_broker_does_not_end_the_stream(serve: Serve, engine: Engine):
    async with serve() as client, watching(client) as watcher:
        await engine.bus.publish(f"{EVENT}.high.done", b"nonsense")
        await engine.bus.publish("llm.queued.llm.request.high", b"", headers={"Nats-Subject": "llm.elsewhere"})
        await tell(engine.bus, "r1", "started", engine="mlx", wait_ms=1.0)
        await eventually(lambda: watcher.state("r1") == "running")


async def test_after_the_broker_was_away_everything_is_told_anew(serve: Serve, engine: Engine, nats_server: NatsServer):
    async with serve() as client, watching(client) as watcher:
        await tell(engine.bus, "r1", "started", engine="mlx", wait_ms=1.0)
        await tell(engine.bus, "r2", "done", engine="mlx", wait_ms=1.0, total_ms=2.0)
        await eventually(lambda: watcher.state("r1") and watcher.state("r2"))
        nats_server.kill()
        nats_server.start()
        await eventually(lambda: sum("about" in view for view in watcher.views) == 2)
        again = next(view for view in reversed(watcher.views) if "about" in view)
        assert [(request["id"], request["state"]) for request in again["requests"]] == [("r2", "done")]


async def test_without_a_broker_it_says_so_though_nothing_is_heard(
    serve: Serve, engine: Engine, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
):
    async def statistics(_subject: str, _body: bytes) -> bytes:
        return msgspec.json.encode(
            QueueStatistics(LaneStatistics(), LaneStatistics(), LaneStatistics(), {}, {}, 0, 1.0)
        )

    monkeypatch.setattr(live, "KEEP_ALIVE_S", 0.05)
    await engine.bus.serve("queue", "a monitor", {QUEUE_STATS: statistics})
    async with serve() as client, watching(client) as watcher:
        await eventually(lambda: watcher.shown["lanes"] is not None)
        nats_server.kill()
        await eventually(lambda: watcher.shown["lanes"] is None)
        nats_server.start()


async def test_while_nobody_looks_the_monitor_is_not_asked(serve: Serve, engine: Engine):
    asked: list[bytes] = []

    async def statistics(_: str, body: bytes) -> bytes:
        asked.append(body)
        return b"{}"

    await engine.bus.serve("queue", "a monitor", {QUEUE_STATS: statistics})
    async with serve() as client:
        for number in range(50):
            await tell(engine.bus, f"r{number}", "started", engine="mlx", wait_ms=1.0)
        await engine.bus.nc.flush()
        # Its refusal reaches the gateway behind the events.
        assert (await client.get("/queue/requests/none")).status_code == 503
        before = len(asked)
        async with watching(client) as watcher:
            await eventually(lambda: len(watcher.shown["requests"]) == 50)
        assert before == 0
        assert len(asked) >= 1


async def test_the_stream_ends_when_the_gateway_stops(serve: Serve, engine: Engine):
    async with serve() as client, watching(client) as watcher:
        client.life.stop()
        await eventually(lambda: watcher.ended)


@pytest.mark.parametrize("events", [10, 3000])
async def test_a_reader_that_stands_still_gets_the_newest_and_nothing_is_kept_for_it(
    config: Config, bus: Bus, events: int
):
    role = Role("gateway", bus, Peers(bus), Tracing.from_environment(service="t", instance="t"))
    watch = Watch(role, config, StatisticsCache(bus), Registry())
    await watch.start()
    sent: list[bytes] = []
    first, reads = asyncio.Event(), asyncio.Event()

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))
        if b"event: all" in sent[-1]:
            first.set()
            await reads.wait()

    views = Views(watch, Caller("somebody"), watch._lookers, Registry())
    writing = asyncio.create_task(views.write(send))
    await first.wait()
    for number in range(events):
        await tell(bus, "r1" if number % 2 else f"r{number}", "returned")
    await tell(bus, "r1", "expired")
    await eventually(lambda: any(r.state == "expired" for r in watch.recent.requests(0, lambda _: True)))
    reads.set()
    await eventually(lambda: b"expired" in sent[-1])
    # However much there was: the head, all, and one change.
    assert len(sent) == 3
    assert len(sent[-1]) < 40_000
    writing.cancel()

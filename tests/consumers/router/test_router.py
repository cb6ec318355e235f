"""Under saturation the simple requests go to Ollama, the others to MLX's own lane, each once and with its id."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import msgspec
import pytest

from consumers.engines.ollama import OllamaClient
from consumers.router import Router
from pipeline.broker.jetstream import Bus
from pipeline.core import rests
from pipeline.delivery.puller import Puller
from pipeline.process.lifecycle import Lifecycle
from pipeline.process.role import role
from pipeline.wire.answers import ErrorAnswer, ErrorBody, Status
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import Load, PerPriority, PerPriorityCount, RequestEvent, Slots, WorkerStatus, encode
from pipeline.wire.pauses import Pause, PausedState
from pipeline.wire.subjects import MSG_ID, STREAM_OLLAMA, STREAM_REQUESTS, Move, Priority
from tests import waiting
from tests.faults import Process
from tests.lanes import listed
from tests.pipeline.worker.conftest import Client
from tests.waiting import eventually

SIMPLE = b"What is the capital of France?"
COMPLEX = b"Prove that there are infinitely many primes, and explain each step in detail."


@pytest.fixture
async def client(bus):
    return Client(bus)


class World:
    """MLX and Ollama as the router hears of them: said again and again, as the real ones do."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.level = "saturated"
        self.wait_ms = 30_000.0
        self.ollama_used = 0
        self.ollama_models = ["small"]
        self.embedding_models = ["embeds"]
        self.mlx_models = ["big"]
        self.events = []

    async def go_on(self) -> None:
        while True:
            await self.say()
            await asyncio.sleep(0.1)

    async def say(self) -> None:
        waits = PerPriority(high=self.wait_ms, medium=self.wait_ms, low=self.wait_ms)
        load = Load("mlx", self.level, 2.0, waits, PerPriorityCount(), Slots(4, 4), 100.0, "", at=0.0)
        await self._bus.publish("llm.load.mlx", encode(load))
        none, now = PerPriorityCount(), 0.0
        for status in (
            WorkerStatus("m1", "mlx", "ready", self.mlx_models, Slots(4, 4), none, 0.0, 100.0, 50.0, 0, 0, now),
            WorkerStatus(
                *("o1", "ollama", "ready", self.ollama_models, Slots(self.ollama_used, 4), none),
                *(0.0, 100.0, 50.0, 0, 0, now),
                embedding_models=self.embedding_models,
            ),
        ):
            await self._bus.publish(f"llm.worker.{status.worker}", encode(status))

    async def on_event(self, message) -> None:
        self.events.append(msgspec.json.decode(message.data, type=RequestEvent))

    async def told(self, count: int) -> None:
        """Wait for so many events. Each of them follows the move of which it tells."""
        await eventually(lambda: len(self.events) >= count, what=f"{count} events")


@pytest.fixture
async def world(bus):
    world = World(bus)
    await bus.subscribe("llm.event.>", world.on_event)
    await bus.nc.flush()
    return world


@pytest.fixture
async def router(config):
    """Starts a router; gives its lifecycle, its task and its connection."""
    tasks = []

    async def run(lifecycle, settings, connected):
        client = OllamaClient("127.0.0.1:1", idle_timeout_s=1, load_timeout_s=1)
        async with role("router", settings) as me:
            process = Process(me.bus)
            connected.set_result(process)
            await Router(replace(me, bus=process), settings, client).run(lifecycle)
        await client.close()

    async def start(**changes):
        ready = asyncio.Event()
        lifecycle = Lifecycle("router", drain_timeout_s=5)
        lifecycle.report = lambda state, *_, **__: ready.set() if state == "ready" else None
        settings = msgspec.structs.replace(config, lease_s=2.0, **changes)
        connected = asyncio.get_running_loop().create_future()
        tasks.append(asyncio.create_task(run(lifecycle, settings, connected)))
        await ready.wait()
        return lifecycle, tasks[-1], connected.result()

    yield start
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


@pytest.fixture
async def going_on(world):
    task = asyncio.create_task(world.go_on())
    yield world
    task.cancel()


async def stored(bus, stream):
    """(subject, message id, headers) of all that a stream holds."""
    return [(m.headers["Nats-Subject"], m.headers.get(MSG_ID), m) async for m in bus.scan(stream, ">")]


async def taken(bus, consumer):
    """What a puller takes that makes nothing of it."""

    async def surplus(_):
        raise AssertionError

    puller = Puller(bus, STREAM_REQUESTS, surplus, 30.0)
    await puller.start()
    delivery = await waiting.taken(puller, consumer)
    await puller.close()
    return delivery


async def places(bus):
    """Where each request is, by `<id>` or `<id>:<move>`; a request in two places is a failure."""
    found = {}
    for stream in (STREAM_REQUESTS, STREAM_OLLAMA):
        for subject, key, _ in await stored(bus, stream):
            name = ":".join((key or "without an id").split(":")[:2])
            assert name not in found
            found[name] = subject
    return found


async def until_places(bus, wanted):
    async def there():
        return await places(bus) == wanted

    try:
        await eventually(there)
    except AssertionError:
        assert await places(bus) == wanted


async def test_simple_requests_go_to_ollama_and_others_to_mlx_each_once(router, going_on, client, bus):
    await router()
    for lane in ("high", "low"):
        await client.ask(f"simple-{lane}", SIMPLE, lane)
        await client.ask(f"complex-{lane}", COMPLEX, lane)
    await client.ask("told", COMPLEX, "medium.simple")
    await until_places(
        bus,
        {
            "simple-high:spilled": "llm.ollama.high",
            "simple-low:spilled": "llm.ollama.low",
            "complex-high:complex": "llm.request.high.complex",
            "complex-low:complex": "llm.request.low.complex",
            "told:spilled": "llm.ollama.medium",
        },
    )
    await going_on.told(5)
    kinds = sorted((event.id, event.kind) for event in going_on.events)
    assert kinds == [
        ("complex-high", "triaged"),
        ("complex-low", "triaged"),
        ("simple-high", "spilled"),
        ("simple-low", "spilled"),
        ("told", "spilled"),
    ]
    # When triage began, for the dashboard.
    assert all(event.wait_ms is not None and event.wait_ms >= 0 for event in going_on.events)


async def test_tenants_requests_go_the_same_ways_and_stay_their_own(router, going_on, client, bus, config):
    await listed(bus, config, "high.t.acme", "high.t.bolt.simple")
    await router()
    await client.ask("t.acme.simple", SIMPLE, "high.t.acme")
    await client.ask("complex", COMPLEX, "high.t.acme")
    await client.ask("t.bolt.simple", SIMPLE, "high.t.bolt.simple")
    await until_places(
        bus,
        {
            "t.acme.simple:spilled": "llm.ollama.high",
            "t.acme.complex:complex": "llm.request.high.t.acme.complex",
            "t.bolt.simple:spilled": "llm.ollama.high",
        },
    )
    await going_on.told(3)
    assert {(event.id, event.tenant) for event in going_on.events} == {
        ("t.acme.simple", "acme"),
        ("t.acme.complex", "acme"),
        ("t.bolt.simple", "bolt"),
    }


async def test_a_moved_request_keeps_its_body_its_headers_and_its_age(router, going_on, client, bus):
    before = time.time()
    # What its publisher told the broker was for that one publish.
    headers = {"Reply_To": "_INBOX.me.1", "Nats_Expected_Stream": "LLM", "Llm_Timeout": "30", "Llm_Tenant": "alice"}
    await client.ask("r1", SIMPLE, **headers)
    await router()
    await until_places(bus, {"r1:spilled": "llm.ollama.high"})
    ((_, _, moved),) = await stored(bus, STREAM_OLLAMA)
    assert moved.data == SIMPLE
    assert (moved.headers["Reply-To"], moved.headers["Llm-Timeout"]) == ("_INBOX.me.1", "30")
    assert before - 1 <= float(moved.headers["Llm-Stored-At"]) <= time.time()
    assert "saturated" in moved.headers["Llm-Reason"]
    assert moved.headers["Llm-Task"] == "simple"
    await eventually(lambda: [(event.kind, event.tenant) for event in going_on.events] == [("spilled", "alice")])


async def test_a_request_without_an_id_keeps_the_one_in_its_puback(router, going_on, bus):
    sequence = await bus.store("llm.request.high", SIMPLE)
    await router()
    await until_places(bus, {f"LLM-{sequence}:spilled": "llm.ollama.high"})


async def test_what_cannot_be_read_is_refused_and_stops_no_router(router, going_on, client, bus):
    await router()
    await client.ask("bad", b'{"prompt":')
    await client.ask("evil", SIMPLE, Reply_To="llm.request.high")
    await client.ask("deep", b'{"prompt":"x","tools":' + b"[" * 100_000)
    await client.ask("good", SIMPLE)
    await until_places(bus, {"good:spilled": "llm.ollama.high"})
    assert await client.code("bad") == "invalid_request"
    assert await client.code("evil") == "reply_subject_denied"
    assert await client.code("deep") == "invalid_request"


async def test_a_request_for_a_model_that_ollama_lacks_stays_with_mlx(router, going_on, client, bus):
    await router()
    await client.ask("named", b'{"prompt":"What is the capital of France?","model":"big"}')
    await client.ask("theirs", b'{"prompt":"What is the capital of France?","model":"small"}')
    await until_places(bus, {"named:complex": "llm.request.high.complex", "theirs:spilled": "llm.ollama.high"})


async def test_an_exact_text_stays_with_mlx_whatever_its_publisher_says(router, going_on, client, bus):
    await router()
    await client.ask("exact", b'{"prompt":"What is the capital of France?","exact":true}', "high.simple")
    await until_places(bus, {"exact:complex": "llm.request.high.complex"})


async def test_a_form_that_ollama_has_no_parameter_for_stays_with_mlx_whatever_the_publisher_says(
    router, going_on, client, bus
):
    await router()
    tool = b'"tools":[{"function":{"name":"f"}}],"tool_choice":"required"'
    await client.ask("choice", b'{"prompt":"x","structured_outputs":{"choice":["a","b"]}}', "high.simple")
    await client.ask("forced", b'{"prompt":"x",%s}' % tool, "high.simple")
    await client.ask("json", b'{"prompt":"x","response_format":{"type":"json_object"}}', "high.simple")
    await until_places(
        bus,
        {
            "choice:complex": "llm.request.high.complex",
            "forced:complex": "llm.request.high.complex",
            "json:spilled": "llm.ollama.high",
        },
    )


async def test_what_mlx_could_not_answer_does_not_wait_for_it_whatever_it_asks(router, going_on, client, bus):
    await router()
    await client.ask("theirs", b'{"prompt":"%s","model":"small"}' % COMPLEX)
    await client.ask("texts", b'{"input":["a","b"]}', "low")
    await client.ask("strange", b'{"input":"a","model":"big"}')
    await until_places(
        bus,
        {
            "theirs:spilled": "llm.ollama.high",
            "texts:spilled": "llm.ollama.low",
            # MLX's consumer reports that no engine has it.
            "strange:complex": "llm.request.high.complex",
        },
    )
    await going_on.told(3)
    reasons = {event.id: event.reason for event in going_on.events}
    assert reasons["theirs"] == reasons["texts"] == "only ollama has its model"


async def test_while_no_worker_says_what_it_has_mlx_may_have_any_model(router, going_on, client, bus):
    going_on.mlx_models = []
    await router()
    await client.ask("theirs", b'{"prompt":"%s","model":"small"}' % COMPLEX)
    await until_places(bus, {"theirs:complex": "llm.request.high.complex"})


SHUT = {
    "MLX is not saturated": {"level": "busy"},
    "Ollama has no room": {"ollama_used": 8},
    "MLX would answer sooner": {"wait_ms": 1.0},
}


@pytest.mark.parametrize("why", SHUT)
async def test_the_gate_is_shut_and_opens_when_the_reason_is_gone(router, going_on, client, bus, why):
    open_gate = dict(vars(going_on))
    for name, value in SHUT[why].items():
        setattr(going_on, name, value)
    await going_on.say()
    await router()
    await client.ask("r1", SIMPLE)
    await _hears_for_a_while(bus)
    assert await places(bus) == {"r1": "llm.request.high"}
    assert (await bus.js.consumer_info(STREAM_REQUESTS, "high")).num_waiting == 0
    for name in SHUT[why]:
        setattr(going_on, name, open_gate[name])
    await until_places(bus, {"r1:spilled": "llm.ollama.high"})


async def _hears_for_a_while(bus):
    """Until a router has heard several load events."""
    heard = []

    async def on_load(message):
        heard.append(message)

    await bus.subscribe("llm.load.mlx", on_load)
    await eventually(lambda: len(heard) >= 4)


async def test_nothing_is_moved_without_a_load_event(router, world, client, bus):
    await router()
    await client.ask("r1", SIMPLE)
    await bus.nc.flush()
    assert await places(bus) == {"r1": "llm.request.high"}
    going_on = asyncio.create_task(world.go_on())
    await until_places(bus, {"r1:spilled": "llm.ollama.high"})
    going_on.cancel()


async def test_no_more_is_spilled_than_ollama_has_room_for(router, going_on, client, bus):
    await router(ollama_queue=2)
    for number in range(12):
        await client.ask(f"r{number}", SIMPLE)

    async def spilled():
        return len(await stored(bus, STREAM_OLLAMA))

    async def full():
        return await spilled() == 6

    await eventually(full)
    await _hears_for_a_while(bus)
    assert await spilled() == 6
    assert len(await stored(bus, STREAM_REQUESTS)) == 6


async def test_a_router_that_is_told_to_stop_finishes_the_move_it_has_begun(router, going_on, client, bus):
    lifecycle, task, process = await router()
    process.meets("hears late", lambda operation: operation.subject.startswith("llm.ollama."))
    await client.ask("r1", SIMPLE)
    await eventually(lambda: process.struck)
    lifecycle.stop(drain_s=5)
    assert not task.done()
    process.thaw()
    await asyncio.wait_for(task, waiting.TIMEOUT_S)
    await until_places(bus, {"r1:spilled": "llm.ollama.high"})


async def test_a_router_that_dies_between_the_two_steps_of_a_move_spills_once(router, going_on, client, bus):
    """The next one to come stores it under the same id and removes the original."""
    await client.ask("r1", SIMPLE)
    delivery = await taken(bus, "high")
    message_id = bus.moves.make("r1", Move.SPILLED, delivery.sequence, delivery.stored_at)
    await bus.store("llm.ollama.high", SIMPLE, headers={MSG_ID: message_id, "Llm-Stored-At": "1.0"})
    await delivery.nak()
    await router()
    await until_places(bus, {"r1:spilled": "llm.ollama.high"})
    assert len(await stored(bus, STREAM_OLLAMA)) == 1


async def begun(client, bus, request_id="r1"):
    """A request whose worker died when it had begun the answer."""
    await client.ask(request_id, b'{"prompt":"What is the capital of France?","stream":true}')
    delivery = await taken(bus, "high")
    started = Status(request_id, "started", int(delivery.stored_at), "mlx", "m", 1, 0.0)
    await bus.store(f"llm.out.{request_id}", encode(started), expected_last=0)


async def returns(bus):
    """How often the router has returned the first request of the lane `high`."""
    found = await bus.last_message("LLM_STATE", "llm.returned.high-1")
    return 0 if found is None else int(found[1])


async def test_an_answer_that_has_begun_stays_with_mlx(router, going_on, client, bus):
    await begun(client, bus)
    await router()
    await eventually(lambda: returns(bus), what="a return")
    assert await places(bus) == {"r1": "llm.request.high"}
    await client.ask("r2", b'{"prompt":"What is the capital of France?"}', lane="medium")
    await until_places(bus, {"r1": "llm.request.high", "r2:spilled": "llm.ollama.medium"})
    assert (await taken(bus, "high")).sequence == 1, "MLX takes it as it has room"


async def test_a_lane_with_a_begun_answer_at_its_head_is_left_alone_while_others_are_served(
    router, going_on, client, bus, monkeypatch
):
    monkeypatch.setattr(rests, "LEAVE_S", 3600.0)
    await begun(client, bus)
    await router()
    await eventually(lambda: returns(bus), what="a return")
    for number in range(8):
        await client.ask(f"m{number}", SIMPLE, lane="medium")
    await until_places(
        bus, {"r1": "llm.request.high"} | {f"m{number}:spilled": "llm.ollama.medium" for number in range(8)}
    )
    assert await returns(bus) == 1


async def test_a_request_that_has_ended_is_acknowledged_and_not_moved(router, going_on, client, bus):
    """Its worker died before it could acknowledge it."""
    await client.ask("r1", SIMPLE)
    delivery = await taken(bus, "high")
    last = ErrorAnswer("r1", int(delivery.stored_at), ErrorBody.of(HeadraceError(ErrorCode.CANCELLED, "by the test")))
    await bus.store("llm.out.r1", encode(last), expected_last=0)
    await router()
    await until_places(bus, {})
    assert await client.record("r1") == [last]


async def test_a_doubtful_request_that_waits_for_an_opinion_holds_up_no_other(
    monkeypatch, router, going_on, client, bus
):
    asked, may_answer = asyncio.Event(), asyncio.Event()

    async def ask(*_):
        asked.set()
        await may_answer.wait()
        return "yes"

    async def loaded(*_):
        return True

    monkeypatch.setattr(OllamaClient, "ask_internal", ask)
    monkeypatch.setattr(OllamaClient, "load_internal", loaded)
    await router(classifier_model="tinyllama", classifier_timeout_s=waiting.TIMEOUT_S)
    await client.ask("doubtful", b"Are tomatoes fruits?", "medium")
    await asyncio.wait_for(asked.wait(), waiting.TIMEOUT_S)
    await client.ask("simple", SIMPLE, "medium")
    await eventually(lambda: [e.id for e in going_on.events if e.kind == "spilled"] == ["simple"])
    may_answer.set()
    await eventually(lambda: [e.id for e in going_on.events if e.kind == "spilled"] == ["simple", "doubtful"])


async def test_what_is_paused_stays_on_its_lane(router, going_on, client, bus, config):
    await listed(bus, config, "high.t.acme", "high.t.bolt")
    pauses = PausedState(pauses=[Pause(Priority.LOW), Pause(tenant="acme")])
    await bus.store("llm.paused", msgspec.json.encode(pauses), expected_last=0)
    await router()
    await client.ask("low", SIMPLE, "low")
    await client.ask("t.acme.theirs", SIMPLE, "high.t.acme")
    await client.ask("high", SIMPLE, "high")
    await client.ask("t.bolt.other", SIMPLE, "high.t.bolt")
    await until_places(
        bus,
        {
            "low": "llm.request.low",
            "t.acme.theirs": "llm.request.high.t.acme",
            "high:spilled": "llm.ollama.high",
            "t.bolt.other:spilled": "llm.ollama.high",
        },
    )

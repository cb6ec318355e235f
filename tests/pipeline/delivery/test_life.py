"""A request takes only the ways drawn in docs/architecture.md, whichever process dies on them, and ends once."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections import defaultdict

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from consumers.router import evacuation, triage
from pipeline.broker import letters as dead
from pipeline.broker import topology
from pipeline.broker.jetstream import Bus
from pipeline.config import Config
from pipeline.core import placement
from pipeline.core.answer import expired
from pipeline.core.ending import Failed, Returned
from pipeline.engine import Misbehaved
from pipeline.wire.answers import Chunk, Completion, decode_answer, is_last
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import encode
from pipeline.wire.subjects import (
    DEAD,
    MOVED_STORED_AT,
    MSG_ID,
    REPLY_TO,
    STORED_SEQUENCE,
    STREAM_DEAD,
    STREAM_OLLAMA,
    Move,
)
from tests.pipeline.delivery.life import Life, message_id
from tests.support import ROOT, NatsServer
from tests.waiting import TIMEOUT_S, eventually

CANCELLED = HeadraceError(ErrorCode.CANCELLED, "as the test wants it")
CONSUMERS = ("high", "high_simple", "high_complex", "ollama_high")
STATE_OF_CODE = {ErrorCode.CANCELLED: "cancelled", ErrorCode.DEADLINE_EXCEEDED: "expired"}
ENDS = {"done", "failed", "cancelled", "expired"}
SUBJECTS = {"": "llm.request.high", "simple": "llm.request.high.simple", "complex": "llm.request.high.complex"}


def section():
    text = (ROOT / "docs/architecture.md").read_text()
    return text.split("## The life of a request")[1].split("\n## ")[0]


def drawn():
    """The transitions of the drawing; before its beginning and after its end a request has an empty state."""
    arrows = re.findall(r"^ *(\S+) --> ([^\s:]+)", section(), re.MULTILINE)
    return {(origin.strip("[*]"), end.strip("[*]")) for origin, end in arrows}


def listed():
    """The transitions of the table."""
    found = set()
    for line in re.findall(r"^\|(.*)\|$", section(), re.MULTILINE):
        origins, ends = ([word.strip() for word in cell.split(",")] for cell in line.split("|")[:2])
        if "from" not in origins and not origins[0].startswith("---"):
            found |= set(itertools.product(origins, ends))
    return found


TRANSITIONS = listed()
# What may be its process's last act.
DOOMED = ("pull", "route", "act", "withdraw")
_MOST_HANDS = 5
_ACTS = ("finish", "fail", "misbehave", "misbehave", "go away", "drain", "drain", "cancel", "expire")


class World:
    """One broker for all walks, and the event loop of all processes."""

    def __init__(self, server, folder):
        self.runner = asyncio.Runner()
        self.config = Config(
            nats_url=server.url,
            state_dir=str(folder),
            lease_s=3600.0,
            max_attempts=3,
            classifier_model="tinyllama",
        )
        self._connecting = Bus.connect(server.url, name="test")
        self.numbers = itertools.count(1)
        self.bus = self.runner.run(self._connecting.__aenter__())
        self.runner.run(topology.apply(self.bus.js, self.config))

    def close(self):
        self.runner.run(self._connecting.__aexit__(None, None, None))
        self.runner.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    server = NatsServer(tmp_path_factory.mktemp("nats"))
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "RETRY_DELAY_S", 0.0)
        patch.setattr(triage, "STAY_S", 0.0)
        patch.setattr(evacuation, "_STAYS_S", 0.0)
        world = World(server, tmp_path_factory.mktemp("state"))
        yield world
        world.close()
    server.stop()


class Walk:
    """One request's way. Each step is checked against what always holds."""

    def __init__(self, world):
        self.world = world
        self.life = Life(world.bus, world.config)
        self.id = f"walk-{next(world.numbers)}"
        self.inbox = world.bus.new_inbox()
        self.state = ""
        self.walked = set()
        self.seen, self.forwarded = [], []
        self.subscriptions = []

    async def publish(self, task="", *, streams=True, model=None, inbox=True):
        for subject, seen in ((f"llm.reply.{self.id}", self.seen), (self.inbox, self.forwarded)):

            async def on_message(message, seen=seen):
                seen.append(message.data)

            self.subscriptions.append(await self.life.bus.subscribe(subject, on_message))
        body = {"prompt": "x", "stream": streams} | ({"model": model} if model else {})
        self.request = SUBJECTS[task], msgspec.json.encode(body)
        self.headers = {MSG_ID: self.id} | ({REPLY_TO: self.inbox} if inbox else {})
        await self.step(self._publish(duplicate=False))

    async def publish_small(self):
        """What only Ollama has the model for."""
        await self.publish(model="small")

    async def publish_again(self):
        await self.step(self._publish(duplicate=True))

    async def _publish(self, *, duplicate):
        ack = await self.life.bus.put(self.request[0], self.request[1], headers=self.headers)
        assert ack.duplicate is duplicate

    # ---- steps

    async def step(self, action=None, *, served=False):
        """Do something, wait until nothing more comes of it, and see that it led where it may.

        Args:
            action: what to do.
            served: whether the request may have been running in between.
        """
        if action is not None:
            await action
        await self.life.quiet()
        before, self.state = self.state, await self.look()
        if before != self.state:
            ways = {(before, self.state)}
            if served and ways - TRANSITIONS:
                ways = {(before, "running"), ("running", self.state)}
            assert ways <= TRANSITIONS, (before, self.state)
            self.walked |= ways

    async def pull(self, kind, consumer, doom=None, steps=0):
        """Have a worker take the request and begin."""
        await self.step(self.life.take(kind, consumer, doom, steps), served=True)

    async def route(self, kind, consumer, how, doom=None, steps=0):
        """Have the router or the evacuation take the request and move it, or leave it."""
        hand = await self.life.take(kind, consumer, doom, steps)
        if hand is not None:
            self.life.routes(hand, how)
            await self.step()

    async def act(self, what, which=0, doom=None, steps=0):
        """Have an engine do something with a request that it runs, or have its worker interrupt it."""
        hands = [hand for hand in self.life.hands if hand.engine.is_asked]
        if not hands:
            return
        hand = hands[which % len(hands)]
        if hand.process.doom is None:
            hand.process.meets(doom, steps=steps)
        generation = hand.engine.generation
        hand.engine.is_asked = False
        match what:
            case "say":
                generation.say()
            case "finish":
                generation.say(finish=True)
            case "fail":
                generation.fail(HeadraceError(ErrorCode.ENGINE_FAILED, "as the test wants it"))
            case "misbehave":
                generation.fail(Misbehaved("as the test wants it"))
            case "go away":
                generation.fail(HeadraceError(ErrorCode.UNAVAILABLE, "as the test wants it"))
            case "drain":
                hand.serving.interrupt(Returned())
            case "cancel":
                hand.serving.interrupt(Failed(CANCELLED))
            case "expire":
                hand.serving.interrupt(Failed(expired()))
        await self.step()

    async def withdraw(self, error, which=0, doom=None, steps=0):
        copies = await self.life.copies()
        if copies:
            self.life.withdraws(copies[which % len(copies)], error, doom, steps)
            await self.step()

    async def replay(self):
        letters = [letter async for letter in dead.letters(self.life.bus, dead.Chosen(id=self.id))]
        if letters and self.state == "failed":
            await self.step(dead.replay(self.life.bus, letters[-1].sequence))

    async def lease_runs_out(self, which=0):
        stuck = [hand for hand in self.life.hands if hand.is_stuck]
        if stuck:
            await self.step(self.life.lease_runs_out(stuck[which % len(stuck)]))

    async def thaw(self, which=0):
        frozen = [hand for hand in self.life.hands if hand.process.is_frozen]
        if frozen:
            frozen[which % len(frozen)].process.thaw()
            await self.step(served=True)

    async def possible(self):
        """What may happen next, the likelier the more often it is named: methods and their first arguments."""
        hands = self.life.hands
        found = [("publish_again",)]
        if len(hands) < _MOST_HANDS:
            for consumer in [consumer for consumer in CONSUMERS if await self.life.can_be_had(consumer)]:
                by_ollama = consumer == "ollama_high"
                found += 4 * [("pull", "ollama" if by_ollama else "mlx", consumer)]
                if by_ollama:
                    found += 2 * [("route", "evacuation", consumer, Move.RETURNED)]
                elif consumer != "high_complex":
                    found += [("route", "router", consumer, how) for how in (Move.SPILLED, Move.COMPLEX, None)]
            if await self.life.copies():
                found += [("withdraw", error) for error in (CANCELLED, expired(queued=True))]
        if any(hand.engine.is_asked for hand in hands):
            found += 9 * [("act", "say")]
            found += [("act", what) for what in _ACTS]
        found += 4 * [("lease_runs_out",)] * any(hand.is_stuck for hand in hands)
        found += 4 * [("thaw",)] * any(hand.process.is_frozen for hand in hands)
        return found + 2 * [("replay",)] * (self.state == "failed")

    # ---- looking

    async def look(self):
        """The request's state as record and queues have it, after checking both."""
        record = [message for _, message in await self.life.bus.read_answers(f"llm.reply.{self.id}")]
        copies = await self._copies()
        created = max((self._created(copy) for copy in copies), default=0)
        last = record[-1] if record and is_last(record[-1]) and record[-1].created >= created else None
        assert last is not None or copies, "it is nowhere"
        ids = [self.life.bus.moves.read(message_id(copy), STREAM_OLLAMA, 1) for copy in copies]
        assert {request_id for request_id, _ in ids} <= {self.id}
        for messages in lives_of(record):
            check_messages(messages)
        if last is not None:
            return "done" if isinstance(last, Completion) else STATE_OF_CODE.get(last.error.code, "failed")
        # A replayed request is another life, even while a process still holds the previous one.
        if any(hand.holds and hand.serves and hand.serving.envelope.created >= created for hand in self.life.hands):
            return "running"
        move = ids[-1][1]
        if copies[-1].subject.startswith("llm.ollama."):
            return "spilled"
        return "triaged" if move in (Move.COMPLEX, Move.RETURNED) else "queued"

    async def _copies(self):
        """Where the request stands. The broker works off an acknowledgement in its own time."""

        async def settled():
            copies = await self.life.copies()
            return (copies,) if self.life.has_struck or len(copies) <= 1 else None

        return (await eventually(settled, what="one place for a request that no process died with"))[0]

    def _created(self, copy):
        return int(float(copy.headers.get(MOVED_STORED_AT, copy.stored_at)))

    async def end(self):
        """Frozen processes resume, leases run out, and healthy workers serve until the request has ended."""
        async with asyncio.timeout(TIMEOUT_S):
            while self.life.hands or await self.life.copies():
                await self.lease_runs_out()
                await self.thaw()
                await self.act("finish")
                for consumer in CONSUMERS:
                    await self.pull("ollama" if consumer == "ollama_high" else "mlx", consumer)
        assert self.state in ENDS
        record = [encode(m) for _, m in await self.life.bus.read_answers(f"llm.reply.{self.id}")]
        await eventually(lambda: self.seen[-len(record) :] == record)
        check_readers(self.seen, self.forwarded)

    async def close(self):
        for subscription in self.subscriptions:
            await self.life.bus.unsubscribe(subscription)
        for hand in self.life.hands:
            if hand.task is not None:
                hand.task.cancel()
        await asyncio.gather(*(hand.task for hand in self.life.hands if hand.task), return_exceptions=True)
        for stream, subject in (("LLM", "llm.request.>"), ("LLM_OLLAMA", "llm.ollama.>"), (STREAM_DEAD, f"{DEAD}.>")):
            async for message in self.life.bus.scan(stream, subject):
                await self.life.bus.delete(stream, int(message.headers[STORED_SEQUENCE]))


def lives_of(messages):
    """What belongs to one request; a replay begins another one under the same id."""
    lives = defaultdict(list)
    for message in messages:
        lives[message.created].append(message)
    return lives.values()


def check_messages(messages):
    """A record, or what a reader has seen of one, as far as it has come."""
    for number, message in enumerate(messages[:-1]):
        assert not is_last(message), ("something after the last message", messages[number:])
    chunks = [message for message in messages if isinstance(message, Chunk)]
    assert [chunk.seq for chunk in chunks] == list(range(len(chunks)))
    if messages and isinstance(messages[-1], Completion) and chunks:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == (messages[-1].choices[0].message.content or "")
        assert text.split() == [f"w{number}" for number in range(len(text.split()))]


def check_readers(seen, forwarded):
    """A live reader sees each record, whole; an inbox sees parts of it, repeated where a process died."""
    assert len(set(seen)) == len(seen), "something was said twice"
    for messages in lives_of(map(decode_answer, seen)):
        check_messages(messages)
        assert is_last(messages[-1])
    assert set(forwarded) <= set(seen)


# ---- the drawing


def test_drawing_and_table_show_the_same_transitions_and_the_same_ends():
    assert drawn() == listed() | {(end, "") for end in ENDS}


TO = {
    "queued": [("publish",)],
    "triaged": [("publish",), ("route", "router", "high", Move.COMPLEX)],
    "spilled": [("publish",), ("route", "router", "high", Move.SPILLED)],
    "running": [("publish",), ("pull", "mlx", "high")],
    "failed": [("publish",), ("pull", "mlx", "high"), ("act", "fail")],
}
BY_OLLAMA = [*TO["spilled"], ("pull", "ollama", "ollama_high")]
FOR_OLLAMA = [("publish_small",), ("pull", "mlx", "high", "freezes")]
WAYS = {
    ("", "queued"): TO["queued"],
    ("queued", "triaged"): TO["triaged"],
    ("queued", "spilled"): TO["spilled"],
    ("queued", "running"): TO["running"],
    ("triaged", "running"): [*TO["triaged"], ("pull", "mlx", "high_complex")],
    ("spilled", "running"): BY_OLLAMA,
    ("running", "spilled"): [*FOR_OLLAMA, ("thaw",)],
    ("running", "triaged"): [*BY_OLLAMA, ("act", "go away")],
    ("spilled", "triaged"): [*TO["spilled"], ("route", "evacuation", "ollama_high", Move.RETURNED)],
    ("running", "queued"): [*TO["running"], ("act", "drain")],
    ("running", "done"): [*TO["running"], ("act", "say"), ("act", "finish")],
    ("running", "failed"): TO["failed"],
    ("running", "cancelled"): [*TO["running"], ("act", "cancel")],
    ("running", "expired"): [*TO["running"], ("act", "say"), ("act", "expire")],
    ("failed", "queued"): [*TO["failed"], ("replay",)],
    **{(at, "cancelled"): [*TO[at], ("withdraw", CANCELLED)] for at in ("queued", "triaged", "spilled")},
    **{(at, "expired"): [*TO[at], ("withdraw", expired(queued=True))] for at in ("queued", "triaged", "spilled")},
}


def test_each_way_is_walked():
    assert set(WAYS) == listed()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way[0] or 'new'}-{way[1]}")
def test_every_transition_of_the_table_can_be_walked(world, way):
    async def walk():
        one = Walk(world)
        for name, *arguments in WAYS[way]:
            await getattr(one, name)(*arguments)
        assert way in one.walked
        assert one.state == way[1]
        await one.end()
        await one.close()

    world.runner.run(walk())


@pytest.mark.parametrize("wakes_first", [False, True])
def test_a_lease_that_runs_out_leads_back_to_the_queue(world, wakes_first):
    async def walk():
        one = Walk(world)
        await one.publish()
        await one.pull("mlx", "high", "freezes", 1)
        assert one.state == "running"
        await one.lease_runs_out()
        assert one.state == "queued"
        if wakes_first:
            await one.thaw()
        await one.pull("mlx", "high")
        await one.thaw()
        await one.act("finish")
        assert one.state == "done"
        await one.end()
        await one.close()

    world.runner.run(walk())


# ---- any way


class RequestLife(RuleBasedStateMachine):
    """One request and all processes that may hold it, dying or freezing before any broker operation.

    Only numbers are drawn, whatever there is to do: what can be drawn next must not hang on the broker's pace.
    """

    world = None

    def __init__(self):
        super().__init__()
        self.walk = Walk(self.world)

    def do(self, work):
        self.world.runner.run(work)

    @initialize(
        task=st.sampled_from(["", "", "simple", "complex"]),
        streams=st.booleans(),
        model=st.sampled_from([None, None, "small"]),
        inbox=st.booleans(),
    )
    def publish(self, task, streams, model, inbox):
        self.do(self.walk.publish(task, streams=streams, model=model, inbox=inbox))

    @rule(
        what=st.sampled_from(range(840)),
        which=st.integers(0, 3),
        doom=st.sampled_from([None, None, "dies", "freezes"]),
        steps=st.integers(0, 4),
    )
    def go_on(self, what, which, doom, steps):
        """One of all that may happen now."""

        async def one():
            possible = await self.walk.possible()
            name, *arguments = possible[what % len(possible)]
            note(f"{name} {arguments} {which} {doom} {steps}")
            if name in DOOMED:
                arguments += [doom, steps]
            if name in ("lease_runs_out", "thaw", "act", "withdraw"):
                arguments.insert(1 if name in DOOMED else 0, which)
            await getattr(self.walk, name)(*arguments)

        self.do(one())

    def teardown(self):
        try:
            self.do(self.walk.end())
        finally:
            self.do(self.walk.close())


def wander(world, **how):
    machine = type("RequestLife", (RequestLife,), {"world": world})
    checks = list(HealthCheck)
    # What fails is short enough to read, and a walk takes its time: nothing is tried to make it shorter.
    phases = [Phase.generate]
    run_state_machine_as_test(
        machine, settings=settings(deadline=None, database=None, phases=phases, suppress_health_check=checks, **how)
    )


def test_whatever_dies_on_the_way_a_request_goes_only_where_it_may_and_ends_once(world):
    wander(world, max_examples=60, stateful_step_count=25)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_same_for_very_many_ways(world):
    wander(world, max_examples=700, stateful_step_count=40)

"""A request in hand is ended once, in the order of the table, and only by the process that holds it."""

from __future__ import annotations

import time

import msgspec
import pytest

from pipeline.broker.connection import Unreachable
from pipeline.broker.jetstream import LaneFull
from pipeline.core import ending
from pipeline.core.answer import AnswerWriter, error_answer
from pipeline.core.ending import (
    NEEDS_LEASE,
    Abandoned,
    Answered,
    Buried,
    EndStep,
    Failed,
    Loss,
    Moved,
    Returned,
    Settled,
)
from pipeline.core.envelope import read_envelope
from pipeline.core.index import Place
from pipeline.delivery.held import Fresh, Held, MustEnd, Resumed
from pipeline.delivery.lease import LeaseKeeper
from pipeline.delivery.puller import Puller
from pipeline.delivery.returns import times_returned
from pipeline.delivery.withdraw import withdraw
from pipeline.telemetry import Tracing
from pipeline.wire.answers import Status, Usage
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import RequestEvent, encode
from pipeline.wire.subjects import (
    MSG_ID,
    REPLY_TO,
    STREAM_DEAD,
    STREAM_OLLAMA,
    STREAM_REQUESTS,
    Move,
    Priority,
    Task,
)
from tests.faults import Operation, Process
from tests.waiting import eventually

CANCELLED = HeadraceError(ErrorCode.CANCELLED, "as the test wants it")
CRASHED = HeadraceError(ErrorCode.ENGINE_FAILED, "as the test wants it")
EXPIRED = HeadraceError(ErrorCode.DEADLINE_EXCEEDED, "as the test wants it")
INBOX = "_INBOX.reader.1"


def step_of(operation: Operation) -> EndStep | None:
    """Which step an operation is."""
    subjects = {
        "llm.dead.": EndStep.LETTER,
        "llm.used": EndStep.ACCOUNT,
        "llm.out.": EndStep.CLOSE,
        INBOX: EndStep.FORWARD,
        "llm.request.": EndStep.MOVE,
        "llm.ollama.": EndStep.MOVE,
        "llm.returned.": EndStep.NOTE,
        "$JS.API.STREAM.MSG.DELETE.": EndStep.REMOVE,
        "llm.event.": EndStep.TELL,
    }
    answers = {b"+ACK": EndStep.REMOVE, b"-NAK": EndStep.RETURN}
    found = next((step for start, step in subjects.items() if operation.subject.startswith(start)), None)
    return found or answers.get(operation.data[:4])


class Recorded(Process):
    """A process that holds requests, and whose steps are written down.

    Attributes:
        leases: of its requests.
        done: its steps so far.
        loses_lease_at: the step during which its leases run out.
    """

    def __init__(self, bus):
        super().__init__(bus)
        self.leases = LeaseKeeper(60.0)
        self.done = []
        self.loses_lease_at = None
        self.seen = self._note

    def _note(self, operation):
        if (step := step_of(operation)) is not None:
            self.done.append(step)
            if step is self.loses_lease_at:
                self.lose_leases()

    def lose_leases(self):
        for lease in self.leases._leases:
            lease.expires_at = time.monotonic()


@pytest.fixture
async def publish(bus):
    """Stores a request and takes it in hand."""

    async def publish(process=None, *, request_id="r1", delivered=1, body=b'{"prompt":"x"}', engine="mlx"):
        process = process or Recorded(bus)
        await bus.store("llm.request.high", body, headers={MSG_ID: request_id, REPLY_TO: INBOX})
        for number in range(delivered):
            delivery = await eventually(lambda: take(process), what="a delivery")
            if number + 1 < delivered:
                await delivery.nak()
        return hold(process, delivery, engine)

    return publish


async def again(bus):
    """The next delivery, in the hands of another process."""
    process = Recorded(bus)
    return hold(process, await eventually(lambda: take(process), what="a delivery"))


async def take(bus):
    async def nothing(_):
        raise AssertionError

    puller = Puller(bus, STREAM_REQUESTS, nothing, 30.0)
    await puller.start()
    return await puller.take("high")


def hold(process, delivery, engine="mlx"):
    envelope = read_envelope(delivery, Priority.HIGH, moves=process.moves)
    held = Held.taken(process, delivery, envelope, process.leases, tracing=Tracing(), engine=engine)
    held.delivery, held.process_ = delivery, process
    return held


def answer_of(held):
    writer = AnswerWriter(held.envelope, "mlx", "m", 1, held.envelope.stored_at + 1, "its turn")
    return writer.completion("stop", Usage(1, 2, 3), now=held.envelope.stored_at + 2)


MOVED = Moved("llm.ollama.high", Move.SPILLED, Task.SIMPLE, "as the test wants it")
OUTCOMES = {
    "answered": lambda held: Answered(answer_of(held)),
    "failed": lambda _: Failed(CANCELLED),
    "buried": lambda _: Buried(CRASHED),
    "moved": lambda _: MOVED,
    "returned": lambda _: Returned(),
    "a failed attempt": lambda _: Returned(uses_attempt=True),
    "settled": lambda held: Settled(answer_of(held)),
    "a second copy": lambda _: Settled(None),
    "abandoned": lambda _: Abandoned(Loss.LEASE),
}


async def record(bus, request_id="r1"):
    return [message for _, message in await bus.read_answers(f"llm.reply.{request_id}")]


async def left(bus, stream):
    return (await bus.stream_state(stream)).messages


# ---- the order


@pytest.mark.parametrize("name", OUTCOMES)
async def test_the_steps_of_an_outcome_are_done_in_the_order_of_the_table(publish, name):
    held = await publish()
    await held.began(wait_ms=1.0)
    held.process_.done.clear()
    outcome = OUTCOMES[name](held)
    assert await held.end(outcome) == outcome == held.outcome
    assert tuple(held.process_.done) == ending.steps(outcome)


@pytest.mark.parametrize("name", OUTCOMES)
async def test_a_process_that_loses_its_lease_goes_on_with_no_step_that_needs_it(publish, bus, name):
    steps = ending.steps(OUTCOMES[name](await publish()))
    for number, step in enumerate(steps):
        held = await publish(request_id=f"r{number + 2}")
        await held.began(wait_ms=1.0)
        held.process_.done.clear()
        if number == 0:
            held.process_.lose_leases()
        else:
            held.process_.loses_lease_at = steps[number - 1]
        ended = await held.end(OUTCOMES[name](held))
        assert held.process_.done[:number] == list(steps[:number])
        assert not NEEDS_LEASE & set(held.process_.done[number:])
        if step in NEEDS_LEASE:
            assert ended == Abandoned(Loss.LEASE)


async def test_after_a_standstill_a_request_is_abandoned_whatever_its_holder_wants(publish, bus):
    process = Recorded(bus)
    process.leases._standstill._doubtful_until = time.monotonic() + 60
    held = await publish(process)
    assert await held.open() == Abandoned(Loss.STOOD_STILL)
    assert await held.end(Returned()) == Abandoned(Loss.STOOD_STILL)
    assert process.done == [EndStep.NOTE]
    assert await times_returned(bus, held.delivery) == 1


async def test_a_request_ends_once(publish, bus):
    held = await publish()
    first = await held.end(Failed(CANCELLED))
    assert await held.end(Answered(answer_of(held))) is first
    assert await record(bus) == [error_answer(held.envelope, CANCELLED)]


async def test_a_lease_is_renewed_until_the_end(publish, bus):
    held = await publish()
    assert held.process_.leases._leases
    await held.end(Abandoned(Loss.LEASE))
    assert not held.process_.leases._leases


# ---- what the broker holds then


async def test_an_answer_is_in_the_record_and_at_the_reply_to_and_the_request_is_gone(publish, bus):
    seen = await listen(bus, INBOX)
    held = await publish()
    answer = answer_of(held)
    await held.end(Answered(answer))
    assert await record(bus) == [answer]
    await eventually(lambda: seen == [encode(answer)])
    await none_left(bus)


async def test_the_last_message_is_encoded_once_for_the_record_and_the_reply_to(publish, bus, monkeypatch):
    encoded = []

    def counting(message):
        encoded.append(message)
        return encode(message)

    monkeypatch.setattr("pipeline.delivery.held.encode", counting)
    held = await publish()
    answer = answer_of(held)
    await held.end(Answered(answer))
    assert held.process_.done.count(EndStep.FORWARD) == 1
    assert encoded.count(answer) == 1


async def test_a_buried_request_is_a_dead_letter_with_its_attempt(publish, bus):
    held = await publish(delivered=2)
    assert isinstance(await held.open(), Fresh)
    await held.end(Buried(CRASHED))
    (letter,) = [message async for message in bus.scan(STREAM_DEAD, ">")]
    assert (letter.headers["Llm-Id"], letter.headers["Llm-Attempts"]) == ("r1", "2")
    assert await record(bus) == [error_answer(held.envelope, CRASHED)]
    await none_left(bus)


@pytest.mark.parametrize("over", [0, 1000], ids=["with its headers", "alone"])
async def test_an_answer_that_the_broker_does_not_accept_ends_the_request(publish, bus, over):
    reported = await listen(bus, "llm.store.failed")
    held = await publish()
    ended = await held.end(Answered(sized(answer_of(held), bus.max_payload + over)))
    assert isinstance(ended, Failed)
    assert ended.error.code is ErrorCode.REQUEST_TOO_LARGE
    assert await record(bus) == [error_answer(held.envelope, ended.error)]
    await none_left(bus)
    # The store is well: other requests go on.
    assert reported == []


async def test_a_part_of_an_answer_that_the_broker_does_not_accept_ends_the_request(publish, bus):
    held = await publish()
    await held.open()
    with pytest.raises(MustEnd) as raised:
        await held.say(sized(answer_of(held), bus.max_payload))
    assert raised.value.outcome.error.code is ErrorCode.REQUEST_TOO_LARGE


def sized(answer, size):
    """An answer whose message has `size` bytes."""
    message = answer.choices[0].message
    message.content = ""
    message.content = "x" * (size - len(encode(answer)))
    return answer


@pytest.fixture
def just_fits(bus):
    """A request that has no room for further headers."""
    return b"x" * (bus.max_payload - 100)


async def test_a_request_without_room_for_the_headers_of_a_move_stays_where_it_can_be_answered(publish, bus, just_fits):
    held = await publish(body=just_fits, engine=None)
    ended = await held.end(MOVED)
    assert isinstance(ended, Returned)
    assert ended.error.code is ErrorCode.REQUEST_TOO_LARGE
    assert await record(bus) == []
    assert (await left(bus, STREAM_REQUESTS), await left(bus, STREAM_OLLAMA)) == (1, 0)
    assert await times_returned(bus, held.delivery) == 1


async def test_a_request_that_must_move_and_has_no_room_for_that_is_told_so(publish, bus, just_fits):
    held = await publish(body=just_fits)
    ended = await held.end(MOVED)
    assert ended.error.code is ErrorCode.REQUEST_TOO_LARGE
    assert "headers of a move" in ended.error.message
    assert await record(bus) == [error_answer(held.envelope, ended.error)]
    await none_left(bus)


async def test_a_request_without_room_for_the_headers_of_a_letter_has_failed_all_the_same(publish, bus, just_fits):
    held = await publish(body=just_fits)
    ended = await held.end(Buried(CRASHED))
    assert ended.error.code is ErrorCode.ENGINE_FAILED
    assert "not kept in the dead letters" in ended.error.message
    assert await record(bus) == [error_answer(held.envelope, ended.error)]
    assert await left(bus, STREAM_DEAD) == 0
    await none_left(bus)


async def test_a_move_to_a_full_lane_is_a_return_that_costs_no_attempt(publish, bus):
    process = Full(bus)
    held = await publish(process)
    ended = await held.end(MOVED)
    assert isinstance(ended, Returned)
    assert await left(bus, STREAM_OLLAMA) == 0
    assert await left(bus, STREAM_REQUESTS) == 1
    assert await times_returned(bus, held.delivery) == 1


class Full(Recorded):
    """The lane of each move is full."""

    async def store(self, subject, data, **more):
        if subject.startswith("llm.ollama."):
            raise LaneFull(subject)
        return await super().store(subject, data, **more)


async def test_a_failed_attempt_counts_and_a_return_does_not(publish, bus):
    held = await publish()
    await held.end(Returned(uses_attempt=True))
    held = await again(bus)
    await held.open()
    assert held.tries == 2
    await held.end(Returned())
    held = await again(bus)
    await held.open()
    assert held.tries == 2


async def test_a_broker_that_is_away_leaves_the_request_to_a_later_delivery(publish, bus):
    held = await publish()
    held.process_.meets("hears nothing", lambda operation: operation.subject.startswith("llm.returned."))
    # A note that may not have been stored is no reason to keep the request.
    assert await held.end(Returned()) == Returned()
    held = await again(bus)
    held.process_.meets("hears nothing", lambda operation: operation.subject.startswith("$JS.API.DIRECT.GET.LLM_STATE"))
    assert await held.open() == Abandoned(Loss.BROKER)


# ---- opening


async def test_a_request_is_fresh_until_something_is_said_and_settled_once_it_has_ended(publish, bus):
    held = await publish()
    assert await held.open() == Fresh()
    said = Status("r1", "started", held.envelope.created, "mlx", "m", 1, 0.0)
    await held.say(said)
    await held.delivery.nak()
    other = await again(bus)
    opened = await other.open()
    assert isinstance(opened, Resumed)
    assert (opened.record.last_sequence, other.attempt) == (1, 2)
    await other.end(Failed(CANCELLED))
    assert not await withdraw(bus, Place(STREAM_REQUESTS, Priority.HIGH, 1), EXPIRED)


async def test_a_closed_record_settles_the_next_delivery(publish, bus):
    held = await publish()
    process = held.process_
    process.meets("loses", lambda operation: operation.data == b"+ACK")
    await held.end(Failed(CANCELLED))
    await held.delivery.nak()
    other = await again(bus)
    opened = await other.open()
    assert opened == Settled(error_answer(held.envelope, CANCELLED))
    await other.end(opened)
    assert len(await record(bus)) == 1
    await none_left(bus)


async def test_a_process_that_was_overtaken_says_nothing_more(publish, bus):
    held = await publish()
    said = Status("r1", "started", held.envelope.created, "mlx", "m", 1, 0.0)
    await held.say(said)
    await held.delivery.nak()
    other = await again(bus)
    await other.open()
    await other.say(msgspec.structs.replace(said, state="restarted", attempt=2))
    with pytest.raises(MustEnd) as must:
        await held.say(msgspec.structs.replace(said, reason="late"))
    assert must.value.outcome == Abandoned(Loss.OVERTAKEN)
    assert await held.end(Failed(CANCELLED)) == Abandoned(Loss.OVERTAKEN)
    assert len(await record(bus)) == 2


async def test_without_the_lease_nothing_is_said(publish, bus):
    held = await publish()
    held.process_.lose_leases()
    with pytest.raises(MustEnd) as must:
        await held.say(Status("r1", "started", held.envelope.created, "mlx", "m", 1, 0.0))
    assert must.value.outcome == Abandoned(Loss.LEASE)
    assert await record(bus) == []


# ---- what stands in a queue


async def test_a_request_that_waits_is_closed_and_then_deleted(bus):
    process = Recorded(bus)
    sequence = await bus.store("llm.request.high", b"x", headers={MSG_ID: "r1", REPLY_TO: INBOX})
    assert await withdraw(process, Place(STREAM_REQUESTS, Priority.HIGH, sequence), CANCELLED)
    assert process.done == list(ending.steps(Failed(CANCELLED)))
    assert [message.error.code for message in await record(bus)] == ["cancelled"]
    assert await left(bus, STREAM_REQUESTS) == 0


async def test_what_stands_at_another_sequence_is_left_alone_though_it_bears_the_same_id(bus):
    first = await bus.store("llm.request.high", b"x", headers={MSG_ID: "r1"})
    place = Place(STREAM_REQUESTS, Priority.HIGH, first)
    assert await withdraw(bus, place, CANCELLED)
    await bus.purge("LLM_REPLIES", "llm.reply.r1", up_to=1 << 40)
    # As if the two minutes were over in which the same id is the same request.
    await bus.store("llm.request.high", b"x", headers={MSG_ID: bus.moves.make("r1", Move.REPLAYED, 1, 1.0)})
    assert not await withdraw(bus, place, CANCELLED)
    assert await left(bus, STREAM_REQUESTS) == 1
    assert await record(bus) == []


async def test_an_answer_that_has_begun_is_ended_or_left_alone_as_its_caller_wants(publish, bus):
    held = await publish()
    await held.say(Status("r1", "started", held.envelope.created, "mlx", "m", 1, 0.0))
    place = Place(STREAM_REQUESTS, Priority.HIGH, held.delivery.sequence)
    assert not await withdraw(bus, place, CANCELLED, untouched=True)
    assert len(await record(bus)) == 1
    assert await withdraw(bus, place, CANCELLED)
    assert [type(message).__name__ for message in await record(bus)] == ["Status", "ErrorAnswer"]
    # The worker that ran it is refused.
    assert await held.end(Answered(answer_of(held))) == Abandoned(Loss.OVERTAKEN)


async def listen(bus, subject):
    seen = []

    async def on_message(message):
        seen.append(message.data)

    await bus.subscribe(subject, on_message)
    await bus.nc.flush()
    return seen


async def none_left(bus):
    async def empty():
        return await left(bus, STREAM_REQUESTS) == 0

    await eventually(empty)


async def test_a_request_that_was_moved_tells_its_event(publish, bus):
    seen = await listen(bus, "llm.event.high.>")
    await (await publish()).end(MOVED)
    await eventually(lambda: seen)
    event = msgspec.json.decode(seen[0], type=RequestEvent)
    assert (event.id, event.kind, event.reason) == ("r1", "spilled", "as the test wants it")


class Broken(Recorded):
    """Its broker stores no answers."""

    async def put(self, subject, data, **more):
        if subject.startswith("llm.out."):
            raise Unreachable("no space left on device")
        return await super().put(subject, data, **more)


async def test_a_request_whose_answer_the_broker_does_not_store_has_used_up_no_attempt(publish, bus):
    held = await publish(Broken(bus))
    assert await held.end(Answered(answer_of(held))) == Abandoned(Loss.BROKER)
    await eventually(lambda: _returns(bus, held.delivery, 1))
    await held.delivery.nak()
    held = await again(bus)
    await held.open()
    assert (held.envelope.delivered, held.tries) == (2, 1)


async def _returns(bus, delivery, times):
    return await times_returned(bus, delivery) == times

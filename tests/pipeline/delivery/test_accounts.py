"""The accounts of requests that end together: each counts once, wherever a process dies, freezes or is overtaken."""

from __future__ import annotations

import asyncio

import pytest

from pipeline.broker.topology import USED_DUPLICATE_WINDOW_S
from pipeline.broker.usage import NoteFeed
from pipeline.core.answer import AnswerWriter
from pipeline.core.ending import Abandoned, Answered, Loss, Settled
from pipeline.core.envelope import read_envelope
from pipeline.core.usage import Accounts
from pipeline.delivery.held import Held
from pipeline.delivery.lease import LeaseKeeper
from pipeline.delivery.puller import Puller
from pipeline.telemetry import Tracing
from pipeline.wire.answers import Usage
from pipeline.wire.subjects import MSG_ID, STREAM_REQUESTS, STREAM_USED, USED, Priority
from tests.faults import Died, Operation, Process
from tests.waiting import eventually, taken

COUNT = 12


async def nothing(_) -> None:
    raise AssertionError


class Worker:
    """A process that takes requests and answers them."""

    def __init__(self, bus) -> None:
        self.process = Process(bus)
        self.leases = LeaseKeeper(60.0)
        self.held: list[Held] = []

    async def take(self, count: int) -> None:
        """Take requests in hand."""
        puller = Puller(self.process, STREAM_REQUESTS, nothing, 30.0)
        await puller.start()
        for _ in range(count):
            delivery = await taken(puller, "high")
            envelope = read_envelope(delivery, Priority.HIGH, moves=self.process.moves)
            held = Held.taken(self.process, delivery, envelope, self.leases, tracing=Tracing(), engine="mlx")
            held.delivery = delivery
            self.held.append(held)

    async def end(self):
        """End all of them at once; each outcome, or what it raised."""
        return await asyncio.gather(*map(self._end, self.held), return_exceptions=True)

    async def _end(self, held: Held):
        opened = await held.open()
        if isinstance(opened, Settled):
            return await held.end(opened)
        writer = AnswerWriter(held.envelope, "mlx", "m", 1, held.envelope.stored_at + 1, "its turn")
        return await held.end(Answered(writer.completion("stop", Usage(10, 5, 15), now=held.envelope.stored_at + 2)))

    def lose_leases(self) -> None:
        for lease in self.leases._leases:
            lease.expires_at = lease.clock.now()


@pytest.fixture
async def worker(bus):
    """Stores requests and has a worker take them."""
    for number in range(COUNT):
        await bus.store("llm.request.high", b'{"prompt":"x"}', headers={MSG_ID: f"r{number}"})
    worker = Worker(bus)
    await worker.take(COUNT)
    return worker


def is_account(operation: Operation) -> bool:
    return operation.subject == USED


def is_ack(operation: Operation) -> bool:
    return operation.data.startswith(b"+ACK")


async def given_back(worker: Worker, bus, count: int = COUNT) -> Worker:
    """What the broker does once the leases of a process run out: another one gets its requests."""
    for held in worker.held:
        await bus.publish(held.delivery.message.reply, b"-NAK")
    other = Worker(bus)
    await other.take(count)
    return other


async def counted(bus) -> tuple[int, int]:
    """How many requests and tokens a monitor counts."""
    accounts = Accounts(window_s=USED_DUPLICATE_WINDOW_S)
    async for stored in NoteFeed(bus).after(0):
        accounts.add(stored)
    total = accounts.report(bus.clock.wall()).month.total
    return total.requests.done, total.tokens.total


async def messages(bus) -> int:
    return (await bus.stream_state(STREAM_USED)).messages


async def test_requests_that_end_together_share_a_message(worker, bus):
    for outcome in await worker.end():
        assert isinstance(outcome, Answered)
    assert await messages(bus) < COUNT
    assert await counted(bus) == (COUNT, 15 * COUNT)


async def test_a_worker_that_dies_between_the_notes_and_the_acknowledgements_counts_each_request_once(worker, bus):
    worker.process.meets("dies", is_ack)
    assert all(isinstance(each, Died) for each in await worker.end())
    noted = await messages(bus)
    other = await given_back(worker, bus)
    assert all(isinstance(each, Settled) for each in await other.end())
    assert await messages(bus) > noted
    assert await counted(bus) == (COUNT, 15 * COUNT)


async def test_a_worker_that_dies_before_the_notes_acknowledges_nothing(worker, bus):
    worker.process.meets("dies", is_account)
    assert all(isinstance(each, Died) for each in await worker.end())
    assert not worker.process.answered
    assert await messages(bus) == 0
    other = await given_back(worker, bus)
    assert all(isinstance(each, Settled) for each in await other.end())
    assert await counted(bus) == (COUNT, 15 * COUNT)


async def test_a_worker_that_dies_among_the_acknowledgements_counts_each_request_once(worker, bus):
    worker.process.meets("dies", is_ack, steps=COUNT // 2)
    died = [each for each in await worker.end() if isinstance(each, Died)]
    assert len(died) == COUNT - COUNT // 2
    other = await given_back(worker, bus, len(died))
    assert all(isinstance(each, Settled) for each in await other.end())
    assert await counted(bus) == (COUNT, 15 * COUNT)


async def test_notes_that_are_stored_after_another_worker_noted_the_same_requests_count_once(worker, bus):
    worker.process.meets("freezes", is_account)
    ending = asyncio.create_task(worker.end())
    await eventually(lambda: worker.process.struck, what="it freezes before it stores the first notes")
    worker.lose_leases()
    other = await given_back(worker, bus)
    await other.end()
    noted = await messages(bus)
    worker.process.thaw()
    assert set(await ending) <= {Abandoned(Loss.LEASE), Abandoned(Loss.OVERTAKEN)}
    assert await messages(bus) > noted
    assert await counted(bus) == (COUNT, 15 * COUNT)


async def test_notes_whose_storing_was_not_heard_of_are_repeated_and_count_once(worker, bus):
    worker.process.meets("hears nothing", is_account)
    for outcome in await worker.end():
        assert isinstance(outcome, Answered)
    assert await counted(bus) == (COUNT, 15 * COUNT)

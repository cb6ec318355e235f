"""Each line of a batch is in its output or its error file, once, whatever happens to the process that runs it."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter

import msgspec
import pytest

from pipeline.broker import topology
from pipeline.broker.batches import Journal
from pipeline.broker.candidate import LeaseNote
from pipeline.broker.jetstream import Fenced
from pipeline.core import leadership
from pipeline.wire.batches import BatchPart, BatchStatus, RequestCounts, chunks_subject, part_subject
from pipeline.wire.subjects import (
    BATCH,
    LEADER_BATCHES,
    MSG_ID,
    STREAM_BATCH,
    STREAM_FILES,
    STREAM_REPLIES,
    STREAM_REQUESTS,
    STREAM_STATE,
    TIMEOUT,
)
from tests.consumers.batches.conftest import line, names
from tests.waiting import eventually

JOURNALS = (BatchPart.OUTPUT, BatchPart.ERROR)


async def both(desk, batch):
    """How often each custom_id is in the two files."""
    rows = [*await desk.rows(batch.output_file_id), *await desk.rows(batch.error_file_id)]
    return Counter(row["custom_id"] for row in rows)


async def test_each_line_ends_in_one_of_the_files(batches, desk, player):
    player.play()
    await batches()
    lines = [*map(line, names(20)), line("bad", "fail"), line("two", n=2), line("stream", stream=True)]
    order = await desk.create(*lines)
    batch = await desk.ended(order)
    assert (batch.status, batch.request_counts) == (BatchStatus.COMPLETED, RequestCounts(23, 20, 3))
    assert {row["custom_id"] for row in await desk.rows(batch.output_file_id)} == set(names(20))
    rows = {row["custom_id"]: row for row in await desk.rows(batch.error_file_id)}
    codes = {name: row["response"]["body"]["error"]["code"] for name, row in rows.items()}
    unsupported = "unsupported_parameter"
    assert codes == {"bad": "engine_failed", "two": unsupported, "stream": unsupported}
    assert rows["bad"]["response"]["status_code"] == 502
    headers = player.headers["batch_1-1"]
    assert headers[BATCH] == order.id
    assert 0 < float(headers[TIMEOUT]) <= 3600

    async def cleared():
        found = [await desk.bus.last_message(STREAM_BATCH, part_subject(order.id, part)) for part in JOURNALS]
        return found == [None, None]

    await eventually(cleared, what="the journals are removed")


async def test_a_bad_file_fails_with_the_numbers_of_its_lines(batches, desk):
    await batches()
    order = await desk.create(line("a"), b"nonsense", line("a"))
    batch = await desk.ended(order)
    assert batch.status is BatchStatus.FAILED
    assert [(f.line, f.code) for f in batch.errors.data] == [(2, "invalid_json_line"), (3, "duplicate_custom_id")]


async def test_a_batch_whose_file_is_gone_fails(batches, desk):
    order = await desk.create(line("a"))
    await desk.files.delete(order.input_file_id)
    await batches()
    batch = await desk.ended(order)
    assert (batch.status, batch.errors.data[0].code) == (BatchStatus.FAILED, "file_not_found")


async def test_a_batch_whose_file_is_deleted_while_it_runs_keeps_its_results(
    batches, monitor, desk, player, monkeypatch
):
    # Pieces as small as in a large file: the next one is read when it is needed.
    monkeypatch.setattr("pipeline.broker.files._READ_BYTES", 1)
    await monitor()
    await batches(batch_lines=2)
    lines = [line(name, "x" * 200_000) for name in names(12)]
    order = await desk.create(*lines)
    await eventually(lambda: equals(desk.queued, 2))
    await desk.files.delete(order.input_file_id)
    player.play()
    batch = await desk.ended(order)
    assert (batch.status, [fault.code for fault in batch.errors.data]) == (BatchStatus.FAILED, ["file_not_found"])
    had = await both(desk, batch)
    assert 2 <= len(had) < 12
    assert had == dict.fromkeys(names(len(had)), 1)
    assert batch.request_counts == RequestCounts(12, len(had), 0)
    # Nothing of it is left in the queue. The last answer is acknowledged after it was read.
    await eventually(lambda: equals(desk.queued, 0))


async def test_a_batch_whose_file_is_deleted_after_the_last_line_was_read_is_complete(batches, monitor, desk, player):
    await monitor()
    await batches()
    order = await desk.create(*map(line, names(3)))
    await eventually(lambda: equals(desk.queued, 3))
    await desk.files.delete(order.input_file_id)
    player.play()
    batch = await desk.ended(order)
    assert (batch.status, batch.request_counts) == (BatchStatus.COMPLETED, RequestCounts(3, 3, 0))
    assert await both(desk, batch) == dict.fromkeys(names(3), 1)


async def test_a_result_that_the_broker_does_not_accept_is_an_error_of_its_line(batches, desk, player):
    player.play()
    await batches()
    batch = await desk.ended(await desk.create(line("a" * 512, "big"), line("b")))
    assert (batch.status, batch.request_counts) == (BatchStatus.COMPLETED, RequestCounts(2, 1, 1))
    (row,) = await desk.rows(batch.error_file_id)
    assert row["response"]["body"]["error"]["code"] == "request_too_large"


async def test_a_batch_has_no_more_lines_in_the_queue_than_it_may(batches, desk, player):
    await batches(batch_lines=5)
    order = await desk.create(*map(line, names(12)))
    await eventually(lambda: equals(desk.queued, 5))
    player.play(3)
    await eventually(lambda: equals(lambda: counts(desk, order), 3))
    await eventually(lambda: equals(desk.queued, 5))


async def test_a_full_lane_is_waited_for(batches, bus, desk, player, config):
    await topology.apply(bus.js, msgspec.structs.replace(config, lane_max_messages=3))
    batches.config = msgspec.structs.replace(config, lane_max_messages=3)
    await batches()
    order = await desk.create(*map(line, names(9)))
    await eventually(lambda: equals(desk.queued, 3))
    player.play()
    assert (await desk.ended(order)).request_counts == RequestCounts(9, 9, 0)


async def test_another_process_continues_where_a_killed_one_was(batches, monitor, desk, player):
    await monitor()
    first = await batches(batch_lines=4)
    player.play(6)
    order = await desk.create(*map(line, names(16)))
    await player.paused()
    await eventually(lambda: equals(desk.queued, 4))
    await first.kill()
    await forget_ids(desk.bus)
    player.play(8)
    await player.paused()
    await batches(batch_lines=4)
    player.play()
    batch = await desk.ended(order)
    assert batch.request_counts == RequestCounts(16, 16, 0)
    assert await both(desk, batch) == dict.fromkeys(names(16), 1)
    assert set(player.answered.values()) == {1}


async def test_lines_whose_answers_are_gone_are_fed_again(batches, monitor, desk, player):
    await monitor()
    first = await batches(batch_lines=4)
    order = await desk.create(*map(line, names(8)))
    await eventually(lambda: equals(desk.queued, 4))
    await first.kill()
    player.play(4)
    await player.paused()
    # As if the process had been away for longer than answers are kept, and ids are remembered.
    await desk.bus.purge(STREAM_REPLIES, ">", up_to=1_000_000)
    await forget_ids(desk.bus)
    await batches(batch_lines=4)
    player.play()
    batch = await desk.ended(order)
    assert await both(desk, batch) == dict.fromkeys(names(8), 1)
    assert Counter(player.answered.values()) == {2: 4, 1: 4}


@pytest.fixture
def endless_lease(monkeypatch):
    """A lease that runs out only after the test."""
    monkeypatch.setattr(leadership, "LEASE_S", 3600.0)


@pytest.mark.usefixtures("endless_lease")
async def test_a_process_that_died_is_followed_at_once(batches):
    first = await batches()
    await eventually(first.it.candidate.leads)
    await first.kill()
    second = await batches()
    await eventually(second.it.candidate.leads)


@pytest.mark.usefixtures("endless_lease")
@pytest.mark.parametrize("alive", [True, False])
async def test_a_process_that_may_live_is_not_followed_before_its_lease_runs_out(batches, bus, alive):
    inbox = bus.new_inbox() if alive else ""  # an older version writes none

    async def on_question(question):
        await bus.publish(question.reply, b"")

    await bus.subscribe(inbox or "unused", on_question)
    note = msgspec.json.encode(LeaseNote("another", "its token", inbox))
    await bus.store(LEADER_BATCHES, note, expected_last=0)
    one = await batches()
    await eventually(one.it._told.is_set)
    assert not one.it.candidate.leads()
    await bus.js.purge_stream(STREAM_STATE, subject=LEADER_BATCHES)
    await eventually(one.it.candidate.leads)


async def test_one_process_runs_the_batches_and_another_stands_by(batches, desk, player):
    player.play()
    first, second = await batches(), await batches()
    await eventually(lambda: first.it.candidate.leads() or second.it.candidate.leads())
    order = await desk.create(*map(line, names(10)))
    batch = await desk.ended(order)
    assert await both(desk, batch) == dict.fromkeys(names(10), 1)
    assert not (first.it.candidate.leads() and second.it.candidate.leads())
    assert set(player.answered.values()) == {1}


async def test_a_cancelled_batch_keeps_what_was_answered(batches, monitor, desk, player):
    await monitor()
    await batches(batch_lines=4)
    player.play(3)
    order = await desk.create(*map(line, names(12)))
    await eventually(lambda: equals(lambda: counts(desk, order), 3))
    await desk.store.cancel(order.id)
    batch = await desk.ended(order)
    assert (batch.status, batch.request_counts) == (BatchStatus.CANCELLED, RequestCounts(12, 3, 9))
    assert len(await desk.rows(batch.output_file_id)) == 3
    errors = await desk.rows(batch.error_file_id)
    assert {row["error"]["code"] for row in errors} == {"batch_cancelled"}
    assert await both(desk, batch) == dict.fromkeys(names(12), 1)
    await eventually(lambda: equals(desk.queued, 0))


async def test_a_batch_that_is_not_done_at_its_deadline_expires(batches, monitor, desk):
    await monitor()
    await batches(batch_lines=4)
    order = await desk.create(*map(line, names(6)), window_s=2)
    batch = await desk.ended(order)
    assert (batch.status, batch.request_counts) == (BatchStatus.EXPIRED, RequestCounts(6, 0, 6))
    assert {row["error"]["code"] for row in await desk.rows(batch.error_file_id)} == {"batch_expired"}
    assert await both(desk, batch) == dict.fromkeys(names(6), 1)


async def test_a_cancel_that_was_not_heard_is_found(batches, monitor, desk):
    await monitor()
    running = await batches(batch_lines=2)
    order = await desk.create(*map(line, names(4)))
    await eventually(lambda: equals(desk.queued, 2))
    # Unsubscribed, as while the connection is lost.
    for subscription in list(running.me.bus.nc._subs.values()):
        if subscription.subject.endswith(".cancel"):
            await subscription.unsubscribe()
    await desk.store.cancel(order.id)
    running.it._wake.set()
    assert (await desk.ended(order)).status is BatchStatus.CANCELLED


async def test_several_batches_run_side_by_side(batches, desk, player):
    player.play()
    await batches(batch_lines=2)
    orders = [await desk.create(*map(line, names(6))) for _ in range(10)]
    done = [await desk.ended(order) for order in orders]
    assert [batch.request_counts for batch in done] == [RequestCounts(6, 6, 0)] * 10


async def test_a_journal_has_one_writer(bus):
    mine, theirs = (Journal(bus, part_subject("batch_x", BatchPart.OUTPUT)) for _ in range(2))
    await mine.append(b"1", 1)
    with pytest.raises(Fenced):
        await theirs.append(b"2", 2)
    assert [entry async for entry in theirs.entries()] == [(1, b"1")]
    await theirs.append(b"2", 2)
    with pytest.raises(Fenced):
        await mine.append(b"3", 3)


async def test_a_write_whose_reply_was_lost_is_not_refused(bus):
    journal = Journal(bus, part_subject("batch_x", BatchPart.OUTPUT))
    await journal.append(b"1", 1)
    journal._last = 0
    await journal.append(b"1", 1)
    assert [entry async for entry in journal.entries()] == [(1, b"1")]


async def equals(fact, wanted):
    return await fact() == wanted


async def counts(desk, order):
    return (await desk.state(order)).request_counts.completed


async def forget_ids(bus):
    """Let the stream of requests forget the message ids so far, as it does after two minutes."""
    probe = ("llm.request.high", b"probe")
    await bus.put(*probe, headers={MSG_ID: "probe"})
    config = (await bus.js.stream_info(STREAM_REQUESTS)).config
    windows_s = itertools.cycle((0.1, 0.15))

    async def forgotten():
        # The server looks at the ids as a window changes, perhaps a moment before the new one holds. Then it does not
        # look again for two minutes, unless the window changes once more.
        config.duplicate_window = next(windows_s)
        await bus.js.update_stream(config)
        await asyncio.sleep(0.3)
        return not (await bus.put(*probe, headers={MSG_ID: "probe"})).duplicate

    await eventually(forgotten, what="the newest id is forgotten, and so are the older ones")


async def test_the_leader_removes_what_uploads_that_were_broken_off_have_left(batches, bus, monkeypatch):
    monkeypatch.setattr("consumers.batches.batches._UNFINISHED_S", 0.0)
    await bus.store(chunks_subject("broken"), b"chunk")

    async def gone():
        return not await bus.subjects(STREAM_FILES, chunks_subject("broken"))

    await batches()
    await eventually(gone, what="the chunk is removed")

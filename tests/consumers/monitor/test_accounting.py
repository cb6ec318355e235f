"""The accounts of use: each request that ended counts once, for its tenant and key, whichever monitor leads."""

from __future__ import annotations

import msgspec

from pipeline.broker.usage import BookStore, store_note
from pipeline.core.charging import charged
from pipeline.wire.messages import encode
from pipeline.wire.subjects import KEY, MSG_ID, STREAM_USAGE, STREAM_USED, TENANT, USED, Priority
from pipeline.wire.usage import UsageNote, UsageNotes, UsageReport
from tests.consumers.monitor.conftest import ask_service, cancel
from tests.waiting import eventually


async def report(bus, subject="llm.queue.usage") -> UsageReport:
    return msgspec.json.decode((await bus.request(subject)).data, type=UsageReport)


async def kept(bus, requests: int):
    """The stored sums, once they count so many requests."""

    async def stored():
        books = await BookStore(bus).newest()
        counts = [sum(each.requests.total for each in book.sums) for book in books]
        return books if counts == [requests] * 3 else None

    return await eventually(stored, what=f"{requests} requests are stored")


def note(number: int, **fields) -> UsageNote:
    return UsageNote(f"r{number}", "done", Priority.LOW, prompt=10, completion=5, **fields)


async def test_a_request_that_is_cancelled_while_it_waits_counts_for_its_tenant_and_its_key(monitor, bus):
    await monitor()
    charge = charged(bus.moves.key, "t.acme.mine", "acme", "alice")
    forged = f"alice:{charge.partition(':')[2]}"
    for request_id, header in (("mine", charge), ("other", forged)):
        headers = {MSG_ID: f"t.acme.{request_id}", TENANT: "acme", KEY: header}
        await bus.store("llm.request.low.t.acme", b"x", headers=headers)
        assert await cancel(bus, f"t.acme.{request_id}") == "cancelled"
    await bus.store("llm.request.low", b"x", headers={MSG_ID: "claims", TENANT: "acme"})
    assert await cancel(bus, "claims") == "cancelled"

    async def counted():
        said = await report(bus)
        return said if said.day.total.requests.total == 3 else None

    day = (await eventually(counted)).day
    assert {each.tenant: each.requests.cancelled for each in day.tenants} == {"acme": 2, "default/acme": 1}
    assert {each.key: each.requests.cancelled for each in day.keys} == {"alice": 1}


async def test_a_note_that_is_stored_twice_counts_once(monitor, bus):
    await monitor()
    for _ in range(2):
        await store_note(bus, note(1, tenant="acme", key="alice"), 1000)
    await store_note(bus, note(1, tenant="acme", key="alice"), 1003)
    assert (await report(bus)).hour.total.requests.done == 2
    assert (await bus.stream_state(STREAM_USED)).messages == 2


async def test_a_tenant_reads_its_own_accounts_only(monitor, bus):
    await monitor()
    await store_note(bus, note(1, tenant="acme"), 1000)
    await store_note(bus, note(2), 1000)
    acme = (await report(bus, "llm.queue.usage.t.acme")).month
    assert [(each.tenant, each.tokens.total) for each in acme.tenants] == [("acme", 15)]
    assert [each.tenant for each in (await report(bus, "llm.queue.usage.t.default")).month.tenants] == ["default"]
    assert [each.tenant for each in (await report(bus, "llm.queue.usage.t.bolt")).month.tenants] == []


async def test_the_next_monitor_continues_where_the_last_one_died(monitor, bus):
    first = await monitor.start()
    await store_note(bus, note(1), 1000)
    await kept(bus, 1)
    await store_note(bus, note(2), 1000)
    await first.kill()
    await store_note(bus, note(3), 1000)
    await monitor()
    await kept(bus, 3)
    assert (await report(bus)).hour.total.tokens.total == 45


async def test_the_next_monitor_knows_the_requests_that_the_last_one_counted(monitor, bus):
    async def several(*numbers: int) -> None:
        notes = {f"r{number}@1000": note(number) for number in numbers}
        await bus.store(USED, encode(UsageNotes(notes)), headers={MSG_ID: f"several-{numbers}"})

    first = await monitor.start()
    await several(1, 2)
    await kept(bus, 2)
    await first.kill()
    await store_note(bus, note(2), 1000)
    await several(3, 1)
    await monitor()
    await kept(bus, 3)
    await several(2, 3, 4)
    await kept(bus, 4)


async def test_of_two_monitors_that_take_themselves_for_the_leader_the_fence_keeps_the_sums_right(monitor, bus):
    frozen = await monitor.start()
    await store_note(bus, note(1), 1000)
    await kept(bus, 1)
    other = await monitor.start()
    for it in (frozen.it, other.it):
        it.usage.leads = lambda: True
        await it.usage.start()
    for number in range(2, 8):
        await store_note(bus, note(number), 1000)
    await kept(bus, 7)
    await store_note(bus, note(8), 1000)
    await kept(bus, 8)


async def test_old_notes_that_are_counted_are_removed(monitor, bus, monkeypatch):
    monkeypatch.setattr("consumers.monitor.accounting.USED_DUPLICATE_WINDOW_S", -1000.0)
    await monitor()
    await store_note(bus, note(1), 1000)

    async def removed():
        return (await bus.stream_state(STREAM_USED)).messages == 0

    await eventually(removed, what="the note is removed")
    assert (await report(bus)).hour.total.requests.done == 1


async def test_a_stream_of_notes_that_was_made_again_is_counted_from_its_start(monitor, bus):
    first = await monitor.start()
    for number in range(1, 4):
        await store_note(bus, note(number), 1000)
    await kept(bus, 3)
    await first.kill()
    await bus.js.delete_stream(STREAM_USED)
    await monitor()
    await store_note(bus, note(4), 1000)
    await kept(bus, 4)


async def test_a_message_that_is_no_account_is_skipped(monitor, bus):
    await monitor()
    await bus.store(USED, b"nonsense", headers={MSG_ID: "odd"})
    await store_note(bus, note(1), 1000)
    await kept(bus, 1)
    assert "error" not in await ask_service(bus, "llm.queue.usage")
    assert (await bus.stream_state(STREAM_USAGE)).messages == 3

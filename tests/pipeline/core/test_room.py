"""When a store is full, when it has failed, and when a restart of its server helps."""

from __future__ import annotations

import pytest

from pipeline.core.room import RESERVE_BYTES, Disk, Failures, StoreHealth, limit_bytes, moved_enough, size

GIB = 1 << 30
TOTAL = 100 * GIB
FULL = Disk(RESERVE_BYTES - 1, TOTAL)
LOW = Disk(RESERVE_BYTES * 2, TOTAL)
ROOMY = Disk(50 * GIB, TOTAL)


def test_a_small_disk_keeps_a_tenth_for_accepted_requests():
    assert Disk(0, 24 << 20).reserve == (24 << 20) // 10
    assert Disk(0, TOTAL).reserve == RESERVE_BYTES


@pytest.mark.parametrize(("disk", "state"), [(ROOMY, "ok"), (LOW, "low"), (FULL, "full"), (Disk(0, TOTAL), "full")])
def test_the_state_follows_the_free_space_and_says_why(disk, state):
    report = StoreHealth().observe(disk, 0.0)
    assert (report.state, report.free_bytes, report.total_bytes) == (state, disk.free, disk.total)
    assert report.refuses is (state == "full")
    assert bool(report.reason) is (state != "ok")


def test_the_servers_own_limit_counts_where_it_leaves_less_than_the_disk():
    assert ROOMY.within(GIB, 60 * GIB) is ROOMY
    left = ROOMY.within(19 * GIB, 20 * GIB)
    assert (left.free, left.total, left.limited) == (GIB, 20 * GIB, True)
    assert ROOMY.within(21 * GIB, 20 * GIB).free == 0


def test_a_store_that_its_own_limit_fills_says_so():
    report = StoreHealth().observe(ROOMY.within(20 * GIB - (9 << 20), 20 * GIB), 0.0)
    assert report.state == "full"
    assert report.reason == (
        "The broker's store, by max_file_store, has 9 MiB of 20 GiB free, and 256 MiB are kept for accepted requests. "
        "Purge dead letters, or wait until requests are answered."
    )
    assert "disk" in StoreHealth().observe(FULL, 0.0).reason


def test_a_state_is_left_only_well_above_its_threshold():
    room = StoreHealth()
    assert room.observe(FULL, 0.0).state == "full"
    assert room.observe(Disk(RESERVE_BYTES + 1, TOTAL), 1.0).state == "full"
    assert room.observe(LOW, 2.0).state == "low"
    assert room.observe(Disk(RESERVE_BYTES * 4 + 1, TOTAL), 3.0).state == "low"
    assert room.observe(ROOMY, 4.0).state == "ok"


def test_a_write_error_lasts_until_a_restart_which_waits_for_room():
    room = StoreHealth()
    room.write_failed("no space left on device")
    assert room.observe(FULL, 0.0).state == "failed"
    assert not room.may_restart(0.0)
    report = room.observe(ROOMY, 1.0)
    assert report.state == "failed"
    assert "no space left on device" in report.reason
    assert room.may_restart(1.0)
    room.restarted(1.0)
    assert room.observe(ROOMY, 1.0).state == "ok"


def test_restarts_that_do_not_help_become_rarer():
    room, now, pauses = StoreHealth(), 0.0, []
    for _ in range(6):
        room.write_failed("input/output error")
        room.observe(ROOMY, now)
        since = now
        while not room.may_restart(now):
            now += 1.0
        pauses.append(now - since)
        room.restarted(now)
    assert pauses == [0.0, 5.0, 10.0, 20.0, 40.0, 60.0]


def fail(failures, *times):
    for at in times:
        failures.heard("llm.request.high", at)


def test_timeouts_alone_restart_nothing_but_after_a_full_disk_they_do():
    room = StoreHealth()
    fail(room.failures, 0.0, 2.0)
    assert room.observe(ROOMY, 2.0).state == "ok"
    room.observe(FULL, 3.0)
    fail(room.failures, 4.0)
    assert room.observe(FULL, 4.0).state == "failed"
    room.observe(ROOMY, 5.0)
    assert room.may_restart(5.0)


def test_a_single_unconfirmed_write_says_nothing_and_lasting_ones_do():
    failures = Failures()
    fail(failures, 0.0)
    assert failures.report(1.0) is None
    fail(failures, 2.0)
    report = failures.report(2.0)
    assert report.state == "failed"
    assert "llm.request.high" in report.reason
    assert failures.report(8.0) is None
    fail(failures, 9.0)
    assert failures.report(9.0) is None


def test_the_limit_of_the_stream_goes_down_with_the_room():
    assert limit_bytes(ROOMY, 5_000) == -1
    assert limit_bytes(LOW, 5_000) == 5_000 + RESERVE_BYTES
    assert limit_bytes(FULL, 5_000) == 4_999
    assert limit_bytes(Disk(0, TOTAL), 5_000) == 1


@pytest.mark.parametrize(
    ("old", "new", "moved"), [(-1, -1, False), (-1, 10, True), (10, -1, True), (1000, 1049, False), (1000, 900, True)]
)
def test_the_stream_is_changed_only_where_its_limit_moves_a_lot(old, new, moved):
    assert moved_enough(old, new) is moved


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 MiB"), (2_400_000, "2.29 MiB"), (RESERVE_BYTES, "256 MiB"), (5 * GIB, "5 GiB")]
)
def test_sizes_are_written_in_words(count, text):
    assert size(count) == text

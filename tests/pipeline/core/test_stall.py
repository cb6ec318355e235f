"""What stands still is found; what slept with the machine is not blamed."""

from __future__ import annotations

from pipeline.core.stall import StallWatch


def until_found(
    watch: StallWatch, now: float, *, progress_at: float, busy: bool = True, looks: int = 100
) -> float | None:
    """When the watch finds a stall, in so many looks from now on."""
    for _ in range(looks):
        if watch.look(now, progress_at=progress_at, busy=busy):
            return now
        now += watch.every_s
    return None


def test_no_progress_for_longer_than_the_limit_is_a_stall():
    found_at = until_found(StallWatch(10.0), 0.0, progress_at=0.0)
    assert found_at is not None
    assert 10.0 < found_at <= 12.0


def test_progress_and_idleness_are_none():
    watch, now = StallWatch(10.0), 0.0
    for _ in range(100):
        assert not watch.look(now, progress_at=now, busy=True)
        now += watch.every_s
    assert until_found(watch, now, progress_at=now, busy=False) is None


def test_the_time_of_a_closed_lid_does_not_count():
    watch = StallWatch(10.0)
    assert until_found(watch, 0.0, progress_at=0.0, looks=5) is None
    asleep_until = 8 * 3600.0
    assert not watch.look(asleep_until, progress_at=0.0, busy=True)
    found_at = until_found(watch, asleep_until + watch.every_s, progress_at=0.0)
    assert found_at is not None
    assert found_at < asleep_until + 10.0

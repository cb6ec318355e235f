"""Short chaos runs: after any crash, no accepted request is lost and no answer is doubled."""

from __future__ import annotations

import pytest

from bench.chaos.shows import Shown, cancelled, frozen, kills, rolling
from bench.chaos.story import Plan, run
from bench.chaos.torment import KINDS

LEASE_S = 1.5


def kept(shown: Shown) -> bool:
    print(*shown.lines, sep="\n")
    assert not shown.wrong, shown.wrong
    return True


async def test_every_part_dies_once_under_load_and_nothing_is_lost_or_doubled(tmp_path):
    plan = Plan(0, rate_per_s=8, max_tokens=24, lease_s=LEASE_S, pause_s=(0.2, 0.6), script=tuple(KINDS))
    said = []
    summary = await run(plan, tmp_path, said.append)
    print(*said, sep="\n")
    assert not summary.faults, summary.examples
    assert summary.accepted > 20
    assert summary.reexecuted, "no fault hit a running request"
    assert summary.known_compared


async def test_a_worker_frozen_for_three_leases_writes_nothing_when_it_wakes(tmp_path):
    assert kept(await frozen(tmp_path, Plan(0, lease_s=LEASE_S).config()))


async def test_no_engine_begins_a_request_that_was_cancelled_in_the_queue(tmp_path):
    config = Plan(0, lease_s=LEASE_S).config()
    assert kept(await cancelled(tmp_path, config, requests=200))


@pytest.mark.chaos
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ["simulated", "mlx"])
async def test_streams_survive_many_kills_in_mid_answer(tmp_path, engine):
    assert kept(await kills(tmp_path, Plan(0, engine, lease_s=LEASE_S).config(), times=10))


@pytest.mark.chaos
async def test_a_rolling_restart_of_every_role_loses_nothing(tmp_path):
    assert kept(await rolling(tmp_path, Plan(0).config()))


@pytest.mark.chaos
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [1, 2])
async def test_a_minute_of_faults_drawn_at_random(tmp_path, seed):
    said = []
    summary = await run(Plan(60, seed=seed), tmp_path, said.append)
    print(*said, sep="\n")
    assert not summary.faults, summary.examples

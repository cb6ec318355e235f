"""Trials after a crash find the guilty request, and cost the innocent ones one crash."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.probation import Probation


def test_every_request_in_flight_is_a_suspect_and_the_latest_is_tried_first():
    probation = Probation()
    assert probation.crashed({1: 10, 2: 0, 3: 4}) is None
    assert probation.active
    assert probation.call_next() == 3
    assert probation.call_next() is None


def test_a_suspect_is_cleared_by_one_token_past_where_it_stood():
    probation = Probation()
    probation.crashed({1: 10, 2: 4})
    probation.call_next()
    assert not probation.progressed(2, 4)
    assert not probation.progressed(1, 99)
    assert probation.progressed(2, 5)
    assert probation.call_next() == 1


def test_a_suspect_that_ends_is_cleared():
    probation = Probation()
    probation.crashed({1: 10})
    probation.call_next()
    probation.gone(1)
    assert not probation.active


def test_a_suspect_given_up_before_its_trial_is_never_called():
    probation = Probation()
    probation.crashed({1: 10, 2: 0})
    probation.gone(2)
    assert probation.call_next() == 1


def test_a_crash_on_trial_tells_the_guilty():
    probation = Probation()
    probation.crashed({1: 10, 2: 0})
    probation.call_next()
    assert probation.crashed({2: 0}) == 2
    assert probation.call_next() == 1


def test_a_request_alone_at_its_first_crash_gets_another_try():
    probation = Probation()
    assert probation.crashed({1: 0}) is None
    assert probation.call_next() == 1
    assert probation.crashed({1: 0}) == 1
    assert not probation.active


def test_a_crash_between_trials_blames_no_request():
    probation = Probation()
    probation.crashed({1: 0, 2: 0})
    assert probation.crashed({}) is None
    assert probation.call_next() == 2


def test_a_crash_before_the_one_called_has_begun_blames_no_request():
    probation = Probation()
    probation.crashed({1: 0})
    probation.call_next()
    assert probation.crashed({}) is None
    assert probation.call_next() == 1


@given(
    requests=st.lists(st.booleans(), min_size=1, max_size=12),
    marks=st.lists(st.integers(0, 50), min_size=12, max_size=12),
    later=st.lists(st.booleans(), max_size=4),
)
def test_the_poisonous_end_and_the_innocent_crash_once_per_poison_in_company(requests, marks, later):
    """A poison strikes as soon as it runs. Those that come later wait, then run with all who were cleared."""
    poison = dict(enumerate(requests + later))
    waiting = [range(len(requests)), range(len(requests), len(poison))]
    probation, ended, crashes = Probation(), set(), dict.fromkeys(poison, 0)
    alive: set[int] = set()
    for batch in waiting:
        alive |= set(batch)
        if not any(poison[request] for request in alive):
            continue
        for request in alive:
            crashes[request] += 1
        assert probation.crashed({request: marks[request % 12] for request in sorted(alive)}) is None
        while (request := probation.call_next()) is not None:
            if poison[request]:
                crashes[request] += 1
                assert probation.crashed({request: marks[request % 12]}) == request
                ended.add(request)
                alive.discard(request)
            else:
                assert probation.progressed(request, marks[request % 12] + 1)
        assert not probation.active
    assert ended == {request for request, bad in poison.items() if bad}
    assert all(crashes[request] <= 2 for request in poison)
    assert all(count <= any(requests) + any(later) for request, count in crashes.items() if not poison[request])

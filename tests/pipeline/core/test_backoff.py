from pipeline.core.backoff import Backoff, doubled


def test_pauses_double_up_to_the_bound():
    backoff = Backoff(0.5, 4.0)
    assert [backoff.failed() for _ in range(5)] == [0.5, 1.0, 2.0, 4.0, 4.0]


def test_a_success_begins_again_with_the_first_pause():
    backoff = Backoff(0.5, 4.0)
    backoff.failed()
    backoff.failed()
    backoff.succeeded()
    assert backoff.failed() == 0.5


def test_no_failure_is_no_pause_and_endless_failures_stay_at_the_bound():
    assert doubled(0.5, 0, most_s=30.0) == 0.0
    assert doubled(0.5, 10_000, most_s=30.0) == 30.0

"""When a draft model is used, in arithmetic on rates."""

from __future__ import annotations

import pytest

from pipeline.core.drafting import AGAIN_TOKENS, GAIN, MEASURED_STEPS, DraftPolicy


class Written:
    """An answer that is written alone, at given speeds."""

    def __init__(self, plain_s: float, drafted_s: float, right: int, most: int = 3) -> None:
        self.policy = DraftPolicy(most)
        self.plain_s, self.drafted_s, self.right = plain_s, drafted_s, right
        self.ways = list[int]()
        self.tokens = 0

    def steps(self, count: int) -> list[int]:
        """Take steps. Returns how many tokens were proposed in each."""
        ways = []
        for _ in range(count):
            drafted = self.policy.count()
            tokens = 1 + min(self.right, drafted)
            self.policy.stepped(tokens, self.drafted_s if drafted else self.plain_s, drafted=drafted)
            self.tokens += tokens
            ways.append(drafted)
        return ways


def test_both_ways_are_measured_at_first():
    answer = Written(1.0, 1.0, right=3)
    assert answer.steps(MEASURED_STEPS) == [0] * MEASURED_STEPS
    assert answer.steps(MEASURED_STEPS) == [3] * MEASURED_STEPS


@pytest.mark.parametrize(
    ("drafted_s", "right", "way"),
    [
        (1.5, 2, 3),  # three tokens in 1.5 s
        (1.5, 0, 0),  # one in 1.5 s
        (3.0, 2, 0),  # as fast as without: it is not worth it
        (3.0 / (GAIN + 0.01), 2, 3),
    ],
)
def test_the_draft_is_used_if_it_is_faster(drafted_s, right, way):
    answer = Written(1.0, drafted_s, right)
    answer.steps(2 * MEASURED_STEPS)
    assert set(answer.steps(MEASURED_STEPS)) == {way}


def test_a_useless_draft_is_tried_again_but_seldom():
    answer = Written(1.0, 2.0, right=0)
    ways = answer.steps(20 * AGAIN_TOKENS)
    tried = sum(way > 0 for way in ways)
    assert 0 < tried / len(ways) < 2 * MEASURED_STEPS / AGAIN_TOKENS
    answer.right = 3
    answer.steps(2 * AGAIN_TOKENS)
    assert answer.policy.count() == 3


def test_a_draft_that_has_become_useless_is_given_up():
    answer = Written(1.0, 1.5, right=3)
    answer.steps(4 * MEASURED_STEPS)
    assert answer.policy.count() == 3
    answer.right = 0
    answer.steps(2 * MEASURED_STEPS)
    assert answer.policy.count() == 0


def test_proposed_and_accepted_tokens_are_counted():
    answer = Written(1.0, 1.0, right=2)
    answer.steps(3 * MEASURED_STEPS)
    assert (answer.policy.drafted, answer.policy.accepted) == (3 * 2 * MEASURED_STEPS, 2 * 2 * MEASURED_STEPS)


def test_fewer_tokens_than_asked_for_may_be_proposed():
    policy = DraftPolicy(3)
    policy.stepped(2, 0.1, drafted=1)
    assert (policy.drafted, policy.accepted) == (1, 1)

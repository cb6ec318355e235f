"""The measures of `bench.classifier`: no score has seen the group that it is measured on."""

from __future__ import annotations

import numpy as np
import pytest

from bench.scores import auc, fitted, interval, question, relative_loss, within, without, words

GROUPS = ["a"] * 30 + ["b"] * 20 + ["c"] * 10


@pytest.fixture
def table():
    return np.random.default_rng(3).normal(size=(60, 4))


def test_the_scores_of_a_group_do_not_depend_on_its_own_outcomes(table):
    target = table @ [1.0, -2.0, 0.5, 0.0]
    scores = without(GROUPS, table, target, 1.0)
    other = target.copy()
    other[:30] = 100.0
    assert np.allclose(without(GROUPS, table, other, 1.0)[:30], scores[:30])
    assert not np.allclose(without(GROUPS, table, other, 1.0)[30:], scores[30:])


def test_the_fit_finds_what_the_features_tell(table):
    target = table @ [1.0, -2.0, 0.5, 0.0] + 3
    assert np.allclose(fitted(table, target, 1e-6)(table), target, atol=1e-3)
    assert np.corrcoef(without(GROUPS, table, target, 1e-6), target)[0, 1] > 0.99


def test_a_perfect_score_loses_nothing_and_a_constant_one_what_random_spilling_loses():
    loss = np.array([0.0, 1.0] * 30)
    assert relative_loss(loss, loss) == 0
    assert within(GROUPS, loss, loss) == 0
    assert relative_loss(-loss, loss) == 2
    assert relative_loss(np.zeros(60), loss, part=0.5) == pytest.approx(1.0)


def test_an_interval_holds_the_measure_of_all_rows():
    loss = np.array([0.0, 1.0, 1.0] * 20)
    low, high = interval(GROUPS, lambda drawn: float(loss[drawn].mean()))
    assert low <= loss.mean() <= high


def test_auc_is_half_for_a_score_that_tells_nothing():
    assert auc([1.0, 1.0, 1.0], [True, False, True]) == 0.5
    assert auc([3.0, 1.0, 2.0], [True, False, False]) == 1.0


def test_words_that_were_not_in_the_known_texts_tell_nothing():
    features = words(["the cat sat", "the dog sat"])
    assert features(["совсем другое"]).any() == np.False_
    assert np.allclose(features(["the cat"]) @ features(["the cat"]).T, 1.0)


def test_a_question_stands_without_its_options():
    assert question({"prompt": "Which?\nA. one\nB. two\nAnswer:"}) == "Which?"

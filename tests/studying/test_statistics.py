"""Statistics of a study against numbers worked out by hand and against scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from solar_jax.searching.predict import rank_correlation, ranks
from solar_jax.studying.statistics import (
    Interval,
    crossing,
    difference_error,
    first_reach,
    paired_difference,
    rank_correlation_interval,
)  # fmt: skip


def test_a_difference_weighs_documents_by_their_tokens():
    ours, theirs = np.array([[10.0, 4.0], [12.0, 4.0]]), np.array([[8.0, 8.0], [8.0, 8.0]])
    found = paired_difference(ours, theirs, np.array([1, 3]), draws=50)
    assert found.value == pytest.approx(((2 - 4) + (4 - 4)) / 2 / 4)  # per seed: sum of differences over 4 tokens


def test_an_interval_spans_the_draws_that_two_documents_allow():
    # Both from one document in 1 of 4 draws each: the outer quantiles are the documents' own differences a token.
    found = paired_difference(np.array([[1.0, 9.0]]), np.array([[0.0, 0.0]]), np.array([1, 3]), draws=4000)
    assert (found.low, found.high) == pytest.approx((1.0, 3.0))
    assert found.value == pytest.approx(10 / 4)


def test_an_interval_spans_the_draws_that_two_seeds_allow():
    found = paired_difference(np.array([[1.0], [9.0]]), np.array([[0.0], [0.0]]), np.array([2]), draws=4000)
    assert (found.low, found.value, found.high) == pytest.approx((0.5, 2.5, 4.5))


def test_pairing_removes_what_documents_have_in_common():
    rng = np.random.default_rng(0)
    hard, tokens = rng.uniform(1, 9, (1, 40)), np.ones(40)
    noise = rng.normal(0, 0.01, (1, 40))
    paired = paired_difference(hard + 0.1 + noise, hard, tokens, draws=500)
    assert paired.side == 1
    # A negative control: with the pairs broken the same losses say nothing.
    assert paired_difference(hard + 0.1 + noise, hard[:, ::-1], tokens, draws=500).side == 0


def test_the_bootstrap_agrees_with_scipys():
    rng = np.random.default_rng(1)
    ours, theirs = rng.normal(3, 1, (1, 30)), rng.normal(2.8, 1, (1, 30))
    found = paired_difference(ours, theirs, np.ones(30), draws=8000)
    expected = stats.bootstrap(
        (ours[0] - theirs[0],), np.mean, n_resamples=8000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.03)


def test_losses_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match="do not pair"):
        paired_difference(np.ones((2, 3)), np.ones((1, 3)), np.ones(3), draws=5)


@pytest.mark.parametrize(
    ("low", "high", "side"), [(-2, -1, -1), (1, 2, 1), (-1, 1, 0), (0, 1, 0), (-1, 0, 0), (math.nan, math.nan, 0)]
)
def test_an_interval_that_touches_0_is_on_neither_side(low, high, side):
    assert Interval(0.0, low, high).side == side


def test_the_error_of_a_difference_is_that_of_a_mean_where_documents_are_of_one_length():
    # d = 1, 3: mean 2, standard deviation sqrt(2), over sqrt(2) documents.
    assert difference_error(np.array([1.0, 3.0]), np.zeros(2), np.ones(2)) == pytest.approx((2.0, 1.0))
    rng = np.random.default_rng(0)
    d = rng.normal(size=20)
    assert difference_error(d, np.zeros(20), np.ones(20))[1] == pytest.approx(d.std(ddof=1) / np.sqrt(20))
    # Equal losses a token differ from nothing, however long the documents are.
    assert difference_error(np.array([1.0, 10.0]), np.zeros(2), np.array([1, 10])) == pytest.approx((1.0, 0.0))
    assert math.isnan(difference_error(np.array([1.0]), np.zeros(1), np.ones(1))[1])


def test_ranks_of_equal_values_are_shared():
    assert ranks(np.array([5.0, 1.0, 5.0, 3.0])).tolist() == [3.5, 1.0, 3.5, 2.0]


def test_rank_correlation_is_scipys_with_ties_too():
    rng = np.random.default_rng(0)
    for size in (2, 5, 12):
        x, y = rng.integers(0, 5, size) + 0.0, rng.integers(0, 5, size) + 0.0
        if len(set(x)) > 1 and len(set(y)) > 1:
            assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([9.0, 4.0, 1.0])) == pytest.approx(-1)
    assert math.isnan(rank_correlation(np.array([1.0, 1.0]), np.array([1.0, 2.0])))
    assert math.isnan(rank_correlation(np.array([1.0]), np.array([1.0])))


def test_the_interval_of_a_rank_correlation_agrees_with_scipys():
    rng = np.random.default_rng(3)
    x = rng.normal(size=25)
    y = x + rng.normal(size=25)
    found = rank_correlation_interval(x, y, draws=3000)
    expected = stats.bootstrap(
        (x, y), lambda a, b: stats.spearmanr(a, b).statistic, paired=True, vectorized=False, n_resamples=3000,
        method="percentile", rng=np.random.default_rng(4),
    ).confidence_interval  # fmt: skip
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.04)


def test_no_arms_have_no_correlation():
    found = rank_correlation_interval(np.array([]), np.array([]), draws=10)
    assert str(found) == "undefined"
    assert found.side == 0


def test_a_level_is_reached_between_two_evaluations():
    assert first_reach([0, 10, 20], [3.0, 2.0, 1.0], 1.75) == pytest.approx(12.5)
    assert first_reach([0, 10], [3.0, 2.0], 3.0) == 0
    assert first_reach([0, 10], [3.0, 2.0], 1.9) is None


def test_curves_cross_where_two_lines_do():
    # 3 - .2 x = 2 - .05 x at x = 20 / 3
    assert crossing([0, 10], [3.0, 1.0], [0, 5, 10], [2.0, 1.75, 1.5]) == pytest.approx(20 / 3)
    # Over an axis on which the other goes on, only what both cover counts.
    assert crossing([0, 10], [3.0, 1.0], [0, 20], [2.0, 1.0]) == pytest.approx(20 / 3)


def test_a_curve_that_dips_and_rises_again_has_not_crossed():
    assert crossing([0, 5, 10], [3.0, 1.0, 3.0], [0, 10], [2.0, 2.0]) is None
    assert crossing([0, 5, 10], [1.0, 3.0, 1.0], [0, 10], [2.0, 2.0]) == pytest.approx(7.5)
    assert crossing([0, 10], [1.0, 1.0], [0, 10], [2.0, 2.0]) == 0
    assert crossing([0, 1], [1.0, 1.0], [5, 6], [2.0, 2.0]) is None

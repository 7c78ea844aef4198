"""Cost of failures, by hand."""

import pytest

from solar_jax.planning.failures import RESTART, YEAR, failure_cost


def test_the_cost_of_failures_is_the_one_computed_by_hand():
    # 64 chips that fail once in 36,000 s together. 10 GB go to the host in one second.
    cost = failure_cost(YEAR / (36_000 * 64), 64, step_seconds=2.0, every=100, state_bytes=1e10)
    assert cost.between == pytest.approx(36_000)
    assert cost.stall == pytest.approx(1.0)
    assert cost.lost == pytest.approx(100 + RESTART)
    assert cost.goodput == pytest.approx((36_000 - 100) / (36_000 + RESTART) * 200 / 201)
    assert cost.best_every == round((2 * 36_000) ** 0.5 / 2)  # Young's interval, 268 s


def test_no_other_interval_has_a_higher_goodput_than_the_best_one():
    def goodput(every: int) -> float:
        return failure_cost(0.17, 16_384, 3.0, every, 2e10).goodput

    best = failure_cost(0.17, 16_384, 3.0, 100, 2e10)
    assert best.goodput < best.best_goodput == goodput(best.best_every)
    assert max(range(1, 400), key=goodput) == pytest.approx(best.best_every, abs=2)


def test_a_slice_that_fails_within_an_interval_never_ends():
    assert failure_cost(1000.0, 16_384, 3.0, 10_000, 2e10).goodput == 0

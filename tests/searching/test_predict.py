"""Seam scores and the predicted excess."""

import math

import numpy as np
import pytest

from solar_jax.searching.candidates import Repeat
from solar_jax.searching.predict import fitted_excess, seam_ratios


def test_seam_ratios_are_of_the_block_and_not_moved_by_one_huge_token():
    norms = np.array([[1.0, 1.0, 1.0], [2.0, 2.0, 2000.0], [4.0, 4.0, 4000.0]])
    ratios = seam_ratios(norms)
    assert ratios[1, 2] == pytest.approx(2)
    assert ratios[0, 1] == pytest.approx((2 * 2 * 2000) ** (1 / 3))
    assert math.isnan(ratios[1, 1])
    assert math.isnan(ratios[2, 1])


def test_measured_blocks_are_exact_and_others_follow_the_law_that_they_show():
    """Excess = ratio's logarithm ** 2 x visits - 1: learned from some blocks, predicted for the others."""
    logs = np.arange(11) ** 1.3 / 5
    ratios = seam_ratios(np.exp(logs)[:, None])

    def law(block: Repeat) -> float:
        return (logs[block.b] - logs[block.a]) ** 2 * (block.visits - 1)

    blocks = [Repeat(a, b, v) for a in range(10) for b in range(a + 1, 11) for v in (2, 3)]
    model = fitted_excess(ratios, {(block,): law(block) for block in blocks[::3]})
    assert model(blocks[0]) == law(blocks[0])
    others = [block for i, block in enumerate(blocks) if i % 3]
    errors = [abs(math.log(model(block) / law(block))) for block in others]
    assert max(errors) < 0.5
    unlearned = fitted_excess(ratios, {})
    assert max(abs(math.log(unlearned(block) / law(block))) for block in others) > 1.5  # a negative control


def test_an_excess_below_zero_is_no_reward_in_sums():
    model = fitted_excess(seam_ratios(np.exp(np.arange(4.0))[:, None]), {(Repeat(0, 1),): -0.1})
    assert model(Repeat(0, 1)) == 0
    assert model(Repeat(1, 2)) > 0

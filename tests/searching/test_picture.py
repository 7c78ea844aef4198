"""The picture shows what was evaluated, where it belongs."""

import math

import numpy as np

from solar_jax.searching.candidates import Repeat
from solar_jax.searching.find import FoundCut, ScoredCut
from solar_jax.searching.picture import excess_map, plot_search
from solar_jax.searching.predict import seam_ratios


def test_the_map_holds_the_excess_of_each_evaluated_block_of_two_visits(tmp_path):
    best = ScoredCut((Repeat(1, 3),), 2.5)
    found = FoundCut(
        best=best, dus=best, base_loss=2.0,
        candidates=(best, ScoredCut((Repeat(0, 1, 3),), 9.0), ScoredCut((Repeat(0, 1), Repeat(2, 3)), 9.0)),
        partial=(ScoredCut((Repeat(3, 4),), 2.25),), ratios=seam_ratios(np.exp(np.arange(5.0))[:, None]),
        confirmed=(), layers=4, spent=1.0, ended="",
    )  # fmt: skip
    values = excess_map(found)
    assert values.shape == (5, 5)
    assert {(a, b): values[a, b] for a, b in np.argwhere(~np.isnan(values)).tolist()} == {(1, 3): 0.5, (3, 4): 0.25}
    assert math.isnan(values[3, 1])
    plot_search(tmp_path / "found.png", found, "made")
    assert (tmp_path / "found.png").stat().st_size > 10_000

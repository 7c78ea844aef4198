"""Which checkpoints stay."""

import pytest

from solar_jax.config import CheckpointConfig
from solar_jax.orbax_store.retention import kept

LOSSES = {10: 3.0, 20: 2.0, 30: 2.5, 60: 1.0}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"keep": 1}, {50}),
        ({"keep": 2}, {40, 50}),
        ({"keep": 1, "keep_every": 20}, {20, 40, 50}),
        ({"keep": 1, "keep_best": 1}, {20, 50}),  # 60 has the best loss and no checkpoint
        ({"keep": 1, "keep_best": 2}, {20, 30, 50}),
        ({"keep": 1, "keep_best": 9}, {10, 20, 30, 50}),  # 40 and 50 were not evaluated
    ],
)
def test_the_newest_those_at_multiples_and_the_best_are_kept(changes, expected):
    assert kept([10, 20, 30, 40, 50], CheckpointConfig(**changes), LOSSES) == expected

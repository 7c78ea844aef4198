"""Twins, repeated blocks and lists of layers, by hand; losses of the lists, against transformers."""

import numpy as np
import pytest

from solar_jax.config import GrowthConfig
from solar_jax.growth.operators import LayerMap, make_layer_map
from solar_jax.inspecting.ablations import Reruns, Visits, exchanged, first_change, repeats, shared, twin_pairs, without
from tests.inspecting.models import LAYERS, ROWS, ready, reference, torch_losses


@pytest.mark.parametrize(
    ("growth", "pairs", "blocks"),
    [
        # 0 1 2 3 | 2 3 4 5
        (GrowthConfig("dus", m=2), [(2, 4), (3, 5)], [Visits(2, 4, 2)]),
        # 0..5 three times: the second visit is a twin of the first, the third of the second
        (GrowthConfig("naive", copies=3), [(i, i + 6) for i in range(12)], [Visits(0, 6, 6), Visits(6, 12, 6)]),
        # 0 0 1 1 ...: blocks of one layer each
        (
            GrowthConfig("interleave"),
            [(i, i + 1) for i in range(0, 12, 2)],
            [Visits(i, i + 1, 1) for i in range(0, 12, 2)],
        ),
        # 0 1 0/1 2 ...: a mean is no twin
        (GrowthConfig("average", every=2), [], []),
        (GrowthConfig("identity"), [], []),
        # 4 5 | 0 1 2 | 4 | 1 2
        (
            GrowthConfig("slices", slices="4:6,0:3,4:5,1:3"),
            [(0, 5), (3, 6), (4, 7)],
            [Visits(0, 5, 1), Visits(3, 6, 2)],
        ),
    ],
    ids=lambda x: x.operator if isinstance(x, GrowthConfig) else "",
)  # fmt: skip
def test_twins_copied_the_same_layer_and_blocks_are_the_longest_runs_of_them(growth, pairs, blocks):
    layer_map = make_layer_map(6, growth)
    assert twin_pairs(layer_map) == pairs
    assert repeats(layer_map) == blocks


def test_the_visits_of_a_block_never_overlap():
    """0 0 0 0: four visits of one layer are three blocks of one, not one of three."""
    assert repeats(LayerMap("x", 1, (0, 0, 0, 0))) == [Visits(0, 1, 1), Visits(1, 2, 1), Visits(2, 3, 1)]


def test_lists_of_layers():
    block = Visits(1, 3, 2)  # 0 [1 2] [3 4] 5
    assert without(6, 4) == [0, 1, 2, 3, 5]
    assert [first_change(order) for order in (without(6, 4), without(6, 5), [0, 1], [1, 0])] == [4, 5, 2, 0]
    assert exchanged(6, block) == [0, 3, 4, 1, 2, 5]
    assert shared(6, block, 0) == [0, 1, 2, 1, 2, 5]
    assert shared(6, block, 1) == [0, 3, 4, 3, 4, 5]


def test_losses_of_lists_are_those_of_transformers_and_cost_only_the_layers_that_follow(tmp_path_factory):
    model = ready(tmp_path_factory)
    reruns = Reruns(model.runner, model.params, model.batch, model.stream.inputs)
    block = Visits(1, 3, 2)
    orders = [
        list(range(LAYERS)), *(without(LAYERS, i) for i in range(LAYERS)), exchanged(LAYERS, block),
        shared(LAYERS, block, 0), shared(LAYERS, block, 1),
    ]  # fmt: skip
    assert [reruns.cost(order) for order in orders] == [0, 5, 4, 3, 2, 1, 0, 5, 3, 5]
    told = []
    found = reruns.all_losses(orders, lambda n, note: told.append(n))
    for order, losses in zip(orders, found, strict=True):
        np.testing.assert_allclose(losses[:ROWS], torch_losses(reference(), order), rtol=2e-5, err_msg=str(order))
    assert told == [reruns.cost(order) for order in orders]

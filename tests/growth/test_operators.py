"""Each operator's layer list against lists written by hand."""

import pytest

from solar_jax.config import GrowthConfig
from solar_jax.errors import UserError
from solar_jax.growth.operators import OPERATORS, LayerMap, identity, make_layer_map

BY_HAND = [
    (6, GrowthConfig("dus", m=2), [0, 1, 2, 3, 2, 3, 4, 5]),
    (3, GrowthConfig("dus", m=1), [0, 1, 1, 2]),
    (3, GrowthConfig("naive", copies=2), [0, 1, 2, 0, 1, 2]),
    (2, GrowthConfig("naive", copies=3), [0, 1, 0, 1, 0, 1]),
    (3, GrowthConfig("interleave", copies=2), [0, 0, 1, 1, 2, 2]),
    (2, GrowthConfig("interleave", copies=3), [0, 0, 0, 1, 1, 1]),
    (6, GrowthConfig("block_repeat", a=1, b=4), [0, 1, 2, 3, 1, 2, 3, 4, 5]),
    (3, GrowthConfig("block_repeat", a=0, b=3), [0, 1, 2, 0, 1, 2]),
    (4, GrowthConfig("llama_pro", every=2), [0, 1, 1, 2, 3, 3]),
    (5, GrowthConfig("llama_pro", every=2), [0, 1, 1, 2, 3, 3, 4]),
    (6, GrowthConfig("zeroed", m=2), [0, 1, 2, 3, 2, 3, 2, 3, 4, 5]),
    (4, GrowthConfig("average", every=1), [0, 0, 1, 1, 2, 2, 3]),
    (5, GrowthConfig("average", every=2), [0, 1, 1, 2, 3, 3, 4]),
    (4, GrowthConfig("average", every=2), [0, 1, 1, 2, 3]),  # none after the last layer
    (3, GrowthConfig("identity"), [0, 1, 2]),
    (6, GrowthConfig("slices", slices="0:4,2:6"), [0, 1, 2, 3, 2, 3, 4, 5]),
    (6, GrowthConfig("slices", slices=" 4:6 , 0:1,0:1"), [4, 5, 0, 0]),
]


@pytest.mark.parametrize(("n", "growth", "expected"), BY_HAND)
def test_layer_list_is_the_one_written_by_hand(n, growth, expected):
    layer_map = make_layer_map(n, growth)
    assert list(layer_map.source) == expected
    assert (layer_map.base_layers, layer_map.layers) == (n, len(expected))


def test_every_operator_has_a_list_by_hand():
    assert {growth.operator for _, growth, _ in BY_HAND} == set(OPERATORS)


def test_dus_of_the_paper():
    layer_map = make_layer_map(32, GrowthConfig("dus", m=8))
    assert list(layer_map.source) == [*range(24), *range(8, 32)]
    assert layer_map.layers == 48
    assert layer_map.seams == (23,)
    assert layer_map.distances == (1,) * 23 + (15,) + (1,) * 23
    assert layer_map.runs() == [(0, 24), (24, 48)]
    assert [i for i, new in enumerate(layer_map.new) if new] == [*range(24, 40)]  # source layers 8..23, a second time
    assert layer_map.copies_only


def test_the_naive_seam_of_the_paper_is_twice_as_far():
    layer_map = make_layer_map(32, GrowthConfig("naive"))
    assert layer_map.layers == 64
    assert layer_map.seams == (31,)
    assert layer_map.distances[31] == 31
    assert [d for i, d in enumerate(layer_map.distances) if i != 31] == [1] * 62


def test_the_papers_table_of_other_operators():
    assert (
        make_layer_map(32, GrowthConfig("slices", slices="0:24,8:32")).source
        == make_layer_map(32, GrowthConfig("dus")).source
    )
    yi = make_layer_map(32, GrowthConfig("block_repeat", a=12, b=28))
    assert list(yi.source) == [*range(28), *range(12, 28), *range(28, 32)]
    zeroed = make_layer_map(32, GrowthConfig("zeroed", m=8))
    assert list(zeroed.source) == [*range(24), *range(8, 24), *range(8, 24), *range(24, 32)]
    assert list(zeroed.scale) == [1.0] * 24 + [0.0] * 32 + [1.0] * 8


def test_llama_pro_zeroes_the_copies_and_only_them():
    layer_map = make_layer_map(4, GrowthConfig("llama_pro", every=2))
    assert layer_map.scale == (1.0, 1.0, 0.0, 1.0, 1.0, 0.0)
    assert layer_map.new == (False, False, True, False, False, True)
    assert not layer_map.copies_only


def test_zeroed_zeroes_both_middle_blocks_and_only_them():
    layer_map = make_layer_map(6, GrowthConfig("zeroed", m=2))
    assert layer_map.scale == (1.0,) * 4 + (0.0,) * 4 + (1.0,) * 2
    assert layer_map.new == (False,) * 4 + (True,) * 4 + (False,) * 2


def test_average_means_a_layer_with_the_next_and_nothing_else():
    layer_map = make_layer_map(5, GrowthConfig("average", every=2))
    assert layer_map.partner == (0, 1, 2, 2, 3, 4, 4)
    assert layer_map.new == (False, False, True, False, False, True, False)
    assert set(layer_map.scale) == {1.0}
    assert not layer_map.copies_only


def test_operators_without_means_or_zeros_leave_both_out():
    for growth in (GrowthConfig("dus", m=2), GrowthConfig("naive"), GrowthConfig("interleave")):
        layer_map = make_layer_map(6, growth)
        assert layer_map.partner == layer_map.source
        assert set(layer_map.scale) == {1.0}
        assert layer_map.copies_only


def test_the_identity_has_no_seam_and_nothing_new():
    layer_map = identity(4)
    assert layer_map.seams == ()
    assert layer_map.distances == (1, 1, 1)
    assert layer_map.runs() == [(0, 4)]
    assert not any(layer_map.new)


def test_a_plan_of_one_layer_has_one_run_and_no_neighbours():
    layer_map = identity(1)
    assert (layer_map.seams, layer_map.distances, layer_map.runs()) == ((), (), [(0, 1)])


def test_a_seam_is_any_step_but_one_forward():
    # one back, none, two forward, one forward, one back
    layer_map = LayerMap("slices", 5, (3, 2, 2, 4))
    assert layer_map.seams == (0, 1, 2)
    assert layer_map.distances == (1, 0, 2)
    assert layer_map.runs() == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert layer_map.new == (False, False, True, False)


@pytest.mark.parametrize(
    ("growth", "found"),
    [
        (GrowthConfig("dus", m=0), "m=0"),
        (GrowthConfig("dus", m=16), "m=16"),  # [0..16) + [16..32) is the base again
        (GrowthConfig("zeroed", m=16), "m=16"),
        (GrowthConfig("zeroed", m=-1), "m=-1"),
        (GrowthConfig("naive", copies=1), "found 1"),
        (GrowthConfig("interleave", copies=0), "found 0"),
        (GrowthConfig("block_repeat", a=-1, b=4), "a=-1"),
        (GrowthConfig("block_repeat", a=4, b=4), "a=4 b=4"),
        (GrowthConfig("block_repeat", a=4, b=33), "b=33"),
        (GrowthConfig("llama_pro", every=0), "found 0"),
        (GrowthConfig("llama_pro", every=33), "found 33"),
        (GrowthConfig("average", every=0), "found 0"),
        (GrowthConfig("average", every=32), "found 32"),  # no layer follows the last one
        (GrowthConfig("slices", slices=""), "found ''"),
        (GrowthConfig("slices", slices="0:24,8-32"), "found '8-32'"),
        (GrowthConfig("slices", slices="0:24,"), "found ''"),
        (GrowthConfig("slices", slices="0:33"), "found 0:33"),
        (GrowthConfig("slices", slices="8:8"), "found 8:8"),
        (GrowthConfig("slices", slices="9:8"), "found 9:8"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_by_operator_base_and_value(growth, found):
    with pytest.raises(UserError) as e:
        make_layer_map(32, growth)
    for part in (f"growth operator {growth.operator}(", "base of 32 layers", found):
        assert part in str(e.value)


def test_an_unknown_operator_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"growth\.operator must be one of dus, .*slices, found 'solar'"):
        make_layer_map(32, GrowthConfig("solar"))

"""Each operator's layer list against lists written by hand."""

import pytest

from solar_jax.config import GrowthConfig
from solar_jax.errors import UserError
from solar_jax.growth.operators import OPERATORS, LayerMap, composed, identity, make_layer_map

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
    (6, GrowthConfig("blocks", blocks="1:4"), [0, 1, 2, 3, 1, 2, 3, 4, 5]),
    (6, GrowthConfig("blocks", blocks="0:1x3, 2:4 x 2"), [0, 0, 0, 1, 2, 3, 2, 3, 4, 5]),
    (6, GrowthConfig("midas", b=2), [0, 1, 2, 3, 2, 3, 4, 5]),  # blocks 01 23 45, the second
    (8, GrowthConfig("midas", b=2), [0, 1, 2, 3, 2, 3, 4, 5, 6, 7]),  # of four blocks the second
    (8, GrowthConfig("lidas", b=2), [0, 1, 2, 3, 4, 3, 4, 5, 6, 7]),  # around layer 4, across blocks
    (7, GrowthConfig("lidas", b=3), [0, 1, 2, 3, 4, 2, 3, 4, 5, 6]),
    (5, GrowthConfig("stack_last", b=2), [0, 1, 2, 3, 4, 3, 4]),
    (4, GrowthConfig("split", a=1, b=3), [0, 1, 1, 2, 2, 3]),
    (4, GrowthConfig("split_sqrt", a=0, b=2), [0, 0, 1, 1, 2, 3]),
    (4, GrowthConfig("linear_lesa", every=1), [0, 0, 1, 1, 2, 2, 3]),
    (6, GrowthConfig("gated", of="dus", m=2), [0, 1, 2, 3, 2, 3, 4, 5]),
    (3, GrowthConfig("tied", of="naive"), [0, 1, 2, 0, 1, 2]),
    (6, GrowthConfig("zeroed", m=2, inner="normal"), [0, 1, 2, 3, 2, 3, 2, 3, 4, 5]),
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


def test_zeroed_has_its_inner_matrices_from_the_layer_from_both_neighbours_or_from_noise():
    copy, mean, normal = (make_layer_map(6, GrowthConfig("zeroed", m=2, inner=x)) for x in ("copy", "mean", "normal"))
    assert copy.partner == copy.source
    assert mean.partner == (0, 1, 2, 3, 3, 4, 3, 4, 4, 5)
    assert normal.noise == mean.new == copy.new == (False,) * 4 + (True,) * 4 + (False,) * 2
    assert copy.scale == mean.scale == normal.scale
    assert not any(copy.noise)


def test_a_gate_scales_second_and_later_visits_and_only_them():
    gated = make_layer_map(6, GrowthConfig("gated", of="blocks", blocks="1:3x3", beta=0.25))
    assert gated.scale == (1.0, 1.0, 1.0, 0.25, 0.25, 0.25, 0.25, 1.0, 1.0, 1.0)
    assert gated.operator == "gated(blocks(1:3x3), beta=0.25)"
    assert make_layer_map(6, GrowthConfig("gated", of="llama_pro", every=6, beta=0.5)).scale[-1] == 0


def test_twins_share_the_scale_between_them():
    assert make_layer_map(3, GrowthConfig("split", a=1, b=2, alpha=0.75)).scale == (1.0, 0.75, 0.25, 1.0)
    assert make_layer_map(3, GrowthConfig("split_sqrt", a=1, b=2)).scale == (1.0, 2**-0.5, 2**-0.5, 1.0)


def test_tied_is_its_operators_map_and_says_so():
    tied, dus = (make_layer_map(6, GrowthConfig(x, of="dus", m=2)) for x in ("tied", "dus"))
    assert (tied.tied, dus.tied) == (True, False)
    assert tied.source == dus.source


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
        (GrowthConfig("blocks", blocks=""), "found ''"),
        (GrowthConfig("blocks", blocks="2:20x1"), "found 1"),
        (GrowthConfig("blocks", blocks="2:8,6:9"), "found 6:9 after layer 8"),
        (GrowthConfig("blocks", blocks="2:33"), "found 2:33"),
        (GrowthConfig("blocks", blocks="2-8"), "found '2-8'"),
        (GrowthConfig("midas", b=5), "found b=5"),
        (GrowthConfig("midas", b=0), "found b=0"),
        (GrowthConfig("lidas", b=33), "found b=33"),
        (GrowthConfig("stack_last", b=0), "found b=0"),
        (GrowthConfig("split", a=3, b=3), "a=3 b=3"),
        (GrowthConfig("split", a=3, b=5, alpha=1.5), "found 1.5"),
        (GrowthConfig("gated", beta=-0.5), "found -0.5"),
        (GrowthConfig("gated", beta=float("nan")), "found nan"),
        (GrowthConfig("tied", of="average"), "plain copies"),
        (GrowthConfig("zeroed", inner="zeros"), "found 'zeros'"),
        (GrowthConfig("linear_lesa", every=0), "found 0"),
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
    with pytest.raises(UserError, match=r"growth\.operator must be one of dus, .*tied, found 'solar'"):
        make_layer_map(32, GrowthConfig("solar"))


@pytest.mark.parametrize("of", ["gated", "tied", "identity", "DUS"])
@pytest.mark.parametrize("operator", ["gated", "tied"])
def test_an_operator_that_no_other_can_change_is_refused_with_those_that_can(operator, of):
    with pytest.raises(UserError, match=rf"growth\.of of {operator} must be one of dus, .*, found '{of}'"):
        make_layer_map(32, GrowthConfig(operator, of=of))


def test_two_growths_in_a_row_compose_to_the_one_map_of_both():
    once = make_layer_map(4, GrowthConfig("blocks", blocks="1:3"))  # 0 1 2 1 2 3
    both = composed(once, make_layer_map(6, GrowthConfig("gated", of="blocks", blocks="0:1,3:5", beta=0.5)))
    assert both.source == (0, 0, 1, 2, 1, 2, 1, 2, 3)
    assert both.scale == (1.0, 0.5, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 1.0)
    assert both.new == (False, True, False, False, True, True, True, True, False)
    assert both.base_layers == 4
    assert composed(identity(4), once) == once
    assert composed(once, identity(6)) == once
    mean = make_layer_map(6, GrowthConfig("average", every=4))  # a mean of layers 3 and 4, which are sources 1 and 2
    assert composed(once, mean).partner == (0, 1, 2, 1, 2, 2, 3)
    with pytest.raises(UserError, match=r"average.* then by blocks.* no single layer map"):
        composed(mean, make_layer_map(7, GrowthConfig("blocks", blocks="1:3")))
    gated = make_layer_map(4, GrowthConfig("gated", of="blocks", blocks="1:3", beta=0.5))  # scales 1 1 1 .5 .5 1
    with pytest.raises(UserError, match="no single layer map"):  # a mean of layers 2 and 3, of scales 1 and 0.5
        composed(gated, make_layer_map(6, GrowthConfig("average", every=3)))

"""Cuts as layers, their neighbours, and the ranking of sums against enumeration."""

import random

import pytest

from solar_jax.config import GrowthConfig
from solar_jax.errors import UserError
from solar_jax.growth.operators import make_layer_map
from solar_jax.searching.candidates import (
    Repeat,
    best_sums,
    blocks_text,
    check_added,
    dus_cut,
    is_valid,
    layers_from_cache,
    most_visits,
    neighbours,
    one_block_cuts,
    slices_text,
    source_layers,
)


def enumerated(add: int, n: int) -> set[tuple[Repeat, ...]]:
    """All cuts of n layers that add so many, by trying every set of blocks."""
    blocks = [
        Repeat(a, b, visits)
        for a in range(n)
        for b in range(a + 1, n + 1)
        for visits in range(2, most_visits(add, n) + 1)
    ]
    some, found = [()], set()
    while some:  # one more block behind each
        some = [(*cut, block) for cut in some for block in blocks if is_valid((*cut, block), n)]
        some = [cut for cut in some if sum(block.added for block in cut) <= add]
        found |= {cut for cut in some if sum(block.added for block in cut) == add}
    return found


def test_blocks_are_walked_as_they_are_written():
    cut = (Repeat(1, 3, 3), Repeat(4, 5))
    assert blocks_text(cut) == "1:3x3,4:5"
    assert source_layers(cut, 6) == (0, 1, 2, 1, 2, 1, 2, 3, 4, 4, 5)
    assert slices_text(source_layers(cut, 6)) == "0:3,1:3,1:5,4:6"
    assert source_layers((), 3) == (0, 1, 2)


def test_touching_blocks_are_not_one_block():
    assert source_layers((Repeat(0, 2), Repeat(2, 4)), 4) == (0, 1, 0, 1, 2, 3, 2, 3)
    assert source_layers((Repeat(0, 4),), 4) == (0, 1, 2, 3, 0, 1, 2, 3)


def test_slices_give_the_growth_operator_the_same_layers():
    for cut in enumerated(3, 4):
        layers = source_layers(cut, 4)
        assert len(layers) == 7
        assert make_layer_map(4, GrowthConfig("slices", slices=slices_text(layers))).source == layers


def test_dus_of_a_search_is_the_operators():
    for m in (6, 8, 14):
        cut = dus_cut(30 - 2 * m, 30)
        assert cut is not None
        assert source_layers(cut, 30) == make_layer_map(30, GrowthConfig("dus", m=m)).source
    assert dus_cut(3, 6) == (Repeat(1, 4),)  # odd: the block nearer to the start
    assert dus_cut(6, 6) is None


def test_a_cut_costs_the_layers_after_the_bases_order_is_left():
    assert layers_from_cache((Repeat(2, 20),), 30) == (20, (*range(2, 20), *range(20, 30)))
    assert layers_from_cache((), 30) == (30, ())


@pytest.mark.parametrize(("add", "n"), [(3, 5), (4, 4), (7, 3)])
def test_sums_are_ranked_as_by_enumeration(add, n):
    rng = random.Random(add)
    costs: dict[Repeat, float] = {}

    def cost(block: Repeat) -> float:
        return costs.setdefault(block, rng.random())

    found = best_sums(add, n, cost, 12)
    by_hand = sorted((sum(cost(b) for b in reversed(cut)), cut) for cut in enumerated(add, n))[:12]
    assert [cut for _, cut in found] == [cut for _, cut in by_hand]
    assert [total for total, _ in found] == pytest.approx([total for total, _ in by_hand])


def test_neighbours_are_cuts_of_the_same_depth_and_all_cuts_can_be_reached():
    everything = enumerated(4, 5)
    start = (Repeat(0, 4),)
    reached, left = {start}, [start]
    while left:
        for cut in neighbours(left.pop(), 5):
            assert cut in everything
            if cut not in reached:
                reached.add(cut)
                left.append(cut)
    assert reached == everything


def test_a_boundary_moves_with_its_block_and_against_another():
    found = neighbours((Repeat(2, 5), Repeat(7, 9)), 12)
    assert (Repeat(3, 6), Repeat(7, 9)) in found  # shifted
    assert (Repeat(2, 6), Repeat(8, 9)) in found  # one layer from block to block
    assert (Repeat(2, 4), Repeat(4, 5), Repeat(7, 9)) in found  # split
    assert (Repeat(2, 9),) in neighbours((Repeat(2, 5), Repeat(5, 9)), 12)  # merged
    assert (Repeat(2, 4, 3),) in neighbours((Repeat(2, 6),), 12)  # half as long, three visits


def test_single_blocks_of_more_visits_are_there_where_the_base_is_too_short_for_two():
    assert one_block_cuts(4, 6)[:3] == [(Repeat(0, 4),), (Repeat(1, 5),), (Repeat(2, 6),)]
    assert {cut[0].visits for cut in one_block_cuts(12, 6)} == {3, 4}
    assert one_block_cuts(7, 6) == []  # a prime above n: sums of blocks alone reach it
    assert best_sums(7, 6, lambda block: 1.0, 1)


def test_too_few_or_too_many_added_layers_are_refused():
    with pytest.raises(UserError, match=r"at least 1.*found 0"):
        check_added(0, 30)
    with pytest.raises(UserError, match="by at most 240"):
        check_added(241, 30)
    check_added(240, 30)

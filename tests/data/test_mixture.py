"""Which source gives the row at each place: counted by hand, exact over any stretch, one pass after another."""

import collections

import grain
import numpy as np
import pytest

from solar_jax.data.mixture import Mixture, row_shares, rows_of


def of(shares: list[int], lengths: list[int]) -> Mixture:
    return Mixture([grain.MapDataset.range(n).repeat(None) for n in lengths], shares)


def test_a_small_mixture_by_hand():
    # Every other place is the first source's; of the others a third are the second's.
    mixture = of([3, 1, 2], [100, 100, 100])
    assert [mixture[i] for i in range(12)] == [
        (0, 0), (1, 0), (0, 1), (2, 0), (0, 2), (2, 1), (0, 3), (1, 1), (0, 4), (2, 2), (0, 5), (2, 3),
    ]  # fmt: skip


@pytest.mark.parametrize("shares", [[1], [1, 1], [3, 1], [5, 7, 1], [1, 1000], [2**40 // 3, 2**40 // 7, 17]])
def test_every_source_has_its_share_of_the_first_n_places_within_one_for_each_before_it(shares):
    mixture, seen = of(shares, [1000] * len(shares)), collections.Counter()
    for n in range(1, 2000):
        source, element = mixture[n - 1]
        assert element == seen[source] % 1000  # its elements come in order, none left out
        seen[source] += 1
        expected = [n * s / sum(shares) for s in shares]
        counts = [seen[i] for i in range(len(shares))]
        assert counts == rows_of(shares, n)
        assert np.abs(np.subtract(counts, expected)).max() < len(shares)


def test_shares_of_rows_make_up_for_rows_that_hold_less():
    # Half of the tokens each, where a row of the second has a third of the first's: a quarter and three.
    shares = row_shares([1.0, 1.0], [300.0, 100.0])
    assert shares[1] / sum(shares) == pytest.approx(0.75, rel=1e-9)


def test_a_share_is_never_nothing():
    assert row_shares([1e-30, 1.0], [1.0, 1.0])[0] == 1


def test_a_place_far_on_is_found_at_once():
    assert of([1, 2], [10, 10])[3 * 10**15][0] in (0, 1)

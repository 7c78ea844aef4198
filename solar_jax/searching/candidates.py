"""Cuts of a base: disjoint blocks of its layers that are visited more than once, and how to move between cuts.

A cut of n layers is written as its blocks, "2:20" or "2:8x3,12:16": half-open layer ranges, with the number of visits
where it is not two. A block [a, b) with r visits adds (b - a) (r - 1) layers. Everything here is plain Python.
"""

import dataclasses
import heapq
import itertools
from collections.abc import Callable, Iterator

from solar_jax.errors import UserError


@dataclasses.dataclass(frozen=True, order=True)
class Repeat:
    """Layers [a, b), visited so often in a row."""

    a: int
    b: int
    visits: int = 2

    @property
    def added(self) -> int:
        """Number of layers that the block adds."""
        return (self.b - self.a) * (self.visits - 1)

    def __str__(self) -> str:
        return f"{self.a}:{self.b}" + (f"x{self.visits}" if self.visits != 2 else "")


Cut = tuple[Repeat, ...]  # ascending and disjoint; () is the base


def blocks_text(cut: Cut) -> str:
    """Formats a cut as `config.growth.blocks` takes it; the base is ""."""
    return ",".join(map(str, cut))


def source_layers(cut: Cut, n: int) -> tuple[int, ...]:
    """Returns the source layer of every layer of the deeper model, n + added of them."""
    layers, done = [], 0
    for block in cut:
        layers += [*range(done, block.b), *list(range(block.a, block.b)) * (block.visits - 1)]
        done = block.b
    return (*layers, *range(done, n))


def slices_text(layers: tuple[int, ...]) -> str:
    """Formats source layers as `--slices` takes them: half-open ranges, "0:20,2:30"."""
    cuts = [i + 1 for i, (x, y) in enumerate(itertools.pairwise(layers)) if y != x + 1]
    runs = itertools.pairwise([0, *cuts, len(layers)])
    return ",".join(f"{layers[start]}:{layers[stop - 1] + 1}" for start, stop in runs)


def layers_from_cache(cut: Cut, n: int) -> tuple[int, tuple[int, ...]]:
    """Splits a cut into what the base's own forward holds and what is left to compute.

    Returns:
      b, where the cut leaves the base's order, so that the layer input h_b is the same; and the layers from there on.
    """
    b = cut[0].b if cut else n
    return b, source_layers(cut, n)[b:]


def check_added(add: int, n: int) -> None:
    """Raises a UserError unless a cut of n layers can add `add`."""
    if add < 1:
        raise UserError(f"--add must be at least 1, the number of layers to add to the {n} of the base, found {add}.")
    if add > n * _MOST_DEEP:
        raise UserError(f"--add={add}: a base of {n} layers can grow by at most {n * _MOST_DEEP} in a search.")


_MOST_DEEP = 8  # times the base that are added at most


def most_visits(add: int, n: int) -> int:
    """Returns how often a block may be visited in a search: one visit more than the added layers need at least."""
    return min(add + 1, -(-add // n) + 2)


def dus_cut(add: int, n: int) -> Cut | None:
    """Returns SOLAR's cut with as many added layers: the middle block, one nearer to the start where it is odd.

    None where the base is too short for it: two copies without their ends add fewer than n layers.
    """
    return (Repeat((n - add) // 2, (n - add) // 2 + add),) if add < n else None


def one_block_cuts(add: int, n: int) -> list[Cut]:
    """Returns all cuts of a single block that add exactly `add` layers, fewest visits first."""
    found: list[Cut] = []
    for visits in range(2, most_visits(add, n) + 1):
        length, rest = divmod(add, visits - 1)
        if not rest and length <= n:
            found += [(Repeat(a, a + length, visits),) for a in range(n - length + 1)]
    return found


# ---- Ranking by sums -------------------------------------------------------------------------------------------------
def best_sums(add: int, n: int, cost: Callable[[Repeat], float], count: int) -> list[tuple[float, Cut]]:
    """Returns the `count` cuts with the lowest sum of their blocks' costs, by dynamic programming.

    State: first layer that is still free, layers still to add; O(n^2 add visits count). Excesses of disjoint blocks are
    sub-additive, so the sum ranks cuts and does not predict their loss.

    Args:
      add: layers that each cut adds.
      n: layers of the base.
      cost: of one block by itself.
      count: cuts wanted.

    Returns:
      (sum, cut), lowest first.
    """
    costs = {
        block: cost(block)
        for a in range(n)
        for b in range(a + 1, n + 1)
        for visits in range(2, most_visits(add, n) + 1)
        if (block := Repeat(a, b, visits)).added <= add
    }
    by_start: dict[int, list[Repeat]] = {}
    for block in costs:
        by_start.setdefault(block.a, []).append(block)
    # best[p][k]: the lowest sums of cuts of the layers from p on that add k.
    best: list[list[list[tuple[float, Cut]]]] = [[[] for _ in range(add + 1)] for _ in range(n + 1)]
    best[n][0] = [(0.0, ())]
    for p in reversed(range(n)):
        for k in range(add + 1):
            options = list(best[p + 1][k])
            for block in by_start.get(p, ()):
                if block.added <= k:
                    own = costs[block]
                    options += [(own + rest, (block, *cut)) for rest, cut in best[block.b][k - block.added]]
            best[p][k] = heapq.nsmallest(count, options)
    return best[0][add]


# ---- Neighbours ------------------------------------------------------------------------------------------------------
def is_valid(cut: Cut, n: int) -> bool:
    """Returns whether blocks lie within n layers, ascend and are disjoint."""
    ends = [x for block in cut for x in (block.a, block.b)]
    return (
        all(block.a < block.b and block.visits >= 2 for block in cut)
        and all(y.a >= x.b for x, y in itertools.pairwise(cut))
        and (not ends or (ends[0] >= 0 and ends[-1] <= n))
    )


def neighbours(cut: Cut, n: int) -> list[Cut]:
    """Returns the cuts one move away that add as many layers.

    Moves: two boundaries by one layer each (of one block, that shifts it); a block split in two, or cut to half its
    layers with one more visit each; two touching blocks of equal visits merged.
    """
    added = sum(block.added for block in cut)
    limit = most_visits(added, n)
    found: dict[Cut, None] = {}
    for moved in itertools.chain(_moved(cut), _split(cut), _merged(cut), _revisited(cut)):
        if is_valid(moved, n) and sum(b.added for b in moved) == added and all(b.visits <= limit for b in moved):
            found[moved] = None
    found.pop(cut, None)
    return list(found)


def _moved(cut: Cut) -> Iterator[Cut]:
    """Moves any two boundaries by one layer."""
    moves = [(i, end, by) for i in range(len(cut)) for end in ("a", "b") for by in (-1, 1)]
    for first, second in itertools.combinations(moves, 2):
        blocks = list(cut)
        for i, end, by in (first, second):
            blocks[i] = dataclasses.replace(blocks[i], **{end: getattr(blocks[i], end) + by})
        yield tuple(blocks)


def _split(cut: Cut) -> Iterator[Cut]:
    """Splits one block at each of its layers."""
    for i, block in enumerate(cut):
        for at in range(block.a + 1, block.b):
            halves = (dataclasses.replace(block, b=at), dataclasses.replace(block, a=at))
            yield (*cut[:i], *halves, *cut[i + 1 :])


def _merged(cut: Cut) -> Iterator[Cut]:
    """Merges two blocks that touch."""
    for i, (x, y) in enumerate(itertools.pairwise(cut)):
        if x.b == y.a and x.visits == y.visits:
            yield (*cut[:i], Repeat(x.a, y.b, x.visits), *cut[i + 2 :])


def _revisited(cut: Cut) -> Iterator[Cut]:
    """Changes one block's visits by one, and its length to add as many layers, from either end."""
    for i, block in enumerate(cut):
        for visits in (block.visits - 1, block.visits + 1):
            length, rest = divmod(block.added, max(1, visits - 1))
            if not rest:
                for a in (block.a, block.b - length):
                    yield (*cut[:i], Repeat(a, a + length, visits), *cut[i + 1 :])

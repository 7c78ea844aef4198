"""Order in which a search evaluates cuts, within a budget: a survey, sums ranked exactly, neighbours of the best."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable

import numpy as np

from solar_jax.searching.candidates import (
    Cut,
    Repeat,
    best_sums,
    dus_cut,
    layers_from_cache,
    neighbours,
    one_block_cuts,
)
from solar_jax.searching.predict import ExcessModel, fitted_excess

RANKED, ROUNDS = 5, 4  # new cuts of the lowest sums that are evaluated exactly, and how often sums are ranked again
EXPANDED = 3  # best cuts whose neighbours are evaluated
_LADDER = (2, 3, 6)  # the survey's shorter blocks have 1/2, 1/3, 1/6 of the added layers, and one layer
_PLACES = 4  # of each shorter length that the survey evaluates


class BudgetEnds(Exception):
    """Raised within a search when the next evaluation would exceed the budget."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """Excess of a cut, and the share of the search text that it was measured on."""

    excess: float  # nats a token
    share: float = 1.0


@dataclasses.dataclass
class Evaluations:
    """Evaluations of a search: what was measured and the layers that it cost."""

    n: int
    add: int
    measure: Callable[[Cut, Cut | None], Measured]  # a cut, and the one that it has to come near
    budget: float  # layers
    head: float  # layers that cost as much as the output projection
    spent: float = 0.0
    found: dict[Cut, Measured] = dataclasses.field(default_factory=dict)  # in order

    @property
    def excess(self) -> dict[Cut, float]:
        """Excess of every evaluated cut."""
        return {cut: measured.excess for cut, measured in self.found.items()}

    def cost(self, cut: Cut) -> float:
        """Layers that a cut costs to evaluate on all of the text."""
        return len(layers_from_cache(cut, self.n)[1]) + self.head

    def evaluate(self, cut: Cut) -> float:
        """Returns a cut's excess, measured once.

        Raises:
          BudgetEnds: it is not known, and would cost too much.
        """
        if cut not in self.found:
            best = self.best()
            if self.spent + self.cost(cut) > self.budget and best:
                raise BudgetEnds
            self.found[cut] = self.measure(cut, best[0] if best else None)
            self.spent += self.cost(cut) * self.found[cut].share
        return self.found[cut].excess

    def best(self) -> list[Cut]:
        """Returns the cuts that add all layers and were evaluated on all of the text, lowest excess first."""
        full = [cut for cut, x in self.found.items() if x.share == 1.0 and added_by(cut) == self.add]
        return sorted(full, key=lambda cut: (self.found[cut].excess, cut))


def added_by(cut: Cut) -> int:
    """Returns the number of layers that a cut adds."""
    return sum(block.added for block in cut)


def survey_cuts(add: int, n: int, ratios: np.ndarray) -> list[Cut]:
    """Returns what is evaluated first: dus, all single blocks of two visits or the best places of more, and shorter
    blocks at a few places, from which the ranking of sums learns.

    Shorter blocks stand at the places of the lowest seam ratios, and evenly over the depth.
    """
    found: dict[Cut, None] = {}
    if (dus := dus_cut(add, n)) is not None:
        found[dus] = None
    singles = one_block_cuts(add, n)
    for visits, cuts in itertools.groupby(singles, key=lambda cut: cut[0].visits):
        of_visits = list(cuts)
        full = visits == singles[0][0].visits
        found |= dict.fromkeys(of_visits if full else sorted(of_visits, key=_by_ratio(ratios))[:_PLACES])
    lengths = {max(1, add // part) for part in _LADDER} | {1}
    for length in sorted((x for x in lengths if x < min(add, n)), reverse=True):
        cuts = [(Repeat(a, a + length),) for a in range(n - length + 1)]
        evenly = [cuts[round(i)] for i in np.linspace(0, len(cuts) - 1, _PLACES)]
        found |= dict.fromkeys([*sorted(cuts, key=_by_ratio(ratios))[: _PLACES // 2], *evenly])
    return list(found)


def _by_ratio(ratios: np.ndarray) -> Callable[[Cut], float]:
    return lambda cut: sum(abs(float(np.log(ratios[block.a, block.b]))) * (block.visits - 1) for block in cut)


def run_search(done: Evaluations, ratios: np.ndarray) -> str:
    """Evaluates cuts until none is left that is worth it, or the budget ends.

    1. The survey. 2. Dynamic programming over sums, whose lowest new ones are evaluated exactly, and again with
    what was learned. 3. Neighbours of the best, those of the lowest sums first, until the best few have no better ones.

    Args:
      done: filled in.
      ratios: of `predict.seam_ratios`.

    Returns:
      Why it ended.
    """
    try:
        for cut in survey_cuts(done.add, done.n, ratios):
            done.evaluate(cut)
        for _ in range(ROUNDS):
            model = fitted_excess(ratios, done.excess)
            ranked = [cut for _, cut in best_sums(done.add, done.n, model, RANKED * ROUNDS)]
            for cut in [cut for cut in ranked if cut not in done.found][:RANKED]:
                done.evaluate(cut)
        _climb(done, ratios)
    except BudgetEnds:
        return "the budget is spent"
    return f"the best {EXPANDED} cuts have no better neighbour"


def _climb(done: Evaluations, ratios: np.ndarray) -> None:
    """Evaluates the neighbours of the best cuts, the best one's first, starting again whenever the order changes."""
    expanded: set[Cut] = set()
    while left := [cut for cut in done.best()[:EXPANDED] if cut not in expanded]:
        cut = left[0]
        model = fitted_excess(ratios, done.excess)
        for other in _in_order(neighbours(cut, done.n), model):
            known = other in done.excess
            if done.evaluate(other) < done.excess[cut] and not known:
                break  # go on from the better one; what is left of this one's is taken up if it stays among the best
        else:
            expanded.add(cut)


def _in_order(cuts: Iterable[Cut], model: ExcessModel) -> list[Cut]:
    return sorted(cuts, key=lambda cut: (sum(map(model, cut)), cut))


def forwards(done: Evaluations) -> float:
    """Returns the budget spent, in forwards of the base."""
    return done.spent / (done.n + done.head)

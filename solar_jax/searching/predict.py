"""Excess losses of blocks predicted from the seam: the ratio of residual norms where a block begins again."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from solar_jax.searching.candidates import Cut, Repeat

_FLOOR = 1e-3  # of logarithms' arguments: an excess may be 0 or below
# Before anything is measured: log excess = 0 + 1 log(log ratio) + 0 log length + 1 log(visits - 1), with this weight.
_PRIOR, _PRIOR_WEIGHT = np.array([0.0, 1.0, 0.0, 1.0]), 0.5


def seam_ratios(norms: np.ndarray) -> np.ndarray:
    """Returns |h_b| / |h_a| at every seam, [n + 1, n + 1] float64 at [a, b]; NaN unless a < b.

    The geometric mean over tokens: a few positions have norms a hundred times larger, which an arithmetic mean follows.

    Args:
      norms: [n + 1, tokens], of every layer's input and of the last output, over tokens that count.
    """
    logs = np.log(norms).mean(axis=1)
    ratios = np.exp(logs[None, :] - logs[:, None])
    return np.where(np.triu(np.ones_like(ratios, bool), 1), ratios, np.nan)


@dataclasses.dataclass(frozen=True)
class ExcessModel:
    """Excess of a block by itself: measured where it is known, otherwise predicted from its seam."""

    ratios: np.ndarray  # of `seam_ratios`
    weights: np.ndarray  # [4]
    known: Mapping[Repeat, float]

    def __call__(self, block: Repeat) -> float:
        if (found := self.known.get(block)) is not None:
            return max(found, 0.0)
        return float(np.exp(_features(self.ratios, block) @ self.weights))


def _features(ratios: np.ndarray, block: Repeat) -> np.ndarray:
    moved = abs(math.log(ratios[block.a, block.b]))
    return np.array([1.0, math.log(max(moved, _FLOOR)), math.log(block.b - block.a), math.log(block.visits - 1)])


def fitted_excess(ratios: np.ndarray, measured: Mapping[Cut, float]) -> ExcessModel:
    """Fits log excess to log(log ratio), log length and log(visits - 1) by ridge regression towards a prior.

    Args:
      ratios: of `seam_ratios`.
      measured: excess of cuts; those of one block count.
    """
    known = {cut[0]: excess for cut, excess in measured.items() if len(cut) == 1}
    x = np.array([_features(ratios, block) for block in known]).reshape(-1, len(_PRIOR))
    y = np.array([math.log(max(excess, _FLOOR)) for excess in known.values()])
    left = x.T @ x + _PRIOR_WEIGHT * np.eye(len(_PRIOR))
    weights = _PRIOR + np.linalg.solve(left, x.T @ (y - x @ _PRIOR))
    return ExcessModel(ratios, weights, known)


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Returns Spearman's correlation of two arrays [N], ties ranked by order; NaN below three values."""
    if len(x) < 3:
        return math.nan
    ranks = np.stack([np.argsort(np.argsort(v, kind="stable"), kind="stable") for v in (x, y)])
    return float(np.corrcoef(ranks)[0, 1])

"""Excess losses of blocks predicted from the seam: the ratio of residual norms where a block begins again."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from solar_jax.searching.candidates import Cut, Repeat

_FLOOR = 1e-3  # of logarithms' arguments: an excess may be 0 or below
# Before anything is measured: log excess = -0.5 + log(log ratio) + 0 log length + 1.8 log(visits - 1), each coefficient
# with a deviation of 1. Around that law, nearby blocks deviate alike: by `_LOCAL` over `_NEAR` layers.
_PRIOR = np.array([-0.5, 1.0, 0.0, 1.8])
_LOCAL, _NEAR, _NEAR_VISITS, _NOISE = 1.0, 2.5, 1.0, 0.1


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
    """Excess of a block by itself: measured where it is known, otherwise predicted from its seam and its neighbours."""

    ratios: np.ndarray  # of `seam_ratios`
    known: Mapping[Repeat, float]
    solved: np.ndarray  # [known], the inverse of their covariance times their distance from the prior law

    def __call__(self, block: Repeat) -> float:
        if (found := self.known.get(block)) is not None:
            return max(found, 0.0)
        away = _covariance(self.ratios, [block], list(self.known)) @ self.solved if self.known else np.zeros(1)
        return float(np.exp(_features(self.ratios, [block]) @ _PRIOR + away)[0])


def _features(ratios: np.ndarray, blocks: Sequence[Repeat]) -> np.ndarray:
    """[blocks, 4]: what the law is linear in."""
    a, b, visits = np.array([(x.a, x.b, x.visits) for x in blocks]).T
    moved = np.maximum(np.abs(np.log(ratios[a, b])), _FLOOR)
    return np.stack([np.ones(len(blocks)), np.log(moved), np.log(b - a), np.log(visits - 1)], axis=1)


def _covariance(ratios: np.ndarray, x: Sequence[Repeat], y: Sequence[Repeat]) -> np.ndarray:
    """[x, y], of the deviations of log excess from the prior law: uncertain coefficients, and nearby blocks."""
    places = [np.array([(k.a / _NEAR, k.b / _NEAR, math.log(k.visits - 1) / _NEAR_VISITS) for k in z]) for z in (x, y)]
    distance = np.square(places[0][:, None] - places[1][None]).sum(axis=-1)
    return _features(ratios, x) @ _features(ratios, y).T + _LOCAL**2 * np.exp(-distance / 2)


def fitted_excess(ratios: np.ndarray, measured: Mapping[Cut, float]) -> ExcessModel:
    """Fits a Gaussian process to log excess, whose mean is linear in log(log ratio), log length and log(visits - 1).

    Args:
      ratios: of `seam_ratios`.
      measured: excess of cuts; those of one block count.
    """
    known = {cut[0]: excess for cut, excess in measured.items() if len(cut) == 1}
    if not known:
        return ExcessModel(ratios, {}, np.zeros(0))
    blocks = list(known)
    y = np.log(np.maximum(list(known.values()), _FLOOR)) - _features(ratios, blocks) @ _PRIOR
    covariance = _covariance(ratios, blocks, blocks) + _NOISE**2 * np.eye(len(blocks))
    return ExcessModel(ratios, known, np.linalg.solve(covariance, y))


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 on; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's: Pearson's of the ranks. NaN for fewer than two points, or where either side is constant."""
    if len(x) < 2:
        return math.nan
    a, b = ranks(x) - (len(x) + 1) / 2, ranks(y) - (len(y) + 1) / 2
    scale = math.sqrt((a @ a) * (b @ b))
    return float(a @ b) / scale if scale else math.nan

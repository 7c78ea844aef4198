"""Statistics of a study in numpy: paired bootstrap, rank correlation, crossings of curves."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from solar_jax.searching.predict import rank_correlation

COVERAGE = 0.95  # of every interval


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with its percentile bootstrap interval; NaN bounds where nothing could be resampled."""

    value: float
    low: float
    high: float

    @property
    def side(self) -> int:
        """-1 if the interval lies below 0, 1 if it lies above, 0 if it touches 0 or is unknown."""
        if self.high < 0:
            return -1
        return 1 if self.low > 0 else 0

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "undefined"
        return f"{self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def _percentiles(drawn: np.ndarray) -> tuple[float, float]:
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return math.nan, math.nan
    low, high = np.quantile(drawn, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)


def paired_difference(ours: np.ndarray, theirs: np.ndarray, tokens: np.ndarray, draws: int, seed: int = 0) -> Interval:
    """The difference of two arms' losses, resampled over documents and seeds; pairs stay together.

    A document counts by its tokens: the value is the sum of all differences over the sum of all tokens, averaged over
    seeds. Each draw takes as many documents and as many seeds as there are, with replacement.

    Args:
      ours: [S, N] summed losses of S seeds and N documents, nats.
      theirs: [S, N], of the same seeds and documents in the same order.
      tokens: [N] tokens of each document.
      draws: bootstrap samples.
      seed: of the resampling.

    Returns:
      ours - theirs in nats a token: below 0 where ours is better.
    """
    if ours.shape != theirs.shape or ours.shape[1:] != tokens.shape:
        raise ValueError(f"seeds and documents do not pair: {ours.shape}, {theirs.shape}, {tokens.shape}.")
    seeds, documents = ours.shape
    difference, rng = (ours - theirs).astype(np.float64), np.random.default_rng(seed)
    by_document = rng.multinomial(documents, np.full(documents, 1 / documents), size=draws)  # [draws, N]
    by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds  # [draws, S]
    drawn = np.einsum("rs,sn,rn->r", by_seed, difference, by_document, optimize=True) / (by_document @ tokens)
    return Interval(float(difference.sum() / seeds / tokens.sum()), *_percentiles(drawn))


def difference_error(ours: np.ndarray, theirs: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """The difference of two losses over the same documents and its standard error, which is that of a ratio.

    With d the difference of a document's summed losses, n its tokens, and r = sum d / sum n, the error is
    sqrt(N / (N - 1) sum (d - r n)^2) / sum n (Cochran, Sampling Techniques, 2.11).

    Args:
      ours: [N] summed losses, nats.
      theirs: [N].
      tokens: [N].

    Returns:
      Both in nats a token; the error is NaN for a single document.
    """
    difference, count = ours - theirs, len(tokens)
    ratio = difference.sum() / tokens.sum()
    if count < 2:
        return float(ratio), math.nan
    squares = ((difference - ratio * tokens) ** 2).sum() * count / (count - 1)
    return float(ratio), float(math.sqrt(squares) / tokens.sum())


def rank_correlation_interval(x: np.ndarray, y: np.ndarray, draws: int, seed: int = 0) -> Interval:
    """Spearman's correlation, resampled over its points; draws in which a side is constant are left out.

    Args:
      x: [N], of N arms.
      y: [N].
      draws: bootstrap samples.
      seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    taken = rng.integers(len(x), size=(draws, len(x))) if len(x) else np.empty((0, 0), int)
    drawn = np.array([rank_correlation(x[one], y[one]) for one in taken])
    return Interval(rank_correlation(x, y), *_percentiles(drawn))


def first_reach(x: Sequence[float], y: Sequence[float], level: float) -> float | None:
    """The first x at which the curve through the points, straight between them, is at or below a level.

    Returns:
      None if it never is.
    """
    for i, (at, value) in enumerate(zip(x, y, strict=True)):
        if value <= level:
            if i == 0:
                return float(at)
            before, above = x[i - 1], y[i - 1]
            return float(before + (at - before) * (above - level) / (above - value))
    return None


def crossing(
    x: Sequence[float], y: Sequence[float], other_x: Sequence[float], other_y: Sequence[float]
) -> float | None:
    """The smallest x from which one curve is at or below another up to the end of what both cover.

    Curves are straight between their points. A curve that dips below and rises again has not crossed.

    Returns:
      None if the first curve ends above the other, or they cover nothing together; the first common x if it is never
      above.
    """
    low, high = max(x[0], other_x[0]), min(x[-1], other_x[-1])
    if low > high:
        return None
    grid = np.unique([v for v in (*x, *other_x, low, high) if low <= v <= high])
    gap = np.interp(grid, x, y) - np.interp(grid, other_x, other_y)
    above = np.flatnonzero(gap > 0)
    if not len(above):
        return float(grid[0])
    last = int(above[-1])
    if last == len(grid) - 1:
        return None
    return float(grid[last] + (grid[last + 1] - grid[last]) * gap[last] / (gap[last] - gap[last + 1]))

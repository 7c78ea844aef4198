"""Which elements of a difference are kept: the largest (TIES), or a random share of them (DARE)."""

import dataclasses
import zlib
from collections.abc import Callable

import numpy as np

from solar_jax.merging.tensors import Stack

_SMALL = 1e-7  # sums below it are not divided by (mergekit's eps)
Differences = Callable[[list[np.ndarray]], list[np.ndarray]]  # pieces of all inputs -> of the differences
Keep = Callable[[np.ndarray, slice], np.ndarray]  # (differences [r, columns] of rows, rows) -> bool [r, columns]


@dataclasses.dataclass(frozen=True)
class Sparse:
    """Mask and factor of one input's difference."""

    keep: Keep | None = None  # None: all of it
    factor: float | None = None  # after the mask, so that the sum of magnitudes stays; None: none

    def __call__(self, stack: Stack, x: np.ndarray, rows: slice) -> np.ndarray:
        if self.keep is not None:
            x = x * self.keep(x, rows)
        return x if self.factor is None else stack.round(x * np.float32(self.factor))


def magnitudes(x: np.ndarray) -> np.ndarray:
    """Absolute values as integers of the same order, uint32."""
    return np.ascontiguousarray(x).view(np.uint32) & 0x7FFFFFFF


def largest(stack: Stack, densities: list[float], differences: Differences) -> list[Keep | None]:
    """Masks that keep the `int(density * elements)` largest magnitudes of each difference, at least one.

    Two histograms, of the upper and of the lower half of the bits, find the smallest magnitude kept: no sort, and no
    tensor is held. Of those equal to it the first in the tensor are kept, as many as are missing.

    Args:
      stack: the inputs.
      densities: share kept, by difference.
      differences: (pieces of all inputs) -> pieces of the differences.
    """
    elements = stack.shape[0] * stack.columns
    wanted = [min(max(1, int(density * elements)), elements) if density > 0 else 0 for density in densities]
    some = [i for i, density in enumerate(densities) if 0 < density < 1]
    masks: list[Keep | None] = [
        None if density >= 1 else (lambda x, rows: np.zeros(x.shape, bool)) for density in densities
    ]
    if not some:
        return masks

    def upper(_: slice, xs: list[np.ndarray]) -> list[np.ndarray]:
        found = differences(xs)
        return [np.bincount((magnitudes(found[i]) >> 16).reshape(-1), minlength=1 << 15) for i in some]

    above: dict[int, int] = {}  # elements with larger magnitudes than the bin's
    bins: dict[int, int] = {}
    for i, counts in zip(some, stack.reduce(upper), strict=True):
        bins[i], above[i] = _crossing(counts, wanted[i])

    if stack.dtype == "bfloat16":
        thresholds = {i: bins[i] << 16 for i in some}
    else:

        def lower(_: slice, xs: list[np.ndarray]) -> list[np.ndarray]:
            found = differences(xs)
            bits = {i: magnitudes(found[i]) for i in some}
            return [np.bincount(bits[i][bits[i] >> 16 == bins[i]] & 0xFFFF, minlength=1 << 16) for i in some]

        thresholds = {}
        for i, counts in zip(some, stack.reduce(lower), strict=True):
            low, more = _crossing(counts, wanted[i] - above[i])
            thresholds[i], above[i] = bins[i] << 16 | low, above[i] + more

    equals = np.zeros((len(some), stack.shape[0]), np.int64)

    def equal(rows: slice, xs: list[np.ndarray]) -> list[np.ndarray]:
        found = differences(xs)
        for k, i in enumerate(some):
            equals[k, rows] = (magnitudes(found[i]) == thresholds[i]).sum(axis=1)
        return []

    stack.reduce(equal)
    for k, i in enumerate(some):
        before = np.concatenate([[0], np.cumsum(equals[k])])
        masks[i] = _mask(thresholds[i], before, wanted[i] - above[i])
    return masks


def _keep_none(x: np.ndarray, rows: slice) -> np.ndarray:
    return np.zeros(x.shape, bool)


def _crossing(counts: np.ndarray, wanted: int) -> tuple[int, int]:
    """The bin that holds the `wanted`th largest element, and how many elements are in larger bins."""
    from_top = np.cumsum(counts[::-1])
    at = int(np.searchsorted(from_top, wanted))
    return len(counts) - 1 - at, int(from_top[at - 1]) if at else 0


def _mask(threshold: int, before: np.ndarray, quota: int) -> Keep:
    """Keeps what is above a magnitude, and the first `quota` elements that equal it.

    Args:
      threshold: the magnitude, as `magnitudes` gives it.
      before: elements that equal it before each row, [rows + 1].
      quota: how many of them are kept.
    """

    def keep(x: np.ndarray, rows: slice) -> np.ndarray:
        bits = magnitudes(x)
        mask = bits > threshold
        start, stop = before[rows.start : rows.stop], before[rows.start + 1 : rows.stop + 1]
        if start[0] >= quota:
            return mask
        same = bits == threshold
        same[start >= quota] = False
        for row in np.flatnonzero((start < quota) & (stop > quota)):
            same[row] &= np.cumsum(same[row]) <= quota - start[row]
        return mask | same

    return keep


def random_keep(density: float, seed: int, name: str, index: int, columns: int) -> Keep:
    """A mask that keeps each element with a probability, the same however the tensor is split into blocks.

    Args:
      density: the probability.
      seed: of the merge.
      name: of the merged tensor.
      index: of the input.
      columns: elements in a row.
    """
    key = np.array([seed & 0xFFFFFFFFFFFFFFFF, zlib.crc32(name.encode()) << 32 | index], np.uint64)
    limit = np.uint64(min(int(density * 2**64), 2**64 - 1))

    def keep(x: np.ndarray, rows: slice) -> np.ndarray:
        first, count = rows.start * columns, x.size
        stream = np.random.Philox(key=key).advance(first // 4)  # four numbers a step
        found = stream.random_raw(count + first % 4)[first % 4 :]
        return (found < limit).reshape(x.shape)

    return keep


def rescaled(stack: Stack, keeps: list[Keep | None], differences: Differences) -> list[Sparse]:
    """Masks with the factors that give each difference back its sum of magnitudes (mergekit's `rescale`)."""

    def sums(rows: slice, xs: list[np.ndarray]) -> list[float]:
        found, total = differences(xs), []
        for x, keep in zip(found, keeps, strict=True):
            if keep is not None:
                total += [np.abs(x).sum(dtype=np.float64), np.abs(x * keep(x, rows)).sum(dtype=np.float64)]
        return total

    if all(keep is None for keep in keeps):
        return [Sparse() for _ in keeps]
    one = lambda value: stack.round(np.array([value], np.float32))[0]  # noqa: E731
    found, sparse = iter(stack.reduce(sums)), []
    for keep in keeps:
        if keep is None:
            sparse.append(Sparse())
            continue
        before, after = one(next(found)), one(next(found))
        tiny = before < _SMALL or after < _SMALL
        sparse.append(Sparse(keep, None if tiny else float(one(before / after))))
    return sparse

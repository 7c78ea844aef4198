"""Weights that growth derives from the base's values: fitted mixtures of neighbours, and noise."""

import hashlib
from collections.abc import Callable, Iterable

import numpy as np

Pair = tuple[float, float]


def fitted(sums: np.ndarray) -> Pair:
    """Solves W_i = a W_{i-1} + b W_{i+1} over all inner layers i of one tensor by least squares.

    Args:
      sums: [5] float64, sums over i of <prev, prev>, <prev, next>, <next, next>, <prev, W_i>, <next, W_i>.

    Returns:
      (a, b), rounded to float32. Where neighbours are parallel, the solution of least norm.
    """
    pp, pn, nn, pw, nw = sums
    a, b = np.linalg.lstsq(np.array([[pp, pn], [pn, nn]]), np.array([pw, nw]), rcond=1e-12)[0]
    return float(np.float32(a)), float(np.float32(b))


def moments(read: Callable[[int], np.ndarray], layers: int) -> np.ndarray:
    """Sums the moments that `fitted` takes, three layers in memory at a time.

    Args:
      read: gives a layer's tensor, or a part of it, in any float dtype.
      layers: n, at least 3.
    """
    total = np.zeros(5)
    held = [_wide(read(i)) for i in (0, 1)]
    for i in range(1, layers - 1):
        held.append(_wide(read(i + 1)))
        before, here, after = held
        pairs = ((before, before), (before, after), (after, after), (before, here), (after, here))
        total += [float(np.dot(x, y)) for x, y in pairs]
        held.pop(0)
    return total


def _wide(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).reshape(-1).astype(np.float64)


def mixed(x: np.ndarray, y: np.ndarray, mix: str, pair: Callable[[], Pair]) -> np.ndarray:
    """Mixes a layer's tensor with its partner's in float32, rounded to x's dtype.

    Args:
      x: the layer's.
      y: the partner's, of the same shape and dtype.
      mix: "mean", or "fit" for a x + b y.
      pair: gives (a, b); called for a fit alone.
    """
    wide, other = x.astype(np.float32), y.astype(np.float32)
    if mix == "mean":
        return ((wide + other) / 2).astype(x.dtype)
    a, b = (np.float32(value) for value in pair())
    return (a * wide + b * other).astype(x.dtype)


def deviation(blocks: Iterable[np.ndarray]) -> float:
    """Standard deviation of a tensor given in blocks, rounded to float32."""
    return mean_and_deviation(blocks)[1]


def mean_and_deviation(blocks: Iterable[np.ndarray]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor given in blocks, rounded to float32."""
    count, total, squares = 0, 0.0, 0.0
    for block in blocks:
        x = _wide(block)
        count, total, squares = count + x.size, total + float(x.sum()), squares + float(np.dot(x, x))
    spread = max(0.0, squares / count - (total / count) ** 2) ** 0.5
    return float(np.float32(total / count)), float(np.float32(spread))


def noise(name: str, rows: range, columns: int, spread: float) -> np.ndarray:
    """Draws rows of a matrix of normal noise.

    A row depends on the tensor's name and its own number alone, so that a tensor may be read in any blocks.

    Args:
      name: HF name of the tensor in the grown model.
      rows: row numbers.
      columns: length of a row.
      spread: standard deviation.

    Returns:
      float32 [rows, columns].
    """
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    out = np.empty((len(rows), columns), np.float32)
    for at, row in enumerate(rows):
        generator = np.random.Generator(np.random.Philox(key=key, counter=row << 128))
        out[at] = generator.standard_normal(columns, np.float32)
    return out * np.float32(spread)

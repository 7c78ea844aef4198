"""The inputs of one merged tensor, read in blocks of rows: each a float32 array that holds values of the merge's dtype.

Every operation of a method rounds to that dtype, as torch does for tensors of it; sums run in float64.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from solar_jax.checkpoints.checkpoint import numpy_dtype
from solar_jax.errors import UserError

READ = 1 << 22  # elements of each input that are read at a time
PIECE = 1 << 17  # elements that are computed at a time, so that they stay in the cache
_THREADS = min(2, os.cpu_count() or 1)

Round = Callable[[np.ndarray], np.ndarray]  # float32 to the nearest value of a dtype, in place where it can


def _round_bfloat16(x: np.ndarray) -> np.ndarray:
    bits = x.view(np.uint32)
    odd = (bits >> 16) & 1
    odd += 0x7FFF
    bits += odd
    bits &= 0xFFFF0000
    return x


def _round_float16(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)


ROUND: dict[str, Round] = {"float32": lambda x: x, "bfloat16": _round_bfloat16, "float16": _round_float16}


@dataclasses.dataclass(frozen=True)
class Input:
    """One input of a tensor."""

    model: str  # as the recipe names it
    name: str  # of the tensor there
    read: Callable[[slice], np.ndarray]  # rows, in the dtype they are stored in


@dataclasses.dataclass(frozen=True)
class Stack:
    """All inputs of one merged tensor."""

    inputs: tuple[Input, ...]
    shape: tuple[int, ...]
    dtype: str  # of the arithmetic
    base: int | None  # index of the base

    @functools.cached_property
    def round(self) -> Round:
        return ROUND[self.dtype]

    @property
    def others(self) -> list[int]:
        """The indices of all inputs but the base."""
        return [i for i in range(len(self.inputs)) if i != self.base]

    @property
    def columns(self) -> int:
        """Elements in a row; 1 for a vector."""
        return math.prod(self.shape[1:])

    def blocks(self, rows: slice | None = None) -> Iterator[slice]:
        """Splits rows into blocks of about `READ` elements."""
        start, stop, _ = (rows or slice(None)).indices(self.shape[0])
        step = max(READ // max(self.columns, 1), 1)
        for first in range(start, stop, step):
            yield slice(first, min(first + step, stop))

    def pieces(self, rows: slice) -> Iterator[tuple[slice, list[np.ndarray]]]:
        """Reads rows of all inputs and yields them in pieces [r, columns], float32, with their rows.

        Raises:
          UserError: an input has a value that is not finite.
        """
        held = [self._checked(one, one.read(rows)) for one in self.inputs]
        step = max(PIECE // max(self.columns, 1), 1)
        for first in range(0, rows.stop - rows.start, step):
            last = min(first + step, rows.stop - rows.start)
            yield slice(rows.start + first, rows.start + last), [self._wide(x[first:last]) for x in held]

    def _checked(self, one: Input, x: np.ndarray) -> np.ndarray:
        bits = x.view(np.uint16) if x.dtype.itemsize == 2 else None
        if bits is None:
            bad = not np.isfinite(x).all()
        else:  # all ones in the exponent; numpy has no fast test for bfloat16
            exponent = np.uint16(0x7F80 if x.dtype.name == "bfloat16" else 0x7C00)
            bad = bool(((bits & exponent) == exponent).any())
        if bad:
            raise UserError(f"{one.model}: {one.name} has a value that is not finite; only finite weights are merged.")
        return x

    def _wide(self, x: np.ndarray) -> np.ndarray:
        if x.dtype.name != self.dtype:
            with np.errstate(over="ignore"):
                x = x.astype(numpy_dtype(self.dtype))
        return np.array(x.reshape(len(x), -1), np.float32)  # a copy that may be changed

    def reduce(self, function: Callable[[slice, list[np.ndarray]], Sequence[Any]]) -> list[Any]:
        """Sums what `function` returns for each piece, in the order of the rows.

        Args:
          function: (rows, pieces) -> numbers or arrays to add up.
        """

        def one(rows: slice) -> list[Any]:
            total: list[Any] = []
            for at, xs in self.pieces(rows):
                found = function(at, xs)
                total = [a + b for a, b in zip(total, found, strict=True)] if total else list(found)
            return total

        sums = in_order(one, self.blocks())
        return [functools.reduce(lambda a, b: a + b, parts) for parts in zip(*sums, strict=True)]


def in_order(function: Callable[[Any], Any], items: Iterator[Any]) -> list[Any]:
    """Maps in a few threads; numpy computes without the interpreter's lock."""
    listed = list(items)
    if len(listed) < 2:
        return [function(item) for item in listed]
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(function, listed))


def dot(a: np.ndarray, b: np.ndarray) -> float:
    """The sum of the products of all elements."""
    return float(np.dot(a.reshape(-1), b.reshape(-1)))

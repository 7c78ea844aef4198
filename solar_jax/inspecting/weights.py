"""Distances of layers' weights: from where they started, and between twins; streamed from the files, as stored."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from solar_jax.checkpoints.checkpoint import Checkpoint, row_blocks, tensor_name
from solar_jax.model.shapes import layer_axes

ALL = "all"  # the group of all arrays of a layer
GROUPS = ("attention", "mlp", "norms")  # the other groups


@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums over the elements of two tensors a and b, in float64."""

    difference: float = 0.0  # of (a - b) ** 2
    a: float = 0.0  # of a ** 2
    b: float = 0.0  # of b ** 2
    product: float = 0.0  # of a * b

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(x + y for x, y in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    @property
    def distance(self) -> float:
        """L2 norm of a - b."""
        return math.sqrt(self.difference)

    @property
    def of_start(self) -> float | None:
        """|a - b| / |b|; None if b is 0 throughout."""
        return math.sqrt(self.difference / self.b) if self.b else None

    @property
    def of_both(self) -> float | None:
        """|a - b| over the root of the mean of |a| ** 2 and |b| ** 2, 0 to 2; None if both are 0 throughout."""
        return math.sqrt(2 * self.difference / (self.a + self.b)) if self.a + self.b else None

    @property
    def cosine(self) -> float | None:
        """Cosine of a and b as vectors; None if one is 0 throughout."""
        return self.product / math.sqrt(self.a * self.b) if self.a and self.b else None


def array_group(name: str) -> str:
    """Returns the name in `GROUPS` to which an array of a layer belongs."""
    if name.endswith("norm"):
        return "norms"
    return "mlp" if name.startswith(("gate", "up", "down")) else "attention"


def compared_tensors(
    a: Callable[[slice], np.ndarray], b: Callable[[slice], np.ndarray], shape: tuple[int, ...]
) -> Sums:
    """Compares two tensors of a shape, given by functions that read rows, a block of rows at a time."""
    total = Sums()
    for rows in row_blocks(shape):
        x, y = (np.asarray(read(rows)).astype(np.float64).ravel() for read in (a, b))
        total += Sums(float(np.sum((x - y) ** 2)), float(x @ x), float(y @ y), float(x @ y))
    return total


def layer_sums(a: Checkpoint, layer: int, b: Checkpoint, other: int) -> dict[str, Sums]:
    """Compares layer `layer` of a with layer `other` of b: by array, by `GROUPS`, and for `ALL`."""
    found: dict[str, Sums] = {}
    for name in layer_axes(a.cfg):
        one, two = tensor_name(f"layers/{name}", layer), tensor_name(f"layers/{name}", other)
        same = (a is b and layer == other) or a.origin(one) == b.origin(two)
        sums = compared_tensors(
            lambda rows, one=one: a.read(one, rows),
            lambda rows, one=one, two=two, same=same: a.read(one, rows) if same else b.read(two, rows),
            a.shape_of[one],
        )
        for key in (name, array_group(name), ALL):
            found[key] = found.get(key, Sums()) + sums
    return found


def moved_from(c: Checkpoint, start: Checkpoint, done: Callable[[int, str], None]) -> dict[str, Any]:
    """Measures how far each layer is from its start, a checkpoint with the same layers.

    Returns:
      "distance", |W - W0|, and "relative", |W - W0| / |W0|: lists over layers by array and group.
    """
    found = []
    for i in range(c.cfg.num_hidden_layers):
        found.append(layer_sums(c, i, start, i))
        done(1, "")
    return {
        "distance": _by_name(found, lambda sums: sums.distance),
        "relative": _by_name(found, lambda sums: sums.of_start),
    }


def twin_distances(
    c: Checkpoint, pairs: Iterable[tuple[int, int]], done: Callable[[int, str], None]
) -> dict[str, Any]:  # fmt: skip
    """Measures the distance of layers that copied the same layer.

    Returns:
      "relative", |a - b| over the root mean square of |a| and |b|, and "cosine": lists over pairs by array and group.
    """
    found = []
    for i, j in pairs:
        found.append(layer_sums(c, i, c, j))
        done(1, "")
    return {
        "relative": _by_name(found, lambda sums: sums.of_both),
        "cosine": _by_name(found, lambda sums: sums.cosine),
    }


def _by_name(found: list[dict[str, Sums]], value: Callable[[Sums], float | None]) -> dict[str, list[float | None]]:
    """Turns sums by layer and name into lists by name."""
    return {name: [value(one[name]) for one in found] for name in (found[0] if found else ())}

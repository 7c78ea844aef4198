"""Losses with other lists of layers: without one, with twins exchanged, with repeated blocks exchanged or shared."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from solar_jax.data.pipeline import Batch
from solar_jax.growth.operators import LayerMap
from solar_jax.model.shapes import Params
from solar_jax.training.layer_run import LayerRunner


@dataclasses.dataclass(frozen=True)
class Visits:
    """A block of layers that the layer map places twice."""

    first: int  # first layer of the first visit
    second: int  # first layer of the second visit
    size: int  # layers

    @property
    def visits(self) -> tuple[list[int], list[int]]:
        """The layers of both visits."""
        return [*range(self.first, self.first + self.size)], [*range(self.second, self.second + self.size)]


def twin_pairs(layer_map: LayerMap) -> list[tuple[int, int]]:
    """Returns (earlier, later) of every two layers with the same sources that no third one lies between.

    A mean of two layers is no twin of either.
    """
    last: dict[tuple[int, int], int] = {}
    pairs = []
    for i, made_of in enumerate(zip(layer_map.source, layer_map.partner, strict=True)):
        if made_of in last:
            pairs.append((last[made_of], i))
        last[made_of] = i
    return pairs


def repeats(layer_map: LayerMap) -> list[Visits]:
    """Returns the longest blocks of twins that follow each other on both sides, without overlap of the two visits."""
    found: list[Visits] = []
    for first, second in twin_pairs(layer_map):
        block = found[-1] if found else None
        continues = block and (first, second) == (block.first + block.size, block.second + block.size)
        if block and continues and first < block.second:
            found[-1] = dataclasses.replace(block, size=block.size + 1)
        else:
            found.append(Visits(first, second, 1))
    return found


def without(layers: int, layer: int) -> list[int]:
    """Returns the list of all layers but one."""
    return [i for i in range(layers) if i != layer]


def exchanged(layers: int, block: Visits) -> list[int]:
    """Returns the list of layers in which a block's second visit comes first, and its first one second."""
    order = list(range(layers))
    one, other = block.visits
    for i, j in zip(one, other, strict=True):
        order[i], order[j] = j, i
    return order


def shared(layers: int, block: Visits, visit: int) -> list[int]:
    """Returns the list of layers in which both visits of a block use the layers of visit 0 or 1."""
    order = list(range(layers))
    for i, j in zip(*block.visits, strict=True):
        order[i] = order[j] = (i, j)[visit]
    return order


def first_change(order: Sequence[int]) -> int:
    """Returns the first place at which a list of layers differs from 0, 1, 2, ...; its length if none does."""
    return next((k for k, layer in enumerate(order) if k != layer), len(order))


class Reruns:
    """Losses of a model with other lists of layers, from the first layer at which a list differs."""

    def __init__(self, runner: LayerRunner, params: Params, batch: Batch, inputs: jax.Array):
        """Takes a model and the inputs of its layers [L + 1, B, T, D]."""
        self._runner, self._params, self._batch, self._inputs = runner, params, batch, inputs

    def cost(self, order: Sequence[int]) -> int:
        """Returns the number of layers that `losses` runs."""
        return len(order) - first_change(order)

    def losses(self, order: Sequence[int]) -> np.ndarray:
        """Returns each row's loss in nats, float64 [B], with the layers in this order."""
        at = first_change(order)
        x = self._runner.input_at(self._inputs, at)
        x = self._runner.run(self._params, self._batch, x, order[at:])
        return self._runner.losses(self._params, self._batch, x)

    def all_losses(
        self, orders: Sequence[Sequence[int]], done: Callable[[int, str], None] = lambda n, note: None
    ) -> list[np.ndarray]:
        """Returns `losses` of several lists; calls `done` after each with the layers it ran and a note."""
        found = []
        for order in orders:
            found.append(self.losses(order))
            done(self.cost(order), f"loss {np.nanmean(found[-1]):.4f}")
        return found

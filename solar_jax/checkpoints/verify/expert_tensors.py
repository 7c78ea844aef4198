"""Recomputes the tensors of experts from their MLP: the rules of upcycling, stated a second time."""

import hashlib
from collections.abc import Callable

import numpy as np

from solar_jax.growth.operators import Upcycling

ROUTER, _ROUTER_DEVIATION = "layers/router", 0.02
# Path of the table of tensors -> the MLP's matrix, with its axis of channels in the file; the router has its dtype
MADE_OF = {
    ROUTER: ("layers/gate_proj", 0),
    "layers/experts_gate": ("layers/gate_proj", 0),
    "layers/experts_up": ("layers/up_proj", 0),
    "layers/experts_down": ("layers/down_proj", 1),
}


def standard_normal(name: str, rows: range, columns: int) -> np.ndarray:
    """Draws rows of a tensor's noise, float32 [rows, columns]."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    drawn = [
        np.random.Generator(np.random.Philox(key=key, counter=[0, 0, row, 0])).standard_normal(columns, np.float32)
        for row in rows
    ]
    return np.stack(drawn)


def router_matrix(name: str, made: Upcycling, width: int, rounded: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Draws a router [E, D], each group's row as often as the group has shards."""
    rows = standard_normal(name, range(made.experts), width) * np.float32(_ROUTER_DEVIATION)
    return rounded(np.repeat(rows, made.granularity, axis=0))


def expert_matrix(
    name: str, path: str, expert: int, made: Upcycling, mlp: np.ndarray, rounded: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Makes one expert's matrix.

    Args:
      name: HF name of the layer's tensor of all experts.
      path: its path in the table.
      expert: which, counted over all groups.
      made: the upcycling.
      mlp: float32, the matrix of the grown model's MLP.
      rounded: rounds float32 to the base's dtype and back.
    """
    axis = MADE_OF[path][1]
    shard = np.split(mlp, made.granularity, axis=axis)[expert % made.granularity]
    rows = range(expert * len(shard), (expert + 1) * len(shard))
    if made.redrawn:
        mean, deviation = _mean_and_deviation(mlp)
        noise = rounded(mean + standard_normal(name, rows, shard.shape[1]) * deviation)
        chosen = _channels(name, expert, shard.shape[axis], made.redrawn)
        shard = shard.copy()
        shard[(slice(None),) * axis + (chosen,)] = noise[(slice(None),) * axis + (chosen,)]
    if made.jitter:
        factor = standard_normal(f"{name} jitter", rows, shard.shape[1]) * np.float32(made.jitter)
        shard = rounded(shard * (np.float32(1) + factor))
    return rounded(shard * np.float32(made.granularity)) if axis else shard


def _mean_and_deviation(x: np.ndarray) -> tuple[np.float32, np.float32]:
    return np.float32(np.mean(x, dtype=np.float64)), np.float32(np.std(x, dtype=np.float64))


def _channels(name: str, expert: int, width: int, share: float) -> np.ndarray:
    """Chooses the channels that are redrawn: the first ones of a permutation seeded by layer and expert."""
    seed = hashlib.sha256(f"{name[: name.index('.experts.')]} {expert}".encode()).digest()[:16]
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(seed, "little")))
    return np.sort(generator.permutation(width)[: round(share * width)])

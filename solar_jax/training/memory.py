"""What a training step needs a device, estimated from shapes alone, before anything is allocated."""

import dataclasses
import math
from typing import Any

import jax

from solar_jax.config import Config, ModelConfig
from solar_jax.model.llama import REMAT, SAVEABLE
from solar_jax.model.precision import compute_dtype
from solar_jax.parallel.mesh import axis_size
from solar_jax.parallel.rules import BATCH_AXES, padded_rows
from solar_jax.training.step import State, uses_splash

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes a device."""

    parameters: int
    optimizer: int
    gradients: int
    activations: int

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer + self.gradients + self.activations

    def __str__(self) -> str:
        parts = ", ".join(f"{f.name} {getattr(self, f.name) / GIB:.1f}" for f in dataclasses.fields(self))
        return f"{self.total / GIB:.1f} GiB a device ({parts})"


def shard_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of abstract arrays with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def estimate(cfg: ModelConfig, config: Config, state: State, mesh: jax.sharding.Mesh) -> Need:
    """The need of one step; the activations are a rule of thumb that errs on the high side of what compilers report.

    Args:
      cfg: the grown model.
      config: the run.
      state: abstract, with shardings.
      mesh: of the shardings.
    """
    width = compute_dtype(config.train).itemsize
    parameters = shard_bytes(state["params"])
    padded = padded_rows(config.train.batch_size, mesh, config.train.accumulation)
    ways = axis_size(mesh, *BATCH_AXES, "context")
    tokens, tensor = padded / config.train.accumulation * config.data.sequence_length / ways, mesh.shape["tensor"]
    D, F, N, K, H = (
        cfg.hidden_size, cfg.intermediate_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim,
    )  # fmt: skip
    # Values kept a token and layer for the backward pass; plain attention's scores and their softmax are float32.
    scores = 0 if uses_splash(cfg, config, mesh) else 3 * N / tensor * config.data.sequence_length * 4
    everything = (6 * D + (2 * (N + 2 * K) * H + 4 * F) / tensor) * width + scores
    values = {"B": 1, "T": 1, "D": D, "F": F / tensor, "N": N / tensor, "K": K / tensor, "H": H}
    names = REMAT[config.train.remat]
    kept, working = everything, 0.0
    if names is not None:
        kept = width * (D + sum(math.prod(values[a] for a in SAVEABLE[name]) for name in names))
        working = everything
    logits = 3 * 4 * cfg.vocab_size / tensor
    activations = tokens * (kept * cfg.num_hidden_layers + working + logits)
    accumulated = parameters if config.train.accumulation > 1 else 0
    return Need(parameters, shard_bytes(state["opt_state"]), parameters + accumulated, round(activations))

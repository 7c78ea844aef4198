"""Estimates a training step's device memory from shapes alone, before anything is allocated.

Parameters and optimiser state are exact. The rest follows what XLA allocates: activations saved layer by layer for the
backward pass, and the larger of the working memory of the loss and of one layer's backward pass. Its few constants were
fitted to what the TPU compiler reports; `scripts/bench/planner.py` shows their error.
"""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from solar_jax.config import ModelConfig, TrainConfig
from solar_jax.model.flash_blocks import LANES
from solar_jax.model.precision import compute_dtype
from solar_jax.model.remat import OFFLOADED, REMAT, SAVEABLE
from solar_jax.model.shapes import layer_axes, size
from solar_jax.parallel.attention import attention_choice
from solar_jax.parallel.mesh import axis_size, platform
from solar_jax.parallel.rules import ACTIVATIONS, EXPERTS, padded_rows, table_of, ways
from solar_jax.training.partition import Partition, everything
from solar_jax.training.state import State
from solar_jax.training.step import loss_chunks

GIB = 2**30
# Values per token that differentiation saves in one layer when nothing is rematerialised, by their axes; some of them
# are float32 and count twice.
EVERYTHING = {"D": 9.0, "NH": 4.0, "KH": 6.0, "F": 5.0}
# Values per token that are live at once in the backward pass of a layer, besides what it reads; what the mlp
# recomputes comes on top.
LAYER = {"D": 6.5, "F": 3.0}
FROZEN = {"D": 3.0, "F": 1.0}  # of a frozen layer, which has no gradients of weights
SCORES = 8.5  # bytes that plain attention keeps per score in the current layer
HOLES = 0.05  # fragmentation, as a fraction of all but parameters and optimiser state
HEAD = 5.0  # bytes per weight of the output projection and its float32 gradient, in the loss
FROZEN_HEAD = 2.0  # of one without a gradient


@dataclasses.dataclass(frozen=True)
class Need:
    """Memory needed, in bytes per device."""

    parameters: int
    optimizer: int
    gradients: int  # and the copy of the parameters that matmuls use
    activations: int  # saved for the backward pass, over all layers
    working: int  # of the loss or of one layer's backward pass, and fragmentation

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer + self.gradients + self.activations + self.working

    def __str__(self) -> str:
        parts = ", ".join(f"{f.name} {getattr(self, f.name) / GIB:.1f}" for f in dataclasses.fields(self))
        return f"{self.total / GIB:.1f} GiB a device ({parts})"


def shard_bytes(tree: Any) -> int:
    """Returns the bytes that one device holds of a tree of abstract arrays with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def shard_count(tree: Any) -> int:
    """Returns the elements that one device holds of a tree of abstract arrays with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))


def estimate(
    cfg: ModelConfig,
    train: TrainConfig,
    length: int,
    state: State,
    mesh: Mesh | AbstractMesh,
    partition: Partition | None = None,
) -> Need:
    """Estimates the memory that one step needs.

      gradients    of the parameters that a device holds, in the compute dtype, and a copy of the parameters in it
                   if theirs differs; with microbatches also their float32 sum
      activations  each layer's input and what the remat policy saves; with the policy `none` everything that
                   differentiation needs, including gathered weights
      working      the larger of the loss (a chunk's logits in float32, the output projection and its gradient) and
                   of one layer's backward pass (its gathered weights and token values), and fragmentation

    Args:
      cfg: the grown model.
      train: the run's, with a remat policy of `REMAT`.
      length: T.
      state: abstract, with shardings.
      mesh: of the shardings; its devices need not exist.
      partition: which parameters train; all if None.
    """
    partition = partition or everything(cfg)
    width = compute_dtype(train).itemsize
    parameters = shard_bytes(state["params"])
    count = shard_count(state["params"])
    moving = partition.keys(state["params"])
    layers = shard_count(moving["layers"]) if partition.lora is None else 0
    trained = layers * partition.count // cfg.num_hidden_layers + shard_count(moving) - layers
    copied = count * width != parameters and partition.lora is None  # else the model is held in the compute dtype
    gradients = trained * width + (count * width if copied else 0)
    gradients += 4 * trained if train.accumulation > 1 else 0
    rows = padded_rows(train.batch_size, mesh, train.accumulation) / train.accumulation
    tokens = rows * length / (axis_size(mesh, "slice") * ways("BT", ACTIVATIONS, mesh))
    saved, behind = _saved(cfg, train, length, mesh, tokens, width), cfg.num_hidden_layers - partition.first
    # Saved values and working set at each peak: in the loss, and in the last layer of each run of layers.
    peaks, top = [behind * saved + _loss(cfg, length, mesh, tokens, partition)], 0
    for trains, layers_of_run in partition.segments():
        top += layers_of_run
        if top > partition.first:
            differs = trains and partition.lora is None
            peaks.append((top - partition.first) * saved + _layer(cfg, train, length, mesh, tokens, width, differs))
    activations, optimizer = behind * saved, shard_bytes(state["opt_state"])
    working = max(peaks) - activations
    working += HOLES * (gradients + activations + working)
    return Need(parameters, optimizer, gradients, round(activations), round(working))


def each(cfg: ModelConfig, mesh: Mesh | AbstractMesh, letters: str) -> float:
    """Returns the values per token and device of an activation with these axes; B and T do not count."""
    letters = letters.replace("B", "").replace("T", "")
    # TPUs store the innermost axis in full vectors: a head of 64 takes as much as one of 128.
    lanes = -(-cfg.head_dim // LANES) * LANES / cfg.head_dim if "H" in letters and platform(mesh) == "tpu" else 1
    rows = expert_rows(cfg, mesh) if "F" in letters and cfg.num_local_experts else 1
    return lanes * rows * size(cfg, letters) / ways(letters, ACTIVATIONS, mesh)


def expert_rows(cfg: ModelConfig, mesh: Mesh | AbstractMesh) -> int:
    """Returns the rows of experts' matmuls per token and device: of each token of the devices that share experts, k."""
    return cfg.num_experts_per_tok * axis_size(mesh, "expert")


def _gathered(cfg: ModelConfig, mesh: Mesh | AbstractMesh) -> float:
    """Returns the number of weights of one layer that a device multiplies by."""
    shards = axis_size(mesh, "expert")
    weights = sum(size(cfg, x) / (shards if table_of(x) is EXPERTS else 1) for x in layer_axes(cfg).values())
    return weights / axis_size(mesh, "tensor")


def _scores(cfg: ModelConfig, train: TrainConfig, length: int, mesh: Mesh | AbstractMesh) -> float:
    """Returns the attention scores per token and device that array operations hold; kernels hold none."""
    if attention_choice(cfg, train, length, mesh) != "xla":
        return 0.0
    return each(cfg, mesh, "N") * length


def _saved(
    cfg: ModelConfig, train: TrainConfig, length: int, mesh: Mesh | AbstractMesh, tokens: float, width: int
) -> float:
    """Returns the bytes that one layer saves for its backward pass."""
    names = REMAT[train.remat]
    if names is None:
        values = sum(count * each(cfg, mesh, letters) for letters, count in EVERYTHING.items())
        shared = axis_size(mesh, "fsdp", "expert", "context") > 1
        weights = _gathered(cfg, mesh) * width if shared else 0.0
        return tokens * (values * width + 4 * _scores(cfg, train, length, mesh)) + weights
    kept = ["D", *(SAVEABLE[name] for name in names)]
    sums = 4 * each(cfg, mesh, "N") if "attention" in names else 0.0  # the kernel's, float32
    return tokens * (width * sum(each(cfg, mesh, letters) for letters in kept) + sums)


def _layer(
    cfg: ModelConfig,
    train: TrainConfig,
    length: int,
    mesh: Mesh | AbstractMesh,
    tokens: float,
    width: int,
    trains: bool,
) -> float:
    """Returns the working bytes of one layer's backward pass, besides what was saved."""
    names = REMAT[train.remat]
    kept = None if names is None else (*names, *OFFLOADED.get(train.remat, ()))
    again = [letters for name, letters in SAVEABLE.items() if kept is not None and name not in kept]
    values = sum(count * each(cfg, mesh, letters) for letters, count in (LAYER if trains else FROZEN).items())
    values += sum(each(cfg, mesh, letters) for letters in again if "F" in letters)
    return tokens * (values * width + SCORES * _scores(cfg, train, length, mesh)) + _gathered(cfg, mesh) * width


def _loss(cfg: ModelConfig, length: int, mesh: Mesh | AbstractMesh, tokens: float, partition: Partition) -> float:
    """Returns the working bytes of the loss."""
    logits = tokens * each(cfg, mesh, "V")
    chunks = loss_chunks(round(logits), length)
    head = size(cfg, "DV") / axis_size(mesh, "tensor")
    return 4 * logits / chunks + (HEAD if partition.trains_head(cfg) else FROZEN_HEAD) * head

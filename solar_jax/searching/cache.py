"""Losses of cuts from one cached forward: each costs only the layers after the base's order is left, and the head."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.checkpoints.load import load_params
from solar_jax.config import ModelConfig, TrainConfig
from solar_jax.data.packing import Row
from solar_jax.data.pipeline import Batch, heldout_batches
from solar_jax.model.shapes import Params, param_shapes
from solar_jax.parallel import rules
from solar_jax.parallel.mesh import AXES
from solar_jax.searching.candidates import Cut, layers_from_cache
from solar_jax.training.layer_run import LayerRunner
from solar_jax.training.objectives import token_values
from solar_jax.training.step import loss_chunks


def mesh_for_search(mesh: Mesh) -> Mesh:
    """Returns a run's mesh with `slice` joined to data and `context` to fsdp: parameters stay where they are.

    Rows of a search are short, so their tokens are not split, and nothing is summed over slices.
    """
    shape = mesh.shape
    shards = shape["fsdp"] * shape["expert"] * shape["context"]
    sizes = (1, shape["slice"] * shape["data"], shards, 1, 1, shape["tensor"])
    return Mesh(mesh.devices.reshape(sizes), AXES, axis_types=mesh.axis_types)


@dataclasses.dataclass(frozen=True)
class LayerPrograms:
    """The two compiled programs of a search.

    trace  (params, batch) -> every layer's input and the last output [n + 1, B, T, D], and their norms by token
           [n + 1, B, T] float32
    score  (params, trace, batch, b, order [longest], count) -> log-probabilities [B, T] float32 of the targets, of
           the model that continues from the input of layer b with the layers order[:count]
    """

    trace: Callable[..., tuple[jax.Array, jax.Array]]
    score: Callable[..., jax.Array]


@functools.cache  # one compilation for all texts of a search
def layer_programs(cfg: ModelConfig, train: TrainConfig, rows: int, length: int, mesh: Mesh) -> LayerPrograms:
    """Compiles on first use the programs for batches of B = `rows` rows of T = `length` tokens on a mesh.

    One program runs any list of layers: a loop of a dynamic count that takes each layer's weights from the stack.
    """
    runner, n = LayerRunner(cfg, train, length, mesh), cfg.num_hidden_layers
    kept = NamedSharding(mesh, PartitionSpec(None, *rules.spec("BTD", rules.ACTIVATIONS)))
    shards = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["expert"]
    chunks = loss_chunks(rows // shards * length * cfg.vocab_size // mesh.shape["tensor"], length)

    def trace(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        params = runner.prepared(params)
        x, apply = runner.started(params, batch), runner.numbered(params, batch)

        def keep(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            kept, x = carry
            x = apply(i, x)
            return jax.lax.dynamic_update_index_in_dim(kept, x, i + 1, 0), x

        empty = jnp.zeros((n + 1, *x.shape), x.dtype).at[0].set(x)
        found, _ = jax.lax.fori_loop(0, n, keep, (jax.lax.with_sharding_constraint(empty, kept), x))
        return found, jnp.sqrt(jnp.sum(jnp.square(found.astype(jnp.float32)), axis=-1))

    def score(
        params: Params, found: jax.Array, batch: Batch, b: jax.Array, order: jax.Array, count: jax.Array
    ) -> jax.Array:
        params = runner.prepared(params)
        x = runner.constrain(jax.lax.dynamic_index_in_dim(found, b, keepdims=False), "BTD")
        apply = runner.numbered(params, batch)
        x = jax.lax.fori_loop(0, count, lambda i, x: apply(order[i], x), x)
        x, head = runner.normed(params, x), runner.head(params)
        values = token_values(x, head, batch["targets"], chunks=chunks, constrain=runner.constrain)
        return values["log_prob"]

    params, batch, same = rules.parameter_shardings(cfg, mesh), rules.batch_sharding(mesh), rules.replicated(mesh)
    return LayerPrograms(
        jax.jit(trace, in_shardings=(params, batch), out_shardings=(kept, same)),
        jax.jit(score, in_shardings=(params, kept, batch, same, same, same), out_shardings=same),
    )


def _dtype(train: TrainConfig) -> str:
    return "float32" if train.precision == "float32" else "bfloat16"


@dataclasses.dataclass(frozen=True)
class CutScorer:
    """A base on a mesh, with the programs that score its cuts on rows of one length."""

    cfg: ModelConfig
    train: TrainConfig
    mesh: Mesh
    params: Params
    rows: int  # of a batch
    length: int
    longest: int  # layers that a cut may have

    @property
    def programs(self) -> LayerPrograms:
        return layer_programs(self.cfg, self.train, self.rows, self.length, self.mesh)

    def traced(self, rows: Sequence[Row]) -> list["TracedBatch"]:
        """Runs the base once over rows and keeps every layer's input, batch by batch."""
        batches = heldout_batches(list(rows), self.rows, rules.batch_sharding(self.mesh))
        return [TracedBatch(self, batch, *self.programs.trace(self.params, batch)) for batch in batches]

    def losses(self, rows: Sequence[Row], cuts: Sequence[Cut]) -> np.ndarray:
        """Losses by token of several cuts on rows that are not cached: [cuts, rows, T] float32, in nats.

        One batch's layer inputs are in memory at a time.
        """
        found = []
        for k in range(0, len(rows), self.rows):
            (batch,) = self.traced(rows[k : k + self.rows])
            found.append(np.stack([batch.losses(cut) for cut in cuts])[:, : len(rows[k : k + self.rows])])
        return np.concatenate(found, axis=1)


@dataclasses.dataclass(frozen=True)
class TracedBatch:
    """A batch with every layer's input on the devices."""

    scorer: CutScorer
    batch: Batch
    found: jax.Array  # [n + 1, B, T, D]
    norms: jax.Array  # [n + 1, B, T] float32

    def losses(self, cut: Cut) -> np.ndarray:
        """Losses by token of a cut, [B, T] float32, in nats; padding counts for the caller to leave out."""
        b, layers = layers_from_cache(cut, self.scorer.cfg.num_hidden_layers)
        order = np.zeros(self.scorer.longest, np.int32)
        order[: len(layers)] = layers
        programs, params = self.scorer.programs, self.scorer.params
        return -np.asarray(programs.score(params, self.found, self.batch, np.int32(b), order, np.int32(len(layers))))


def make_scorer(c: Checkpoint, mesh: Mesh, *, dtype: str, rows: int, length: int, add: int) -> CutScorer:
    """Loads a base onto a mesh.

    Args:
      c: the base.
      mesh: of a run; see `mesh_for_search`.
      dtype: "float32" or "bfloat16", of matrices and activations.
      rows: rows of a batch at most.
      length: T.
      add: layers that cuts add at most.
    """
    mesh = mesh_for_search(mesh)
    train = TrainConfig(precision="float32" if dtype == "float32" else "bf16")
    dtypes = jax.tree.map(lambda s: s.dtype, param_shapes(c.cfg, _dtype(train)))
    params = load_params(c, rules.parameter_shardings(c.cfg, mesh), dtypes)
    padded = rules.padded_rows(rows, mesh)
    return CutScorer(c.cfg, train, mesh, params, padded, length, c.cfg.num_hidden_layers + add)

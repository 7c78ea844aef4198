"""Runs any list of a model's layers from any point of the residual stream, by one compiled program.

The list and its length are arguments of the program: leaving a layer out, repeating it or moving it compiles nothing.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from solar_jax.config import ModelConfig, TrainConfig
from solar_jax.model import llama
from solar_jax.model.attention import attention_mask, rotated_attention
from solar_jax.model.llama import rms_norm, scaled
from solar_jax.model.matmul import plain_einsum
from solar_jax.model.precision import compute_dtype
from solar_jax.model.rope import rope_angles
from solar_jax.model.shapes import Params
from solar_jax.parallel import rules
from solar_jax.parallel.attention import attention_kernel
from solar_jax.parallel.collectives import constrain_on
from solar_jax.parallel.mesh import axis_size
from solar_jax.training.objectives import Batch, token_values
from solar_jax.training.step import loss_chunks

# The arrays by which a layer's MLP adds to the residual stream. Zeroed, the layer is its attention alone.
_MLP_ADDS = ("down_proj", "down_bias", "experts_down")
_MLP_ADDS_NORMED = ("mlp_out_norm",)  # in their place, where a norm follows
LOGITS = 2**24  # of one chunk of tokens, on one device: 64 MiB in float32, a few times

Layer = dict[str, jax.Array]  # the arrays of one layer, without L


class LayerRunner:
    """The layers of a model on a mesh, to be run one by one in any order; holds no weights."""

    def __init__(self, cfg: ModelConfig, train: TrainConfig, length: int, mesh: Mesh):
        """Prepares the programs; each compiles at its first use.

        Args:
          cfg: the architecture.
          train: its precision and attention count.
          length: T.
          mesh: of parameters and rows; rows are not split over `context`.

        Raises:
          UserError: the attention that `train` asks for does not take these shapes.
        """
        self.cfg, self.mesh, self.length = cfg, mesh, length
        self.dtype, self.constrain = compute_dtype(train), constrain_on(mesh)
        self._kernel = attention_kernel(cfg, train, length, mesh)
        out = rules.replicated(mesh)
        self._run, self._start = jax.jit(self._ran), jax.jit(self.started)
        self._losses = jax.jit(self._row_losses, out_shardings=out)
        self._input = jax.jit(lambda inputs, i: jax.lax.dynamic_index_in_dim(inputs, i, keepdims=False))

    # ---- Programs ----------------------------------------------------------------------------------------------------
    def start(self, params: Params, batch: Batch) -> jax.Array:
        """Returns the embedded tokens [B, T, D], the first layer's input."""
        return self._start(params, batch)

    def run(self, params: Params, batch: Batch, x: jax.Array, layers: Sequence[int]) -> jax.Array:
        """Runs the given layers one after another on x [B, T, D]; at most as many as the model has.

        Raises:
          ValueError: a longer list, or a layer that the model does not have.
        """
        most = self.cfg.num_hidden_layers
        if len(layers) > most or not all(0 <= i < most for i in layers):
            raise ValueError(f"a list of at most {most} layers below {most} is expected, found {list(layers)}")
        order = np.zeros(most, np.int32)
        order[: len(layers)] = layers
        return self._run(params, batch, x, order, np.int32(len(layers)))

    def losses(self, params: Params, batch: Batch, x: jax.Array) -> np.ndarray:
        """Returns each row's mean loss in nats a target, float64 [B], with x [B, T, D] as the last layer's output.

        Rows without targets, as those that only fill a batch, have NaN.
        """
        total, count = (np.asarray(a, np.float64) for a in self._losses(params, batch, x))
        return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)

    def input_at(self, inputs: jax.Array, layer: int) -> jax.Array:
        """Returns inputs[layer] of [L + 1, B, T, D]; the same program for any layer."""
        return self._input(inputs, np.int32(layer))

    # ---- Parts, for programs of others -------------------------------------------------------------------------------
    def prepared(self, params: Params) -> Params:
        """Returns the parameters in the compute dtype, with what is known of single layers among their arrays."""
        params = llama.compute_copy(params, self.dtype)
        return params | {"layers": llama.rotates(params["layers"], self.cfg)}

    def layer(self, params: Params, batch: Batch) -> Callable[[Layer, jax.Array], jax.Array]:
        """Returns a function that applies a layer, given by its arrays, to x [B, T, D].

        Args:
          params: from `prepared`.
          batch: with positions and segment ids [B, T].
        """
        rope = rope_angles(batch["positions"], self.cfg)
        seen, attend = batch["segment_ids"], self._kernel
        if attend is None:
            seen, attend = attention_mask(self.length, seen, self.cfg.sliding_window), rotated_attention
        others = {name: x for name, x in params.items() if name != "layers"}

        def apply(layer: Layer, x: jax.Array) -> jax.Array:
            block = nnx.merge(llama.graph(self.cfg), others | {"layers": layer}).layers
            return block(x, rope, seen, self.constrain, attend, plain_einsum)

        return apply

    def attention_only(self, layer: Layer) -> Layer:
        """Returns a layer whose MLP adds nothing, so that its output is the stream between attention and MLP."""
        names = _MLP_ADDS_NORMED if self.cfg.post_norm else _MLP_ADDS
        # Not zeros as such: of a product with a constant 0, XLA on CPU (jax 0.12) leaves memory as it finds it.
        return layer | {name: layer[name] * 0 for name in names if name in layer}

    def started(self, params: Params, batch: Batch) -> jax.Array:
        """`start`, as part of another program."""
        table = self.constrain(params["embed"].astype(self.dtype), ".D")
        return scaled(self.constrain(table[batch["tokens"]], "BTD"), self.cfg.embedding_multiplier)

    def head(self, params: Params) -> jax.Array:
        """Returns the output projection [D, V] of prepared parameters."""
        return params["embed"].T if self.cfg.tie_word_embeddings else params["lm_head"]

    def normed(self, params: Params, x: jax.Array) -> jax.Array:
        """Applies the final norm to x [..., D]."""
        return scaled(rms_norm(x, params["final_norm"], self.cfg.rms_norm_eps), self.cfg.logits_multiplier)

    def chunks(self, rows: int) -> int:
        """Returns into how many chunks the tokens of `rows` rows are cut, so that logits do not outgrow `LOGITS`."""
        shards = axis_size(self.mesh, "data", "fsdp", "expert")
        logits = max(1, rows // shards) * self.length * self.cfg.vocab_size // self.mesh.shape["tensor"]
        return loss_chunks(logits, self.length, LOGITS)

    def cut(self, x: jax.Array, letters: str, axis: int) -> jax.Array:
        """Cuts the axis T of an array into chunks, which become its first axis; `letters` lays a chunk out."""
        rows = x.shape[letters.index("B")]
        chunks = self.chunks(rows)
        x = x.reshape(*x.shape[:axis], chunks, self.length // chunks, *x.shape[axis + 1 :])
        return self.constrain(jnp.moveaxis(x, axis, 0), "." + letters)

    def numbered(self, params: Params, batch: Batch) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """Returns a function (i, x [B, T, D]) that applies layer i of prepared parameters."""
        apply = self.layer(params, batch)

        def one(i: jax.Array, x: jax.Array) -> jax.Array:
            pick = functools.partial(jax.lax.dynamic_index_in_dim, index=i, keepdims=False)
            return apply(jax.tree.map(pick, params["layers"]), x)

        return one

    # ---- What is compiled --------------------------------------------------------------------------------------------
    def _ran(self, params: Params, batch: Batch, x: jax.Array, order: jax.Array, count: jax.Array) -> jax.Array:
        apply = self.numbered(self.prepared(params), batch)
        return self.constrain(jax.lax.fori_loop(0, count, lambda k, x: apply(order[k], x), x), "BTD")

    def _row_losses(self, params: Params, batch: Batch, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        params = self.prepared(params)
        found = token_values(
            self.normed(params, x), self.head(params), batch["targets"], chunks=self.chunks(len(x)),
            constrain=self.constrain,
        )  # fmt: skip
        return -jnp.sum(batch["weights"] * found["log_prob"], axis=-1), jnp.sum(batch["weights"], axis=-1)


def mean_of_rows(x: Any, rows: int) -> tuple[float, float | None]:
    """Returns mean and standard error over the first `rows` values of [B]; None for the error of a single row."""
    values = np.asarray(x, np.float64)[:rows]
    error = float(np.std(values, ddof=1) / np.sqrt(rows)) if rows > 1 else None
    return float(np.mean(values)), error

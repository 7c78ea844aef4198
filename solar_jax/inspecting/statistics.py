"""The residual stream by layer, the logit lens, and gradients by layer, as programs on a mesh.

The inputs of all layers, [L + 1, B, T, D] in the compute dtype with the last layer's output at the end, are kept once:
the lens, the gradients and every run with other layers start from them.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from solar_jax.data.pipeline import Batch
from solar_jax.model.llama import unembed
from solar_jax.model.shapes import Params
from solar_jax.parallel import rules
from solar_jax.parallel.mesh import axis_size
from solar_jax.training.layer_run import Layer, LayerRunner
from solar_jax.training.objectives import head_loss

Values = dict[str, np.ndarray]
_TINY = 1e-30


@dataclasses.dataclass(frozen=True)
class Stream:
    """The residual stream of a batch, by layer and token."""

    inputs: jax.Array  # [L + 1, B, T, D], on the devices
    norm: np.ndarray  # |h_i|, [L + 1, B, T]
    cosine: np.ndarray  # of h_i and h_{i+1}, [L, B, T]
    attention: np.ndarray  # |what attention adds| / |h_i|, [L, B, T]
    mlp: np.ndarray  # |what the MLP adds| / |the stream after attention|, [L, B, T]


def _aligned(inputs: jax.Array, layer: jax.Array, other: jax.Array) -> jax.Array:
    a, b = (jax.lax.dynamic_index_in_dim(inputs, i, keepdims=False).astype(jnp.float32) for i in (layer, other))
    return cosine_of(a, b)


class Statistics:
    """Programs that measure a model by layer; each compiles at its first use."""

    def __init__(self, runner: LayerRunner):
        """Prepares the programs for a runner's model and mesh."""
        self.runner, self._replicated = runner, rules.replicated(runner.mesh)
        self._stream = jax.jit(self._streamed, out_shardings=(None, self._replicated))
        self._lens = jax.jit(self._lensed, out_shardings=self._replicated)
        self._alignment = jax.jit(_aligned, out_shardings=self._replicated)
        self._gradients = jax.jit(self._differentiated, out_shardings=self._replicated)

    def stream(self, params: Params, batch: Batch) -> Stream:
        """Runs the model once and returns the stream; vectors are those of one token, norms are L2."""
        inputs, found = self._stream(params, batch)
        return Stream(inputs, **{name: np.asarray(x) for name, x in found.items()})

    def lens(self, params: Params, batch: Batch, inputs: jax.Array) -> Values:
        """Reads every layer's input through the final norm and the output projection.

        Args:
          params: the stacked state.
          batch: with the targets.
          inputs: [L + 1, B, T, D].

        Returns:
          float32 [L + 1, B, T]: "kl", KL(final || lens) in nats; "loss" of the targets in nats; "agreement", 1 where
          the likeliest token is that of the last layer. Entry L is the model itself.
        """
        return {name: np.asarray(x) for name, x in self._lens(params, batch, inputs).items()}

    def gradients(self, params: Params, batch: Batch, inputs: jax.Array) -> Values:
        """Returns L2 norms of the gradient of the mean loss, layer by layer from the last one.

        No layer's gradient outlives its step, so that memory holds one layer's.

        Args:
          params: the stacked state.
          batch: with targets and weights.
          inputs: [L + 1, B, T, D].

        Returns:
          float32 [L] by name of the layers' arrays, and "stream": of the gradient for each layer's input.
        """
        return {name: np.asarray(x) for name, x in self._gradients(params, batch, inputs).items()}

    def alignment(self, inputs: jax.Array, layer: int, other: int) -> np.ndarray:
        """Returns the cosine of the inputs of two layers, float32 [B, T]."""
        return np.asarray(self._alignment(inputs, np.int32(layer), np.int32(other)))

    # ---- What is compiled --------------------------------------------------------------------------------------------
    def _streamed(self, params: Params, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        run = self.runner
        params = run.prepared(params)
        apply = run.layer(params, batch)

        def layer(x: jax.Array, arrays: Layer) -> tuple[jax.Array, tuple[jax.Array, dict[str, jax.Array]]]:
            middle, out = apply(run.attention_only(arrays), x), apply(arrays, x)
            before, between, after = (a.astype(jnp.float32) for a in (x, middle, out))
            found = {
                "norm": length_of(before),
                "cosine": cosine_of(before, after),
                "attention": length_of(between - before) / jnp.maximum(length_of(before), _TINY),
                "mlp": length_of(after - between) / jnp.maximum(length_of(between), _TINY),
            }
            return out, (x, found)

        last, (inputs, found) = jax.lax.scan(layer, run.started(params, batch), params["layers"])
        found["norm"] = jnp.concatenate((found["norm"], length_of(last.astype(jnp.float32))[None]))
        return run.constrain(jnp.concatenate((inputs, last[None])), ".BTD"), found

    def _lensed(self, params: Params, batch: Batch, inputs: jax.Array) -> dict[str, jax.Array]:
        run = self.runner
        params = run.prepared(params)
        head = run.constrain(run.head(params), "DV")

        def logits(x: jax.Array) -> jax.Array:
            return run.constrain(unembed(run.normed(params, x), head), "BTV")

        def chunk(_: None, part: tuple[jax.Array, jax.Array]) -> tuple[None, dict[str, jax.Array]]:
            inputs, targets = part
            final = jax.nn.log_softmax(logits(inputs[-1]))
            top = jnp.argmax(final, axis=-1)

            def layer(_: None, x: jax.Array) -> tuple[None, dict[str, jax.Array]]:
                its = logits(x)
                normalised = jax.nn.log_softmax(its)
                return None, {
                    "kl": jnp.sum(jnp.exp(final) * (final - normalised), axis=-1),
                    "loss": -jnp.take_along_axis(normalised, targets[..., None], axis=-1)[..., 0],
                    "agreement": (jnp.argmax(its, axis=-1) == top).astype(jnp.float32),
                }

            return None, jax.lax.scan(layer, None, inputs)[1]

        parts = run.cut(inputs, ".BTD", 2), run.cut(batch["targets"], "BT", 1)
        found = jax.lax.scan(chunk, None, parts)[1]  # [chunks, L + 1, B, T / chunks]
        return {name: jnp.moveaxis(x, 0, 2).reshape(inputs.shape[:3]) for name, x in found.items()}

    def _differentiated(self, params: Params, batch: Batch, inputs: jax.Array) -> dict[str, jax.Array]:
        run = self.runner
        params = run.prepared(params)
        apply, head, rows = run.layer(params, batch), run.head(params), inputs.shape[1]

        def loss(x: jax.Array) -> jax.Array:
            total, count = head_loss(
                run.normed(params, x), head, batch["targets"], batch["weights"], chunks=run.chunks(rows),
                shards=axis_size(run.mesh, "data", "fsdp", "expert"), constrain=run.constrain, trains_head=False,
            )  # fmt: skip
            return total / jnp.maximum(count, 1.0)

        def layer(g: jax.Array, part: tuple[Layer, Layer, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
            arrays, fixed, x = part
            _, back = jax.vjp(lambda arrays, x: apply(arrays | fixed, x), arrays, x)
            of_arrays, g = back(g)
            return g, {name: norm_of_all(a) for name, a in of_arrays.items()} | {"stream": norm_of_all(g)}

        arrays = {name: x for name, x in params["layers"].items() if jnp.issubdtype(x.dtype, jnp.floating)}
        fixed = {name: x for name, x in params["layers"].items() if name not in arrays}
        parts = arrays, fixed, inputs[:-1]
        return jax.lax.scan(layer, jax.grad(loss)(inputs[-1]), parts, reverse=True)[1]


def length_of(x: jax.Array) -> jax.Array:
    """L2 norm over the last axis."""
    return jnp.sqrt(jnp.sum(x * x, axis=-1))


def cosine_of(a: jax.Array, b: jax.Array) -> jax.Array:
    """Cosine over the last axis; 0 where a vector is 0."""
    return jnp.sum(a * b, axis=-1) / jnp.maximum(length_of(a) * length_of(b), _TINY)


def norm_of_all(x: jax.Array) -> jax.Array:
    """L2 norm of all elements, float32."""
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32))))

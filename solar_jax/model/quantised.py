"""Projections whose weights, and by choice all operands of their matmuls, have 8 bits.

Weights are rounded once a step, before the scan over layers: each layer's all-gather moves 8 bits, and both passes
multiply by the same matrix W. With a scale s for each output, y = (x W) s and dx = (g s) W^T. Where activations are
rounded too, each token has a scale a, and backward b: y = a ((x / a) W) s and dx = b ((g s / b) W^T).

The weight's gradient is the product of x and g as they are (arXiv 2304.13013) or, where a kind says so, one of 8 bits.
It sums over tokens, whose scales cannot be taken out of the sum. So x is rounded again, with both scales a and b in it,
up or down at random; the other operand is that of dx. Each token's gradient gets noise that is independent of the
others' and small beside how they differ.
"""

import dataclasses
import functools
import typing
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from solar_jax.model.lora import INPUTS
from solar_jax.model.matmul import Einsum
from solar_jax.model.shapes import LAYER_AXES, Params


class NarrowKind(typing.NamedTuple):
    """Dtypes of the operands of projections; None is the compute dtype."""

    weights: Any
    activations: Any = None
    gradients: Any = None  # None if and only if activations are
    weight_gradients: tuple[str, ...] = ()  # projections whose weight has its gradient from 8 bits too


# 8-bit float gradients need the wider range of e5m2.
NARROW_KINDS = {
    "int8_weights": NarrowKind(jnp.int8),
    "int8": NarrowKind(jnp.int8, jnp.int8, jnp.int8),
    # Of the others, rounding and transposing an operand takes as long as the product saves.
    "int8_wgrad": NarrowKind(jnp.int8, jnp.int8, jnp.int8, ("gate", "up")),
    "fp8": NarrowKind(jnp.float8_e4m3fn, jnp.float8_e4m3fn, jnp.float8_e5m2),
}
ROW_SCALES = "row_scales"  # name of a saveable value: the scales of a projection's activations, [B, T]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NarrowWeight:
    """A projection's weight, about `values` x `scale`; stands in an array's place until it is multiplied."""

    values: jax.Array  # 8 bits [*inputs, *outputs], with any axes in front
    scale: jax.Array  # float32 [*outputs]
    exact: jax.Array  # the weight in the compute dtype: not read by products, but its gradient is returned for it
    kind: str = dataclasses.field(metadata={"static": True})  # a key of `NARROW_KINDS`
    name: str = dataclasses.field(metadata={"static": True})  # of the projection
    groups: int = dataclasses.field(metadata={"static": True})  # equal parts of B, each on devices of its own

    def __getitem__(self, _: Any) -> "NarrowWeight":
        """Stands for `weight[...]`, by which a layer reads its arrays."""
        return self


def exact_of(weight: Any) -> jax.Array:
    """Returns the weight as it was before it was rounded."""
    return weight.exact if isinstance(weight, NarrowWeight) else weight


def narrowed(params: Params, kind: str, groups: int = 1) -> Params:
    """Returns parameters whose dense projections are a `NarrowWeight`; everything else, experts too, is unchanged.

    Args:
      params: in the compute dtype; the layers may be stacked on any axes.
      kind: a key of `NARROW_KINDS`.
      groups: into how many parts the mesh splits B; each part's gradients of weights have a scale of their own.
    """

    def one(path: Any, x: jax.Array) -> Any:
        name = path[-1].key.removesuffix("_proj")
        if name not in INPUTS:
            return x
        first = x.ndim - len(LAYER_AXES[path[-1].key])
        axes = tuple(range(first, first + INPUTS[name]))
        fixed = jax.lax.stop_gradient(x)
        scale = narrow_scale(fixed, axes, NARROW_KINDS[kind].weights)
        values = narrow_values(fixed, jnp.expand_dims(scale, axes), NARROW_KINDS[kind].weights)
        return NarrowWeight(values, scale, x, kind, name, groups)

    return params | {"layers": jax.tree.map_with_path(one, params["layers"])}


def gathered_weights(weights: dict[str, Any], constrain: Any) -> dict[str, Any]:
    """Lays out weights of a layer for use by a `Constrain`, gathered together, and in 8 bits if they are narrow."""
    letters = tuple(LAYER_AXES[name] for name in weights)
    values = constrain(tuple(w.values if isinstance(w, NarrowWeight) else w for w in weights.values()), letters)

    def one(weight: Any, values: Any, letters: str) -> Any:
        if not isinstance(weight, NarrowWeight):
            return values
        exact, scale = constrain(weight.exact, letters), constrain(weight.scale, letters[-weight.scale.ndim :])
        return dataclasses.replace(weight, values=values, exact=exact, scale=scale)

    return {name: one(*its) for name, *its in zip(weights, weights.values(), values, letters, strict=True)}


def products(einsum: Einsum, subscripts: Sequence[str], x: jax.Array, weights: Sequence[Any]) -> list[jax.Array]:
    """Multiplies activations with each of several weights, by subscripts such as "btd,dnh->btnh".

    Where gradients are rounded, those of all of them share a scale for each token: they should be of like size.

    Args:
      einsum: of weights that are arrays.
      subscripts: one for each weight.
      x: [B, T, *inputs].
      weights: each [*inputs, *outputs]; all of them arrays, or all a `NarrowWeight`.

    Returns:
      [B, T, *outputs] for each weight, in x's dtype.
    """
    if not isinstance(weights[0], NarrowWeight):
        return [einsum(s, x, weight) for s, weight in zip(subscripts, weights, strict=True)]
    arrays = tuple((weight.values, weight.scale, weight.exact) for weight in weights)
    if NARROW_KINDS[weights[0].kind].activations is None:
        return [_weight_only(s, x, *weight) for s, weight in zip(subscripts, arrays, strict=True)]
    narrow = (weight.name in NARROW_KINDS[weight.kind].weight_gradients for weight in weights)
    ways = tuple(zip(subscripts, narrow, strict=True))
    return list(_products(ways, weights[0].kind, weights[0].groups, x, arrays))


# ---- Rounding --------------------------------------------------------------------------------------------------------
def _most(dtype: Any) -> float:
    return float((jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo)(dtype).max)


def narrow_scale(x: jax.Array, axes: tuple[int, ...], dtype: Any) -> jax.Array:
    """Returns the scale, float32 without `axes`, by which the largest value along them becomes the dtype's largest."""
    largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=axes)
    return jnp.maximum(largest / _most(dtype), jnp.finfo(jnp.float32).tiny)


def narrow_values(x: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """Returns x divided by a scale that broadcasts, rounded to the nearest value of a dtype of 8 bits."""
    x, most = x.astype(jnp.float32) / scale, _most(dtype)
    return (jnp.round(x) if jnp.issubdtype(dtype, jnp.integer) else jnp.clip(x, -most, most)).astype(dtype)


def rounded_at_random(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Rounds x [B, T, ...] times a factor [B, T] to int8, up or down, the nearer the likelier: exact on average.

    The thresholds are uniform, and independent for different tokens. Within a token they are one number, rotated: sums
    over tokens do not notice, and numbers are needed for tokens alone. They come from the factors' own bits, which are
    others in every step and layer, so that the same step gives the same result.
    """
    bits = jax.lax.bitcast_convert_type(factor, jnp.uint32)
    bits ^= jnp.arange(bits.size, dtype=jnp.uint32).reshape(bits.shape) * np.uint32(0x9E3779B9)
    for shift, multiplier in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # mixes every bit into all
        bits = (bits ^ (bits >> shift)) * np.uint32(multiplier)
    start = ((bits ^ (bits >> 16)) >> 8).astype(jnp.float32) * 2.0**-24
    turns = jnp.asarray(np.arange(x[0, 0].size).reshape(x.shape[2:]) * 0.6180339887498949 % 1, jnp.float32)
    threshold = _rows(start, x) + turns
    threshold -= jnp.floor(threshold)
    return jnp.clip(jnp.floor(x.astype(jnp.float32) * _rows(factor, x) + threshold), -127, 127).astype(jnp.int8)


def _rows(scale: jax.Array, x: jax.Array) -> jax.Array:
    """[B, T] -> [B, T, 1, ...], of as many axes as x."""
    return scale.reshape(*scale.shape, *[1] * (x.ndim - 2))


def _features(x: jax.Array) -> tuple[int, ...]:
    """Returns the axes of [B, T, ...] that are not tokens."""
    return tuple(range(2, x.ndim))


# ---- Multiplying -----------------------------------------------------------------------------------------------------
def _multiply(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the einsum of two integers in int32, of two floats in float32."""
    total = jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32
    return jnp.einsum(subscripts, x, y, preferred_element_type=total, precision=_precision(x))


def _precision(x: jax.Array) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _weight_gradient(s: str, x: jax.Array, g: jax.Array) -> jax.Array:
    """Returns a product's gradient by its weight, added in the compute dtype, in which the sum moves between devices.

    Args:
      s: subscripts of the product.
      x: [B, T, *inputs].
      g: [B, T, *outputs].
    """
    ours, theirs, out = s.replace("->", ",").split(",")
    return jnp.einsum(f"{ours},{out}->{theirs}", x, g, precision=_precision(x))


def _no_gradients(values: jax.Array, scale: jax.Array) -> tuple[Any, Any]:
    """Returns cotangents of what is rounded; the gradient of a weight is that of its `exact`."""
    return np.zeros(values.shape, jax.dtypes.float0), jnp.zeros_like(scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weight_only(s: str, x: jax.Array, values: jax.Array, scale: jax.Array, exact: jax.Array) -> jax.Array:
    """Multiplies by a weight of 8 bits as by one of the compute dtype, which holds every 8-bit value exactly."""
    return (_multiply(s, x, values.astype(x.dtype)) * scale).astype(x.dtype)


def _weight_only_forward(s: str, x: jax.Array, values: jax.Array, scale: jax.Array, exact: jax.Array) -> Any:
    return _weight_only(s, x, values, scale, exact), (x, values, scale)


def _weight_only_backward(s: str, saved: tuple[jax.Array, ...], g: jax.Array) -> Any:
    x, values, scale = saved
    ours, theirs, out = s.replace("->", ",").split(",")
    dx = _multiply(f"{out},{theirs}->{ours}", (g.astype(jnp.float32) * scale).astype(x.dtype), values.astype(x.dtype))
    return dx.astype(x.dtype), *_no_gradients(values, scale), _weight_gradient(s, x, g)


_weight_only.defvjp(_weight_only_forward, _weight_only_backward)


def _tokens_last(x: jax.Array, groups: int) -> jax.Array:
    """[B, T, ...] -> [groups, features, tokens], as it lies in memory.

    TPUs multiply 8 bits twice as fast as 16 only where the first operand has the axis last that is summed over. x is
    transposed once it is rounded, which moves fewer bytes; without the first constraint, XLA would transpose what it is
    rounded from.
    """
    layout = Layout(major_to_minor=(0, 1, 2))
    x = with_layout_constraint(x.reshape(groups, -1, x[0, 0].size), layout)
    return with_layout_constraint(jax.lax.optimization_barrier(x).swapaxes(1, 2), layout)


Weights = tuple[tuple[jax.Array, jax.Array, jax.Array], ...]  # values, scale and exact of each
Ways = tuple[tuple[str, bool], ...]  # subscripts of each, and whether the weight's gradient is a product of 8 bits


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _products(ways: Ways, kind: str, groups: int, x: jax.Array, weights: Weights) -> tuple[jax.Array, ...]:
    return _forward(ways, kind, groups, x, weights)[0]


def _forward(ways: Ways, kind: str, groups: int, x: jax.Array, weights: Weights) -> Any:
    of_row = checkpoint_name(narrow_scale(x, _features(x), NARROW_KINDS[kind].activations), ROW_SCALES)
    rows = narrow_values(x, _rows(of_row, x), NARROW_KINDS[kind].activations)
    found = []
    for (s, _), (values, scale, _) in zip(ways, weights, strict=True):
        y = _multiply(s, rows, values)
        found.append((y.astype(jnp.float32) * _rows(of_row, y) * scale).astype(x.dtype))
    return tuple(found), (x, of_row, tuple((values, scale) for values, scale, _ in weights))


def _backward(ways: Ways, kind: str, groups: int, saved: Any, gradients: tuple[jax.Array, ...]) -> Any:
    x, of_row, weights = saved
    scaled = [g.astype(jnp.float32) * scale for g, (_, scale) in zip(gradients, weights, strict=True)]
    largest = [narrow_scale(g, _features(g), NARROW_KINDS[kind].gradients) for g in scaled]
    of_gradient = functools.reduce(jnp.maximum, largest)
    rows = [narrow_values(g, _rows(of_gradient, g), NARROW_KINDS[kind].gradients) for g in scaled]

    both = (of_row * of_gradient).reshape(groups, -1)
    most = jnp.max(both, axis=1)  # [groups]
    of_group = jnp.repeat(most, len(x) // groups)[:, None]  # [B, 1]
    again = x
    if any(in_8_bits for _, in_8_bits in ways):
        again = _tokens_last(rounded_at_random(x, of_gradient / of_group), groups)
    terms, found = [], []
    for (s, in_8_bits), g, row, (values, scale) in zip(ways, gradients, rows, weights, strict=True):
        ours, theirs, out = s.replace("->", ",").split(",")
        terms.append(_multiply(f"{out},{theirs}->{ours}", row, values))
        if not in_8_bits:
            d_weight = _weight_gradient(s, x, g)
        else:
            d_weight = _multiply("gim,gmo->gio", again, row.reshape(groups, -1, row[0, 0].size))
            d_weight = (d_weight.astype(jnp.float32) * most[:, None, None] / scale.reshape(-1)).astype(x.dtype)
            # Added in the compute dtype, in which the sum moves between devices.
            d_weight = jax.lax.reduce(d_weight, np.zeros((), x.dtype), jax.lax.add, (0,)).reshape(values.shape)
        found.append((*_no_gradients(values, scale), d_weight))
    dx = functools.reduce(jnp.add, terms).astype(jnp.float32) * _rows(of_gradient, x)
    return dx.astype(x.dtype), tuple(found)


_products.defvjp(_forward, _backward)

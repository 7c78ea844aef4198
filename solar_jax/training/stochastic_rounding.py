"""Stochastic rounding of bfloat16 weights and moments, unbiased, so that small updates still take effect."""

import typing
from typing import Any

import jax
import jax.numpy as jnp
import optax

from solar_jax.model.precision import Precision
from solar_jax.model.shapes import LAYER_AXES, is_vector

_MATRICES = {"embed", "lm_head"} | {name for name in LAYER_AXES if not is_vector(name)}


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """Rounds float32 to bfloat16 up or down, the nearer the likelier: exact if representable, and exact on average.

    A uniform 16-bit number is added to the 16 bits that bfloat16 lacks, which are truncated after the carry.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


class Narrow(typing.NamedTuple):
    """State of `narrow`."""

    count: jax.Array  # updates so far, int32
    inner: Any


def narrow(tx: optax.GradientTransformation, precision: Precision, seed: int) -> optax.GradientTransformation:
    """Wraps `tx`, which computes in float32, so that moments and weights are stored as a policy says.

    Arrays narrower than float32 are rounded stochastically, with keys that depend on the seed, the update and the array
    alone. The updates become those that land on the rounded weights.
    """
    if precision.weights == precision.moments == "float32":
        return tx

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)

    def kept(state: Any, key: jax.Array | None) -> Any:
        """Casts a float32 state to the dtypes it is stored in; without a key, a state of zeros."""
        if precision.moments == "float32":
            return state
        leaves, structure = jax.tree.flatten_with_path(state)
        for i, (path, x) in enumerate(leaves):
            if getattr(path[-1], "key", None) in _MATRICES and x.dtype == jnp.float32:
                x = x.astype(jnp.bfloat16) if key is None else stochastic_round(x, jax.random.fold_in(key, i))
            leaves[i] = x
        return jax.tree.unflatten(structure, leaves)

    def init(params: Any) -> Narrow:
        return Narrow(jnp.zeros([], jnp.int32), kept(tx.init(wide(params)), None))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Narrow]:
        of_state, of_weights = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.count))
        wide_params = wide(params)
        updates, inner = tx.update(wide(updates), wide(state.inner), wide_params)

        def landed(i: int, update: jax.Array, before: jax.Array, weight: jax.Array) -> jax.Array:
            if weight.dtype == jnp.float32:
                return update
            after = stochastic_round(before + update, jax.random.fold_in(of_weights, i))
            return after.astype(jnp.float32) - before

        leaves, structure = jax.tree.flatten(updates)
        weights = zip(leaves, jax.tree.leaves(wide_params), jax.tree.leaves(params), strict=True)
        updates = jax.tree.unflatten(structure, [landed(i, *arrays) for i, arrays in enumerate(weights)])
        return updates, Narrow(state.count + 1, kept(inner, of_state))

    return optax.GradientTransformation(init, update)


def as_kept(opt_state: Any, narrow_before: bool) -> Any:
    """Returns an abstract optimiser state in the form in which another precision policy stores it."""
    if isinstance(opt_state, Narrow) == narrow_before:
        return opt_state
    if not narrow_before:
        return opt_state.inner
    scalar = next(x for x in jax.tree.leaves(opt_state) if x.ndim == 0)  # the optimisers' own update count
    return Narrow(scalar, opt_state)


def as_wanted(opt_state: Any, wanted: Any, updates: int) -> Any:
    """Returns a restored state of `as_kept` in the form of the abstract state `wanted`; `updates`: taken so far."""
    if isinstance(opt_state, Narrow) == isinstance(wanted, Narrow):
        return opt_state
    if isinstance(opt_state, Narrow):
        return opt_state.inner
    return Narrow(jax.device_put(jnp.int32(updates), wanted.count.sharding), opt_state)

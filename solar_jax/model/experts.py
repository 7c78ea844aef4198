"""Mixture of experts in place of a layer's MLP: routing, and the experts' MLPs through a grouped matmul.

A token goes to the k experts whose router logits are highest; nothing is dropped (Mixtral: arXiv 2401.04088). Axis
letter E is the number of experts.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from solar_jax.config import ModelConfig
from solar_jax.model.matmul import parts_of

# (h [B, T, D], weights [B, T, k], chosen [B, T, k], gate and up [E, D, F], down [E, F, D]) -> [B, T, D]
Dispatch = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
# A layer's routing, float32 sums over tokens: "chosen" and "probability" [E]; scalars "entropy", "z" and "tokens"
Load = dict[str, jax.Array]


def route(
    h: jax.Array, router: jax.Array, cfg: ModelConfig, counted: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, Load]:
    """Chooses each token's experts.

    Args:
      h: [B, T, D], the layer's normalised input.
      router: [D, E].
      cfg: the architecture; with `norm_topk_prob` the chosen experts' weights sum to 1 (Mixtral), without it they are
        the softmax over all experts.
      counted: [B, T], weights of the tokens in the sums; all count if None.

    Returns:
      weights [B, T, k] float32, chosen experts [B, T, k] int32, highest first, and the sums.
    """
    precision = jax.lax.Precision.HIGHEST if h.dtype == jnp.float32 else None
    router = router.astype(h.dtype)
    logits = jnp.einsum("btd,de->bte", h, router, precision=precision, preferred_element_type=jnp.float32)
    highest, chosen = jax.lax.top_k(logits, cfg.num_experts_per_tok)
    norm = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    probability = jnp.exp(logits - norm)
    weights = jax.nn.softmax(highest, axis=-1) if cfg.norm_topk_prob else jnp.exp(highest - norm)
    one = jnp.ones(h.shape[:2], jnp.float32) if counted is None else counted.astype(jnp.float32)
    hits = jnp.sum(jax.nn.one_hot(chosen, cfg.num_local_experts, dtype=jnp.float32), axis=2)
    return weights, chosen, {
        "chosen": jnp.einsum("bt,bte->e", one, hits) / cfg.num_experts_per_tok,
        "probability": jnp.einsum("bt,bte->e", one, probability),
        "entropy": -jnp.sum(one * jnp.sum(probability * (logits - norm), axis=-1)),
        "z": jnp.sum(one * norm[..., 0] ** 2),
        "tokens": jnp.sum(one),
    }  # fmt: skip


def grouped_mlp(
    h: jax.Array, weights: jax.Array, chosen: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array
) -> jax.Array:
    """Sums the SwiGLUs of each token's experts, by their weights, as a `Dispatch`.

    Tokens are sorted by expert, so that each expert multiplies a run of rows (`jax.lax.ragged_dot`). A chosen expert
    that is not one of [0, E) adds nothing: it is another device's.

    A choice's weight multiplies what its expert's last matrix takes, not what that gives: the weight's gradient is then
    a product of values that the backward pass has.
    """
    B, T, D = h.shape
    E, k = gate.shape[0], chosen.shape[-1]
    # All first choices, then all second ones, so that a token's sum is over an outer axis.
    chosen, weights = (x.reshape(-1, k).T.reshape(-1) for x in (chosen, weights))
    ours = (chosen >= 0) & (chosen < E)
    expert = jnp.where(ours, chosen, E)
    order = jnp.argsort(expert, stable=True)
    place = jnp.where(ours, jnp.argsort(order), -1)
    sizes = jnp.bincount(expert, length=E + 1)[:E].astype(jnp.int32)
    x = _spread(h.reshape(-1, D), order, place, k)
    g = checkpoint_name(_grouped(x, gate, sizes), "gate")
    u = checkpoint_name(_grouped(x, up, sizes), "up")
    share = _spread(weights[:, None], order, place, 1)
    a = ((jax.nn.silu(g) * u).astype(jnp.float32) * share).astype(h.dtype)
    return _summed(_grouped_in_parts(a, down, sizes), order, place, k).reshape(B, T, D)


# Each is the other's gradient; left to jax, those would be scatters, one row after the other on a TPU.
# Rows [Mk, D] are choices sorted by expert: row i is choice order[i], choice j is row place[j], -1 if it is not ours.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _spread(h: jax.Array, order: jax.Array, place: jax.Array, k: int) -> jax.Array:
    """Returns each row's token, [M, D] -> [Mk, D]."""
    del place, k
    return h[order % len(h)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _summed(y: jax.Array, order: jax.Array, place: jax.Array, k: int) -> jax.Array:
    """Returns each token's sum of its rows, [Mk, D] -> [M, D]; rows that are not ours hold anything."""
    del order
    found = jnp.where(place[:, None] < 0, 0.0, y[place].astype(jnp.float32))
    # One by one: XLA on TPUs sums over an axis in ten times the time.
    return functools.reduce(jnp.add, jnp.split(found, k)).astype(y.dtype)


_spread.defvjp(
    lambda h, order, place, k: (_spread(h, order, place, k), (order, place)),
    lambda k, saved, g: (_summed(g, *saved, k), None, None),
)
_summed.defvjp(
    lambda y, order, place, k: (_summed(y, order, place, k), (order, place)),
    lambda k, saved, g: (_spread(g, *saved, k), None, None),
)


def _grouped(x: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
    """[Mk, I] x [E, I, O] -> [Mk, O], rows in runs of `sizes` [E]; true float32 where x is."""
    return _with_gradient(x, weight.astype(x.dtype), sizes)


# `ragged_dot` has no vmap over rows alone, which is how a step runs per TPU slice: there, one slice after the other.
@jax.custom_batching.sequential_vmap
def _product(x: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.ragged_dot(x, weight, sizes, precision=precision)


@jax.custom_batching.sequential_vmap
def _gradients(x: jax.Array, weight: jax.Array, sizes: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.vjp(lambda x, w: jax.lax.ragged_dot(x, w, sizes, precision=precision), x, weight)[1](g)


_with_gradient = jax.custom_vjp(_product)
_with_gradient.defvjp(
    lambda x, weight, sizes: (_product(x, weight, sizes), (x, weight, sizes)),
    lambda saved, g: (*_gradients(*saved, g), None),
)


def _grouped_in_parts(x: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
    """`_grouped`, in float32 summed in parts of F, as `down_projection` sums a dense one, and for its reason."""
    if x.dtype != jnp.float32:
        return _grouped(x, weight, sizes)
    E, F, D = weight.shape
    parts = parts_of(F)
    xs = x.reshape(-1, parts, F // parts).swapaxes(0, 1)
    ws = weight.reshape(E, parts, F // parts, D).swapaxes(0, 1)
    return jnp.sum(jax.lax.map(lambda part: _grouped(part[0], part[1], sizes), (xs, ws)), axis=0)


def router_losses(loads: Load) -> dict[str, jax.Array]:
    """Losses and statistics of the routing of all layers.

    Args:
      loads: the sums of L layers, each with a leading axis L.

    Returns:
      Scalars: "balance", E sum f_i p_i with f_i the share of choices and p_i the mean probability of expert i, 1 if
      even (Switch Transformer: arXiv 2101.03961, eq. 4), and "z", the mean square of the logits' log-sum-exp (ST-MoE:
      arXiv 2202.08906, eq. 5), both means over layers; "entropy" in nats; the smallest and the largest share of
      choices that an expert of any layer has, "least_load" and "most_load".
    """
    count = jnp.maximum(loads["tokens"], 1.0)[:, None]
    f, p = loads["chosen"] / count, loads["probability"] / count
    return {
        "balance": jnp.mean(f.shape[1] * jnp.sum(jax.lax.stop_gradient(f) * p, axis=1)),
        "z": jnp.mean(loads["z"] / count[:, 0]),
        "entropy": jnp.mean(loads["entropy"] / count[:, 0]),
        "least_load": jnp.min(f),
        "most_load": jnp.max(f),
    }

"""Objectives: what training minimises, as functions of a model's forward pass and a batch."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from solar_jax.model.experts import Load, router_losses
from solar_jax.model.llama import Constrain, unconstrained, unembed

Batch = dict[str, jax.Array]
Sums = dict[str, jax.Array]  # by name, float32 scalars


@dataclasses.dataclass(frozen=True)
class Forward:
    """A model with its parameters, laid out on a mesh.

    hidden         (batch of [B, T] arrays) -> the final norm's output, the output projection [D, V], and the batch in
                   the layout of that output
    cross_entropy  (output, projection, targets, weights) -> summed loss in nats, summed weights, as `head_loss`
    tokens         (output, projection, targets, stats=False) -> values by token, as `token_values`
    loads          the routing of each call of `hidden` so far, for a model of experts
    """

    hidden: Callable[[Batch], tuple[jax.Array, jax.Array, Batch]]
    cross_entropy: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    tokens: Callable[..., Sums]
    loads: list[Load] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Objective:
    """A quantity that a step minimises.

    loss   (forward, batch) -> summed loss, what it is summed over, further sums to be reported as means
    whole  (a step's batch, before it is split into microbatches) -> the batch with what depends on all of it
    """

    loss: Callable[[Forward, Batch], tuple[jax.Array, jax.Array, Sums]]
    whole: Callable[[Batch], Batch] = lambda batch: batch


# (forward, batch) -> sums by name, each with what it is summed over; "loss" is among them
Measures = Callable[[Forward, Batch], Mapping[str, tuple[jax.Array, jax.Array]]]


def _next_token(forward: Forward, batch: Batch) -> tuple[jax.Array, jax.Array, Sums]:
    """Cross-entropy of "targets" by "weights", in nats a target."""
    x, head, laid_out = forward.hidden(batch)
    loss, count = forward.cross_entropy(x, head, laid_out["targets"], laid_out["weights"])
    return loss, count, {}


next_token = Objective(_next_token)


def with_router(
    objective: Objective, forward: Forward, batch: Batch, balance: float, z: float
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Sums]]:
    """Computes an objective's loss, and for a model of experts adds those of their router.

    Args:
      objective: what is minimised.
      forward: of the model; it has routed nothing yet.
      batch: of the objective.
      balance: weight of the load-balance loss.
      z: weight of the router's z-loss.

    Returns:
      The sum to differentiate; and the objective's own sum, what it is summed over, and further sums: of experts the
      routing's, `router_losses`, each times that number.
    """
    loss, count, sums = objective.loss(forward, batch)
    if not forward.loads or not forward.loads[0]:
        return loss, (loss, count, sums)
    found = [router_losses(load) for load in forward.loads]
    routing = {name: sum(one[name] for one in found) / len(found) for name in found[0]}
    total = loss + count * (balance * routing["balance"] + z * routing["z"])
    return total, (loss, count, sums | {f"router_{name}": value * count for name, value in routing.items()})


def text_measures(forward: Forward, batch: Batch) -> Mapping[str, tuple[jax.Array, jax.Array]]:
    """The loss of text a target, in nats."""
    return {"loss": _next_token(forward, batch)[:2]}


def answer_measures(end: int) -> Measures:
    """The loss of answers a token, in nats, and the probability of the token `end` where an answer ends."""

    def measures(forward: Forward, batch: Batch) -> Mapping[str, tuple[jax.Array, jax.Array]]:
        x, head, laid_out = forward.hidden(batch)
        log_probs = forward.tokens(x, head, laid_out["targets"])["log_prob"].reshape(batch["weights"].shape)
        weights, ends = batch["weights"], ends_of_answers(batch, end)
        return {
            "loss": (-jnp.sum(weights * log_probs), jnp.sum(weights)),
            "end_probability": (jnp.sum(ends * jnp.exp(log_probs)), jnp.sum(ends)),
        }

    return measures


def ends_of_answers(batch: Batch, end: int) -> jax.Array:
    """[B, T] float32, 1 where a trained target is the token that ends answers."""
    return batch["weights"] * (batch["targets"] == end)


def token_values(
    x: jax.Array, head: jax.Array, targets: jax.Array, *, chunks: int = 1, constrain: Constrain = unconstrained,
    stats: bool = False,
) -> Sums:  # fmt: skip
    """Values of each token from the logits x @ head, a chunk of each row's tokens at a time; no gradient is meant.

    Args:
      x: [B, T, D], the final norm's output.
      head: [D, V], the output projection, in x's dtype.
      targets: [B, T] integers.
      chunks: number of chunks, which must divide T.
      constrain: lays arrays out on a mesh.
      stats: also the mean logit, and whether the target has the highest one.

    Returns:
      [B, T] float32 each: "log_prob" in nats, and with `stats` "mean_logit" and "is_top".
    """
    B, T, D = x.shape
    head = constrain(head, "DV")

    def one(_: None, chunk: tuple[jax.Array, jax.Array]) -> tuple[None, Sums]:
        x, targets = chunk
        logits = constrain(unembed(x, head), "BTV")
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        found = {"log_prob": picked - jax.nn.logsumexp(logits, axis=-1)}
        if stats:
            found |= {
                "mean_logit": jnp.mean(logits, axis=-1),
                "is_top": (picked >= jnp.max(logits, axis=-1)).astype(jnp.float32),
            }
        return None, found

    parts = (
        constrain(x.reshape(B, chunks, T // chunks, D).swapaxes(0, 1), ".BTD"),
        constrain(targets.reshape(B, chunks, T // chunks).swapaxes(0, 1), ".BT"),
    )
    found = jax.lax.scan(one, None, parts)[1]
    return {name: value.swapaxes(0, 1).reshape(B, T) for name, value in found.items()}


def next_token_loss(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Summed cross-entropy in nats, and the number of targets it is over.

    Args:
      logits: [B, T, V] float32.
      targets: [B, T] integers.
      weights: [B, T] float32, 0 where a target does not count.

    Returns:
      Two float32 scalars; their quotient is the mean loss a token.
    """
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - picked)), jnp.sum(weights)


def head_loss(
    x: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    chunks: int = 1,
    shards: int = 1,
    constrain: Constrain = unconstrained,
    trains_head: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """`next_token_loss` of the logits x @ head, a chunk of each row's tokens at a time.

    Only a chunk's logits are in memory. Their gradient is computed along with the loss, so that the backward pass does
    not recompute logits; there is no gradient with respect to `weights`.

    Args:
      x: [B, T, D], the final norm's output.
      head: [D, V], the output projection, in x's dtype.
      targets: [B, T] integers.
      weights: [B, T] float32, 0 where a target does not count.
      chunks: number of chunks, which must divide T.
      shards: devices that B is sharded over; each sums its own gradient of the head, and they are added once.
      constrain: lays arrays out on a mesh.
      trains_head: False computes no gradient of the head, which the caller must not ask for.
    """
    B, T, D = x.shape

    def split(a: jax.Array, letters: str) -> jax.Array:
        """[B, T, ...] -> [chunks, B, T / chunks, ...], every chunk on the devices of its rows."""
        moved = a.reshape(B, chunks, T // chunks, *a.shape[2:]).swapaxes(0, 1)
        return constrain(moved, "." + letters)

    def loss_of(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        return next_token_loss(constrain(logits, "BTV"), targets, weights)[0]

    def product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
        precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
        return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32)

    @jax.custom_vjp
    def summed(x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        def add(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            x, *labels = chunk
            return total + loss_of(unembed(x, head), *labels), None

        parts = split(x, "BTD"), split(targets, "BT"), split(weights, "BT")
        return jax.lax.scan(add, jnp.float32(0), parts)[0]

    def forward(
        x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        def add(sums: Any, chunk: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
            total, d_head = sums
            x, *labels = chunk
            loss, d_logits = jax.value_and_grad(loss_of)(unembed(x, head), *labels)
            d_logits = constrain(d_logits.astype(x.dtype), "BTV")
            dx = constrain(product("btv,dv->btd", d_logits, head), "BTD").astype(x.dtype)
            # Rows of one device have their own axis: a sum over them is local until that axis is summed.
            if trains_head:
                groups = (a.reshape(shards, B // shards, *a.shape[1:]) for a in (x, d_logits))
                d_head = constrain(d_head + product("gbtd,gbtv->gdv", *groups), "BDV")
            return (total + loss, d_head), dx

        empty = jnp.zeros((shards, *head.shape), jnp.float32)
        zero = jnp.float32(0), constrain(empty, "BDV") if trains_head else jnp.zeros((), x.dtype)
        parts = split(x, "BTD"), split(targets, "BT"), split(weights, "BT")
        (total, d_head), dx = jax.lax.scan(add, zero, parts)
        dx = constrain(dx.swapaxes(0, 1).reshape(B, T, D), "BTD")
        return total, (dx, d_head)

    def backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array | None, ...]:
        dx, d_head = saved
        if trains_head:
            d_head = (g * jnp.sum(d_head.astype(dx.dtype), axis=0)).astype(dx.dtype)
        else:  # not asked for: the projection is frozen
            d_head = jnp.zeros(head.shape, head.dtype)
        return (g * dx).astype(dx.dtype), d_head, None, None

    summed.defvjp(forward, backward)
    return summed(x, constrain(head, "DV"), targets, weights), jnp.sum(weights)

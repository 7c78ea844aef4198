"""AdamW with clipping, a schedule, and a mask of what may move; all of it optax."""

import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from solar_jax.config import Config, OptimizerConfig
from solar_jax.errors import UserError
from solar_jax.growth.plan import GrowthPlan
from solar_jax.model.llama import Params, is_vector


def _cosine(peak: float, last: float, steps: int, decay_fraction: float) -> optax.Schedule:
    del decay_fraction
    return optax.cosine_decay_schedule(peak, steps, alpha=last / peak if peak else 0.0)


def _warmup_stable_decay(peak: float, last: float, steps: int, decay_fraction: float) -> optax.Schedule:
    decay = max(1, round(steps * decay_fraction))
    return optax.linear_schedule(peak, last, decay, transition_begin=steps - decay)


# name -> (peak, last, steps after warmup, share of them that the final decay takes) -> the schedule after warmup
SCHEDULES: dict[str, Callable[[float, float, int, float], optax.Schedule]] = {
    "constant": lambda peak, last, steps, decay_fraction: optax.constant_schedule(peak),
    "linear": lambda peak, last, steps, decay_fraction: optax.linear_schedule(peak, last, steps),
    "cosine": _cosine,
    "wsd": _warmup_stable_decay,
}

# name -> (which layers train, which of the arrays outside the layers do)
TRAINABLE: dict[str, Callable[[GrowthPlan], tuple[tuple[bool, ...], dict[str, bool]]]] = {
    "all": lambda plan: ((True,) * plan.layers, {"embed": True, "final_norm": True, "lm_head": True}),
    "new": lambda plan: (plan.new, {"embed": False, "final_norm": False, "lm_head": False}),
    "seam": lambda plan: (
        tuple(i in plan.seams or i - 1 in plan.seams for i in range(plan.layers)),
        {"embed": False, "final_norm": False, "lm_head": False},
    ),
    "no_embed": lambda plan: ((True,) * plan.layers, {"embed": False, "final_norm": True, "lm_head": False}),
}


def learning_rate(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """Rate of update `count` = 0 .. steps - 1: linear warmup that ends at the peak, then the named schedule.

    Raises:
      UserError: no such schedule.
    """
    if cfg.schedule not in SCHEDULES:
        raise UserError(f"config.optimizer.schedule must be one of {', '.join(SCHEDULES)}, found {cfg.schedule!r}.")
    peak, warmup = cfg.learning_rate, cfg.warmup_steps
    after = SCHEDULES[cfg.schedule](peak, peak * cfg.final_fraction, max(1, steps - warmup - 1), cfg.decay_fraction)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1)), after], [warmup])


def trainable_layers(name: str, plan: GrowthPlan) -> tuple[tuple[bool, ...], dict[str, bool]]:
    """Which layers and which other arrays `config.train.trainable` lets move.

    Raises:
      UserError: no such choice, or one that leaves nothing to train.
    """
    if name not in TRAINABLE:
        raise UserError(f"config.train.trainable must be one of {', '.join(TRAINABLE)}, found {name!r}.")
    layers, others = TRAINABLE[name](plan)
    if not any(layers):
        raise UserError(f"config.train.trainable={name!r} leaves nothing to train: {plan.operator} has no such layer.")
    return layers, others


def trainable_mask(params: Params, layers: tuple[bool, ...], others: dict[str, bool]) -> Params:
    """A tree of 0/1 float32 that broadcasts against `params`: [L, 1, ...] within layers, a scalar elsewhere."""
    per_layer = jnp.array(layers, jnp.float32)
    mask: Params = {name: jnp.float32(others[name]) for name in params if name != "layers"}
    mask["layers"] = {k: per_layer.reshape(-1, *(1,) * (x.ndim - 1)) for k, x in params["layers"].items()}
    return mask


def _decayed(params: Params) -> Params:
    """True for matrices: weight decay leaves norm scales and biases alone."""
    return jax.tree.map_with_path(lambda path, _: not is_vector(path[-1].key), params)


def masked(tree: Any, mask: Params | None) -> Any:
    """`tree` with 0 where nothing trains; itself where everything does."""
    return tree if mask is None else jax.tree.map(jnp.multiply, tree, mask)


def _masked(mask: Params | None) -> optax.GradientTransformation:
    return (
        optax.identity()
        if mask is None
        else optax.stateless(lambda updates, _: masked(typing.cast(Params, updates), mask))
    )


def make_optimizer(config: Config, mask: Params | None = None) -> optax.GradientTransformation:
    """Clipping and AdamW; where `mask` is 0 neither gradient, decay nor moment moves a weight.

    Frozen gradients are dropped before the norm is taken, so that clipping sees what moves.
    """
    cfg = config.optimizer
    clip: Any = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
    adamw = optax.adamw(
        learning_rate(cfg, config.train.steps), cfg.b1, cfg.b2, cfg.eps, weight_decay=cfg.weight_decay, mask=_decayed
    )
    return optax.chain(_masked(mask), clip, adamw, _masked(mask))

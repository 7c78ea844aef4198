"""Optimiser table with clipping, a schedule and weight decay; all the maths is optax's."""

import functools
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax.sharding import Mesh

from solar_jax.config import OptimizerConfig
from solar_jax.errors import UserError
from solar_jax.model.precision import Precision
from solar_jax.model.shapes import LAYER_AXES, Params, is_vector
from solar_jax.parallel.collectives import layers_at_rest, whole_layers
from solar_jax.training.stochastic_rounding import narrow


def _cosine(peak: float, last: float, steps: int, decay_fraction: float) -> optax.Schedule:
    del decay_fraction
    return optax.cosine_decay_schedule(peak, steps, alpha=last / peak if peak else 0.0)


def _warmup_stable_decay(peak: float, last: float, steps: int, decay_fraction: float) -> optax.Schedule:
    decay = max(1, round(steps * decay_fraction))
    return optax.linear_schedule(peak, last, decay, transition_begin=steps - decay)


# name -> (peak, last, steps after warmup, fraction of them in the final decay) -> the schedule after warmup
SCHEDULES: dict[str, Callable[[float, float, int, float], optax.Schedule]] = {
    "constant": lambda peak, last, steps, decay_fraction: optax.constant_schedule(peak),
    "linear": lambda peak, last, steps, decay_fraction: optax.linear_schedule(peak, last, steps),
    "cosine": _cosine,
    "wsd": _warmup_stable_decay,
}


class Rewarm(typing.NamedTuple):
    """Steps after which the learning rate rises again from 0, and over how many."""

    after: tuple[int, ...] = ()
    length: int = 0


NONE = Rewarm()


def learning_rate(cfg: OptimizerConfig, steps: int, rewarm: Rewarm = NONE) -> optax.Schedule:
    """Returns the rate of update `count` = 0 .. steps - 1: linear warmup up to the peak, then the named schedule.

    After each step of `rewarm` it rises linearly to that again.

    Raises:
      UserError: unknown schedule.
    """
    if cfg.schedule not in SCHEDULES:
        raise UserError(f"config.optimizer.schedule must be one of {', '.join(SCHEDULES)}, found {cfg.schedule!r}.")
    peak, warmup = cfg.learning_rate, cfg.warmup_steps or round(cfg.warmup_fraction * steps)
    after = SCHEDULES[cfg.schedule](peak, peak * cfg.final_fraction, max(1, steps - warmup - 1), cfg.decay_fraction)
    found = after
    if warmup:
        rising = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
        found = optax.join_schedules([rising, after], [warmup])
    if not (rewarm.length and rewarm.after):
        return found

    def rewarmed(count: Any) -> jax.Array:
        since = [jnp.where(count < k, rewarm.length, count - k + 1) for k in rewarm.after]
        share = jnp.minimum(functools.reduce(jnp.minimum, since) / rewarm.length, 1.0)
        return jnp.asarray(found(count)) * share

    return rewarmed


def learning_rates(cfg: OptimizerConfig, steps: int, rewarm: Rewarm = NONE) -> np.ndarray:
    """Computes every update's learning rate at once; one at a time, they would queue behind the devices' steps."""
    rate = learning_rate(cfg, steps, rewarm)
    return np.asarray(jax.jit(jax.vmap(lambda i: jnp.asarray(rate(i), jnp.float32)))(jnp.arange(steps)))


def _decayed(params: Params) -> Params:
    """Masks weight decay: True for matrices, False for norm scales and biases."""
    return jax.tree.map_with_path(lambda path, _: not is_vector(path[-1].key), params)


class PerLayer(typing.NamedTuple):
    """State of `_per_layer`."""

    layers: Any  # arrays stacked over L; scalars are shared by all layers
    others: Any


def _per_layer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies `tx` to every layer separately, so that reductions over an array, such as norms, are per layer."""

    def split(tree: Any) -> tuple[Any, Any]:
        stacks = {name: tree[name] for name in ("layers", "lora") if name in tree}
        return stacks, {name: x for name, x in tree.items() if name not in stacks}

    def stacked(layers: Params) -> Any:
        """Returns the vmap axes: 0 for arrays with an axis L, None for scalars."""
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), layers)
        return jax.tree.map(lambda s: 0 if s.ndim else None, jax.eval_shape(tx.init, one))

    def init(params: Any) -> PerLayer:
        layers, others = split(params)
        return PerLayer(jax.vmap(tx.init, out_axes=stacked(layers))(layers), tx.init(others))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, PerLayer]:
        (layers, others), (p_layers, p_others) = split(updates), split(params)
        axes = stacked(p_layers)
        layers, l_state = jax.vmap(tx.update, (0, axes, 0), (0, axes))(layers, state.layers, p_layers)
        others, o_state = tx.update(others, state.others, p_others)
        return typing.cast(Any, layers) | others, PerLayer(l_state, o_state)

    return optax.GradientTransformation(init, update)


def _matrix(path: Any, x: Any) -> optax.contrib.MuonDimensionNumbers | None:
    """Returns the input and output axes of a stack of matrices; None for anything but layers' matrices.

    Heads and their dimensions count as one axis: D is one side of every matrix, all else the other.
    """
    name, last = path[-1].key, x.ndim - 1
    if path[0].key != "layers" or is_vector(name):
        return None
    if LAYER_AXES[name][0] == "E":  # a stack of matrices of its own
        return optax.contrib.MuonDimensionNumbers(2, 3)
    if LAYER_AXES[name][0] == "D":
        return optax.contrib.MuonDimensionNumbers(1, tuple(range(2, last + 1)))
    return optax.contrib.MuonDimensionNumbers(tuple(range(1, last)), last)


def _muon(cfg: OptimizerConfig, mesh: Mesh | None) -> optax.GradientTransformation:
    """Muon for the layers' matrices, each gathered in full on one device; Adam for all else.

    Sharded as they are stored, a product of a matrix with itself would be all-reduced over all devices, five times.
    Updates are scaled to the size of Adam's (arXiv 2502.16982), so that one learning rate serves both.
    """

    def matrices(params: Any) -> Any:
        return jax.tree.map_with_path(_matrix, params)

    def labels(params: Any) -> Any:
        return jax.tree.map_with_path(lambda path, x: "muon" if _matrix(path, x) else "adam", params)

    muon = optax.contrib.muon(1.0, beta=cfg.b1, eps=cfg.eps, consistent_rms=0.2, muon_weight_dimension_numbers=matrices)
    both = optax.partition(  # optax.contrib.muon's own Adam differs: it has Nesterov momentum
        {"muon": optax.chain(muon, optax.scale(-1.0)), "adam": optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps)}, labels
    )
    if mesh is None or mesh.size == 1:
        return both

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = both.update(whole_layers(updates, mesh), whole_layers(state, mesh), params)
        updates, state = whole_layers(updates, mesh), whole_layers(state, mesh)
        return layers_at_rest(updates, mesh), layers_at_rest(state, mesh)

    return optax.GradientTransformation(both.init, update)


# config.optimizer.name -> the update direction at learning rate 1, without weight decay
DIRECTIONS: dict[str, Callable[[OptimizerConfig, Mesh | None], optax.GradientTransformation]] = {
    "adamw": lambda cfg, mesh: optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps),
    # No momentum and no scaling by the weights' size: its steps are as large as Adam's.
    "adafactor": lambda cfg, mesh: _per_layer(optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))),
    "lion": lambda cfg, mesh: optax.scale_by_lion(cfg.b1, cfg.b2),
    "muon": _muon,
}


def make_optimizer(
    cfg: OptimizerConfig,
    steps: int,
    policy: Precision,
    *,
    seed: int = 0,
    mesh: Mesh | None = None,
    rewarm: Rewarm = NONE,
) -> optax.GradientTransformation:
    """Clipping, the named optimiser, weight decay and schedule, for the parameters that train.

    Args:
      cfg: the optimiser's group of the config.
      steps: of the run, which the schedule spans.
      policy: dtypes of weights and moments.
      seed: of stochastic rounding.
      mesh: of the step; None, or any, where only the state's shapes are needed.
      rewarm: where the learning rate rises again.

    Raises:
      UserError: no such optimiser or schedule.
    """
    if cfg.name not in DIRECTIONS:
        raise UserError(f"config.optimizer.name must be one of {', '.join(DIRECTIONS)}, found {cfg.name!r}.")
    clip: Any = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
    step = optax.chain(
        DIRECTIONS[cfg.name](cfg, mesh),
        optax.add_decayed_weights(cfg.weight_decay, _decayed),
        optax.scale_by_learning_rate(learning_rate(cfg, steps, rewarm)),
    )
    # The two identities keep the state's tree compatible with checkpoints of versions that masked there.
    return narrow(optax.chain(optax.identity(), clip, step, optax.identity()), policy, seed)

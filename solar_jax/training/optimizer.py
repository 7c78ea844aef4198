"""Optimisers as a table, with clipping, a schedule, decay, and a mask of what may move; the maths is all optax's."""

import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.sharding import Mesh

from solar_jax.config import Config, OptimizerConfig
from solar_jax.errors import UserError
from solar_jax.growth.operators import LayerMap
from solar_jax.model.llama import LAYER_AXES, Params, is_vector
from solar_jax.model.precision import precision
from solar_jax.parallel.collectives import layers_at_rest, whole_layers
from solar_jax.training.stochastic_rounding import narrow


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
TRAINABLE: dict[str, Callable[[LayerMap], tuple[tuple[bool, ...], dict[str, bool]]]] = {
    "all": lambda layer_map: ((True,) * layer_map.layers, {"embed": True, "final_norm": True, "lm_head": True}),
    "new": lambda layer_map: (layer_map.new, {"embed": False, "final_norm": False, "lm_head": False}),
    "seam": lambda layer_map: (
        tuple(i in layer_map.seams or i - 1 in layer_map.seams for i in range(layer_map.layers)),
        {"embed": False, "final_norm": False, "lm_head": False},
    ),
    "no_embed": lambda layer_map: ((True,) * layer_map.layers, {"embed": False, "final_norm": True, "lm_head": False}),
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


def trainable_layers(name: str, layer_map: LayerMap) -> tuple[tuple[bool, ...], dict[str, bool]]:
    """Which layers and which other arrays `config.train.trainable` lets move.

    Raises:
      UserError: no such choice, or one that leaves nothing to train.
    """
    if name not in TRAINABLE:
        raise UserError(f"config.train.trainable must be one of {', '.join(TRAINABLE)}, found {name!r}.")
    layers, others = TRAINABLE[name](layer_map)
    if not any(layers):
        raise UserError(
            f"config.train.trainable={name!r} leaves nothing to train: {layer_map.operator} has no such layer."
        )
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


class PerLayer(typing.NamedTuple):
    """State of `_per_layer`."""

    layers: Any  # arrays stacked over L; scalars are one for all layers
    others: Any


def _per_layer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` for every layer by itself: what it takes of an array's whole, such as a norm, is a layer's."""

    def split(tree: Any) -> tuple[Any, Any]:
        return {"layers": tree["layers"]}, {name: x for name, x in tree.items() if name != "layers"}

    def stacked(layers: Params) -> Any:
        """0 for what has an axis L, None for scalars."""
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
    """Which axes of a stack of matrices are a matrix's input and output; None for what is no layer's matrix.

    Heads and their dimensions are one axis: D is on one side of every matrix, all else on the other.
    """
    name, last = path[-1].key, x.ndim - 1
    if path[0].key != "layers" or is_vector(name):
        return None
    if LAYER_AXES[name][0] == "D":
        return optax.contrib.MuonDimensionNumbers(1, tuple(range(2, last + 1)))
    return optax.contrib.MuonDimensionNumbers(tuple(range(1, last)), last)


def _muon(cfg: OptimizerConfig, mesh: Mesh | None) -> optax.GradientTransformation:
    """Muon for the layers' matrices, each with all of it on one device; Adam for all else.

    Split over devices as they rest, a product of a matrix with itself would be summed over all of them, five times.
    Updates are scaled to the size of Adam's (arXiv 2502.16982), so that one learning rate serves both.
    """

    def matrices(params: Any) -> Any:
        return jax.tree.map_with_path(_matrix, params)

    def labels(params: Any) -> Any:
        return jax.tree.map_with_path(lambda path, x: "muon" if _matrix(path, x) else "adam", params)

    muon = optax.contrib.muon(1.0, beta=cfg.b1, eps=cfg.eps, consistent_rms=0.2, muon_weight_dimension_numbers=matrices)
    both = optax.partition(  # muon's own Adam is another one, with Nesterov's momentum
        {"muon": optax.chain(muon, optax.scale(-1.0)), "adam": optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps)}, labels
    )
    if mesh is None or mesh.size == 1:
        return both

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = both.update(whole_layers(updates, mesh), whole_layers(state, mesh), params)
        updates, state = whole_layers(updates, mesh), whole_layers(state, mesh)
        return layers_at_rest(updates, mesh), layers_at_rest(state, mesh)

    return optax.GradientTransformation(both.init, update)


# config.optimizer.name -> what a step of learning rate 1 goes along, but for the decay
DIRECTIONS: dict[str, Callable[[OptimizerConfig, Mesh | None], optax.GradientTransformation]] = {
    "adamw": lambda cfg, mesh: optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps),
    # Without momentum and without scaling by the weights' size: its steps are as large as Adam's.
    "adafactor": lambda cfg, mesh: _per_layer(optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))),
    "lion": lambda cfg, mesh: optax.scale_by_lion(cfg.b1, cfg.b2),
    "muon": _muon,
}


def make_optimizer(
    config: Config, mask: Params | None = None, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    """Clipping, the named optimiser, decay and schedule; where `mask` is 0 none of them moves a weight.

    Frozen gradients are dropped before the norm is taken, so that clipping sees what moves.

    Args:
      config: of the run.
      mask: as `trainable_mask` gives it; everything moves if None.
      mesh: of the step; None, or any, where only the state's shapes are asked for.

    Raises:
      UserError: no such optimiser or schedule.
    """
    cfg = config.optimizer
    if cfg.name not in DIRECTIONS:
        raise UserError(f"config.optimizer.name must be one of {', '.join(DIRECTIONS)}, found {cfg.name!r}.")
    clip: Any = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
    step = optax.chain(
        DIRECTIONS[cfg.name](cfg, mesh),
        optax.add_decayed_weights(cfg.weight_decay, _decayed),
        optax.scale_by_learning_rate(learning_rate(cfg, config.train.steps)),
    )
    return narrow(optax.chain(_masked(mask), clip, step, _masked(mask)), precision(config.train), config.seed)

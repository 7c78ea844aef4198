"""Growth in a run: phases of training between growth steps, and the optimiser state of the grown model."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from solar_jax.config import Config
from solar_jax.errors import UserError
from solar_jax.growth.apply import SCALED, SCALED_NORMS, grow
from solar_jax.growth.operators import LayerMap, composed, identity, operator_map
from solar_jax.orbax_store.checksums import name_of
from solar_jax.training.partition import Partition

_FIRST, _SECOND = ("mu",), ("nu", "v", "v_row", "v_col")  # fields of optax's states: moments of the gradient


def _scaled(x: jax.Array, power: int, factors: np.ndarray, new: np.ndarray, branch: bool) -> jax.Array:
    # Within a branch whose output is scaled by s, gradients are s times the source's, so moments are s and s^2 times.
    if not power or not branch:
        return x
    return x * (factors**power).reshape(-1, *(1,) * (x.ndim - 1)).astype(x.dtype)


def _zero(x: jax.Array, power: int, factors: np.ndarray, new: np.ndarray, branch: bool) -> jax.Array:
    return jnp.where(new.reshape(-1, *(1,) * (x.ndim - 1)), jnp.zeros_like(x), x) if power else x


# config.growth.state -> (moment [L, ...] that was gathered from the sources, its power of the gradient, [L] scales of
# the layers, [L] which are new, whether the array lies within a scaled branch) -> the grown model's moment.
# "reset" begins a new state for all layers.
STATES: dict[str, Callable[[jax.Array, int, np.ndarray, np.ndarray, bool], jax.Array] | None] = {
    "copied": lambda x, power, factors, new, branch: x,
    "scaled": _scaled,
    "zero": _zero,
    "reset": None,
}


@dataclasses.dataclass(frozen=True)
class Phase:
    """Steps of a run that train one depth."""

    first: int  # steps taken before it
    last: int  # steps taken after it
    growth: LayerMap  # from the phase before it
    total: LayerMap  # from the base


def make_phases(base_layers: int, config: Config) -> list[Phase]:
    """The phases of a run; one if it grows before its first step.

    Raises:
      UserError: an operator that cannot be applied in a run.
    """
    growth, last = config.growth, config.train.steps
    if growth.state not in STATES:
        raise UserError(f"config.growth.state must be one of {', '.join(STATES)}, found {growth.state!r}.")
    if not growth.steps:
        one = operator_map(base_layers, growth)
        return [Phase(0, last, one, one)]
    if config.lora.rank:
        raise UserError(f"config.growth.at_step={growth.at_step} needs config.lora.rank=0, found {config.lora.rank}.")
    total = identity(base_layers)
    phases = [Phase(0, growth.steps[0], total, total)]
    for first, then in zip(growth.steps, (*growth.steps[1:], last), strict=True):
        step = operator_map(total.layers, growth)
        if any(step.noise) or step.mix != "mean" or step.tied:
            raise UserError(
                f"config.growth.at_step={growth.at_step} needs an operator of copies, scales and means, found "
                f"{step.operator}."
            )
        total = composed(total, step)
        phases.append(Phase(first, then, step, total))
    return phases


def grown_state(
    state: dict[str, Any], abstract: dict[str, Any], phase: Phase, kind: str, post_norm: bool, partition: Partition,
    optimizer: optax.GradientTransformation,
) -> dict[str, Any]:  # fmt: skip
    """Grows parameters and optimiser state, sharded as `abstract` says.

    Args:
      state: {"params", "opt_state"} of the phase before, in which all layers trained.
      abstract: shapes, dtypes and shardings of the grown state.
      phase: the phase that begins.
      kind: a name of `STATES`.
      post_norm: whether the architecture scales norms instead of projections.
      partition: what trains from now on.
      optimizer: of the grown model.
    """
    shardings = jax.tree.map(lambda s: s.sharding, abstract)

    def make(state: dict[str, Any]) -> dict[str, Any]:
        params, change = grow(state["params"], phase.growth), STATES[kind]
        if change is None:
            opt_state = _with_step_counts(optimizer.init(partition.trained(params)), state["opt_state"])
        else:
            opt_state = _gathered(state["opt_state"], abstract["opt_state"], phase.growth, partition, change, post_norm)
        return {"params": params, "opt_state": opt_state}

    return jax.jit(make, out_shardings=shardings)(state)


def _gathered(
    before: Any, wanted: Any, growth: LayerMap, partition: Partition, change: Callable[..., jax.Array], post_norm: bool
) -> Any:
    """Gathers an optimiser state over the layer axis of those layers that train."""
    trained = np.flatnonzero(partition.layers)
    source = np.asarray(growth.source)[trained]
    factors, new = np.asarray(growth.scale, np.float32)[trained], np.asarray(growth.new)[trained]
    by_path = {name_of(path): x for path, x in jax.tree.leaves_with_path(before)}
    ends = SCALED_NORMS if post_norm else SCALED

    def one(path: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
        name = name_of(path)
        x = by_path[name]
        parts = name.split("/")
        if "layers" not in parts or x.shape[:1] != (growth.base_layers,):
            return x
        power = next((p for p, names in ((1, _FIRST), (2, _SECOND)) if set(names) & set(parts)), 0)
        return change(x[source], power, factors, new, parts[-1] not in ends).astype(like.dtype)

    return jax.tree.map_with_path(one, wanted)


def _with_step_counts(fresh: Any, before: Any) -> Any:
    """A new optimiser state whose schedule goes on where the one before it stands."""

    def is_count(x: Any) -> bool:
        return isinstance(x, optax.ScaleByScheduleState)

    counts = iter([x for x in jax.tree.leaves(before, is_leaf=is_count) if is_count(x)])
    return jax.tree.map(lambda x: next(counts) if is_count(x) else x, fresh, is_leaf=is_count)

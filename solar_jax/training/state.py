"""The training state: parameters and the optimiser state of those that train, with their shapes and shardings."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, Mesh

from solar_jax.config import ModelConfig
from solar_jax.model.shapes import Params, param_shapes
from solar_jax.orbax_store.checksums import name_of
from solar_jax.parallel import rules
from solar_jax.training.partition import Partition, everything
from solar_jax.training.stochastic_rounding import as_kept, as_wanted

State = dict[str, Any]  # {"params", "opt_state"}


def state_shardings(
    cfg: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh | AbstractMesh,
    partition: Partition | None = None,
) -> State:  # fmt: skip
    """Shardings of parameters and optimiser state: every moment has its parameter's."""
    partition = partition or everything(cfg)
    opt_state = jax.eval_shape(optimizer.init, partition.shapes(cfg))
    return {
        "params": model_shardings(cfg, mesh, partition),
        "opt_state": rules.like_parameters(opt_state, partition.config(cfg), mesh, partition.lora),
    }


def model_shardings(cfg: ModelConfig, mesh: Mesh | AbstractMesh, partition: Partition) -> Params:
    """Shardings of the model's parameters, and of the adapter that trains in their place."""
    found = rules.parameter_shardings(cfg, mesh)
    return found if partition.lora is None else found | {"lora": rules.adapter_shardings(partition.lora, mesh)}


def abstract_state(
    cfg: ModelConfig, weights: str, optimizer: optax.GradientTransformation, shardings: State,
    partition: Partition | None = None, base: str = "",
) -> State:  # fmt: skip
    """Shapes, dtypes and shardings of the state, nothing allocated.

    Args:
      cfg: the model.
      weights: the dtype of trained matrices.
      optimizer: of the trained part.
      shardings: from `state_shardings`.
      partition: what trains; everything if None.
      base: the dtype of the model's matrices where only adapters train, see `Partition.base_dtype`.
    """
    partition = partition or everything(cfg)
    trained = partition.shapes(cfg, weights)
    params = param_shapes(cfg, weights) if partition.lora is None else param_shapes(cfg, base or weights) | trained
    shapes = {"params": params, "opt_state": jax.eval_shape(optimizer.init, trained)}
    return jax.tree.map(lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), shapes, shardings)


def first_opt_state(
    optimizer: optax.GradientTransformation, partition: Partition, params: Params, shardings: Any
) -> Any:
    """The optimiser's state before the first step, created sharded."""
    return jax.jit(lambda params: optimizer.init(partition.trained(params)), out_shardings=shardings)(params)


def stored_form(
    wanted: Any, cfg: ModelConfig, weights: str, optimizer: optax.GradientTransformation, mesh: Mesh,
    partition: Partition, stored: Mapping[str, tuple[int, ...]],
) -> tuple[Any, Callable[[Any, int], Any]]:  # fmt: skip
    """The form in which a checkpoint holds the optimiser state: of another precision policy, or of an older version.

    Older versions masked gradients and kept state for every parameter, whatever trained.

    Args:
      wanted: the abstract optimiser state of this run.
      cfg, weights, optimizer, mesh, partition: of this run.
      stored: the shapes of the checkpoint's optimiser arrays by path.

    Returns:
      The abstract state to restore, and a function of the restored state and the steps taken that gives `wanted`.
    """
    narrow = any(path.startswith("inner/") for path in stored)
    parted = as_kept(wanted, narrow)
    names = [name_of(path) for path, _ in jax.tree.leaves_with_path(parted)]
    fits = all(stored.get(name, s.shape) == s.shape for name, s in zip(names, jax.tree.leaves(parted), strict=True))
    if fits or partition.lora is not None:
        return parted, lambda found, step: as_wanted(found, wanted, step)
    whole = abstract_state(cfg, weights, optimizer, state_shardings(cfg, optimizer, mesh))["opt_state"]

    def cut(found: Any, step: int) -> Any:
        by_path = {name_of(path): x for path, x in jax.tree.leaves_with_path(found)}

        def one(path: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
            return jax.jit(partition.follow, static_argnums=1, out_shardings=like.sharding)(
                by_path[name_of(path)], like
            )

        return as_wanted(jax.tree.map_with_path(one, parted), wanted, step)

    return as_kept(whole, narrow), cut

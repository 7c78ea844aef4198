"""What moves between devices within a step, as constraints and reshapes that XLA turns into collectives."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from solar_jax.model.attention import chunk_order
from solar_jax.model.llama import LAYER_AXES, Params, is_vector
from solar_jax.parallel.mesh import axis_size, fsdp_stages, platform
from solar_jax.parallel.rules import ACTIVATIONS, BATCH_AXES, FSDP, PARAMETERS, TOKENS, MeshAxes, spec

Arrays = dict[str, jax.Array]
ROW_MAJOR, SAVED = Layout(major_to_minor=(0, 1, 2)), ("BTD", "BTF")


def whole_layers(tree: Any, mesh: Mesh) -> Any:
    """Lays out a tree that holds copies of the layers' tree so that a device has all of some layers' matrices.

    For what needs a whole matrix, layer by layer. L need not divide over the devices. What is outside the layers, and
    their vectors, stay as they are.
    """
    over = tuple(dict.fromkeys(a for e in PARAMETERS.values() for a in ((e,) if isinstance(e, str) else e or ())))
    sharding = NamedSharding(mesh, PartitionSpec(over))

    def one(path: Any, x: jax.Array) -> jax.Array:
        matrix = _in_layers(path) and not is_vector(path[-1].key)
        return jax.lax.with_sharding_constraint(x, sharding) if matrix else x

    return jax.tree.map_with_path(one, tree)


def layers_at_rest(tree: Any, mesh: Mesh) -> Any:
    """Undoes `whole_layers`: every array of the layers lies as its parameter."""

    def one(path: Any, x: jax.Array) -> jax.Array:
        if not _in_layers(path):
            return x
        sharding = NamedSharding(mesh, spec("L" + LAYER_AXES[path[-1].key], PARAMETERS))
        return jax.lax.with_sharding_constraint(x, sharding)

    return jax.tree.map_with_path(one, tree)


def _in_layers(path: Any) -> bool:
    """Whether a path ends as that of one of the layers' parameters."""
    return [getattr(key, "key", None) for key in path[-2:-1]] == ["layers"] and path[-1].key in LAYER_AXES


def constrain_on(mesh: Mesh, activations: dict[str, MeshAxes] = ACTIVATIONS) -> Callable[[jax.Array, str], jax.Array]:
    """A `model.llama.Constrain` that lays activations and gathered parameters out on `mesh`."""

    def one(x: jax.Array, letters: str) -> jax.Array:
        if "B" not in letters and "." not in letters:
            return gathered(x, letters)
        x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(letters, activations)))
        # Left to itself XLA may write what is saved for the backward pass in another order than that reads it in, and
        # then copies it layer by layer.
        return with_layout_constraint(x, ROW_MAJOR) if letters in SAVED and platform(mesh) == "tpu" else x

    stages = fsdp_stages(mesh)
    names = tuple(f"fsdp{i}" for i in range(len(stages)))
    shape = (mesh.shape["slice"], mesh.shape["data"], *stages, mesh.shape["tensor"])
    axis_names = ("slice", "data", *names, "tensor")
    staged = Mesh(mesh.devices.reshape(shape), axis_names, axis_types=(AxisType.Auto,) * len(shape))

    def split(x: jax.Array, letters: str, over: int) -> jax.Array:
        """A parameter split over the outermost `over` stages of FSDP, as it rests otherwise."""
        entries = ((names[:over] or None) if PARAMETERS[a] == FSDP else PARAMETERS[a] for a in letters)
        return jax.lax.with_sharding_constraint(x, NamedSharding(staged, PartitionSpec(*entries)))

    # The transpose of a constraint is the same constraint, which here would sum every gradient whole on every device
    # before it is cut: an all-reduce where a reduce-scatter does.
    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def gathered(x: jax.Array, letters: str) -> jax.Array:
        for over in reversed(range(len(stages))):
            x = split(x, letters, over)
        return x

    def forward(x: jax.Array, letters: str) -> tuple[jax.Array, None]:
        return gathered(x, letters), None

    def backward(letters: str, _: None, g: jax.Array) -> tuple[jax.Array]:
        for over in range(len(stages)):
            g = split(g, letters, over + 1)
        return (g,)

    gathered.defvjp(forward, backward)
    return one


def over_slices(mesh: Mesh, function: Callable[[Params, Arrays], Any]) -> Callable[[Params, Arrays], Any]:
    """The sum over slices of what `function` gives of (params, a slice's rows), as of (params, all rows).

    The slices' results lie on an axis of their own until they are summed, so that nothing within `function` waits for
    another slice, and what crosses from slice to slice is its result, once, split as it is within a slice.
    """
    slices = mesh.shape["slice"]
    if slices == 1:
        return function
    rows = NamedSharding(mesh, PartitionSpec(*BATCH_AXES[:1], BATCH_AXES[1:]))

    def summed(params: Params, batch: Arrays) -> Any:
        parts = jax.tree.map(lambda x: x.reshape(slices, -1, *x.shape[1:]), batch)
        parts = jax.lax.with_sharding_constraint(parts, rows)
        results = jax.vmap(function, in_axes=(None, 0), spmd_axis_name="slice")(params, parts)
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), results)

    return summed


def tokens_of_devices(mesh: Mesh, x: jax.Array) -> jax.Array:
    """[B, T, ...] -> [B * context, T / context, ...], laid out by `TOKENS`: nothing moves, each device has its own."""
    context = mesh.shape["context"]
    if context == 1:
        return x
    groups = axis_size(mesh, *BATCH_AXES[1:])
    B, T = x.shape[:2]
    x = x.reshape(groups, B // groups, context, T // context, *x.shape[2:]).swapaxes(1, 2)
    x = x.reshape(B * context, T // context, *x.shape[4:])
    return constrain_on(mesh, TOKENS)(x, "BTD"[: x.ndim])


def zigzag(mesh: Mesh, batch: Arrays) -> Arrays:
    """Rows [B, T] with their tokens in the order in which `Shard`s have them, split over context."""
    count = mesh.shape["context"]
    if count == 1:
        return batch

    def one(x: jax.Array) -> jax.Array:
        chunks = x.reshape(x.shape[0], 2 * count, -1)[:, np.array(chunk_order(count))]
        return constrain_on(mesh)(chunks.reshape(x.shape), "BT")

    return jax.tree.map(one, batch)

"""Data movement within a step, as sharding constraints and reshapes that XLA turns into collectives."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from solar_jax.model.attention import chunk_order
from solar_jax.model.shapes import LAYER_AXES, Params, is_vector
from solar_jax.parallel.mesh import axis_size, fsdp_stages, platform
from solar_jax.parallel.rules import (
    ACTIVATIONS,
    BATCH_AXES,
    EXPERTS,
    FSDP,
    PARAMETERS,
    TOKENS,
    MeshAxes,
    spec,
    table_of,
)

Arrays = dict[str, jax.Array]
ROW_MAJOR, SAVED = Layout(major_to_minor=(0, 1, 2)), ("BTD", "BTF")


def whole_layers(tree: Any, mesh: Mesh) -> Any:
    """Reshards a tree containing copies of the layer tree along L, so each device has full matrices of some layers.

    Used where full matrices are needed, layer by layer. L need not be divisible by the devices. Vectors and everything
    outside the layers are left as they are.
    """
    over = tuple(dict.fromkeys(a for e in PARAMETERS.values() for a in ((e,) if isinstance(e, str) else e or ())))
    sharding = NamedSharding(mesh, PartitionSpec(over))

    def one(path: Any, x: jax.Array) -> jax.Array:
        matrix = _in_layers(path) and not is_vector(path[-1].key)
        return jax.lax.with_sharding_constraint(x, sharding) if matrix else x

    return jax.tree.map_with_path(one, tree)


def layers_at_rest(tree: Any, mesh: Mesh) -> Any:
    """Undoes `whole_layers`: shards every array of the layers like its parameter."""

    def one(path: Any, x: jax.Array) -> jax.Array:
        if not _in_layers(path):
            return x
        letters = LAYER_AXES[path[-1].key]
        sharding = NamedSharding(mesh, spec("L" + letters, table_of(letters)))
        return jax.lax.with_sharding_constraint(x, sharding)

    return jax.tree.map_with_path(one, tree)


def _in_layers(path: Any) -> bool:
    """Returns whether a path ends like the path of a layer parameter."""
    return [getattr(key, "key", None) for key in path[-2:-1]] == ["layers"] and path[-1].key in LAYER_AXES


def constrain_on(
    mesh: Mesh, activations: dict[str, MeshAxes] = ACTIVATIONS, *, gather_experts: bool = True
) -> Callable[[jax.Array, str], jax.Array]:
    """Returns a `model.llama.Constrain` that lays out activations and gathered parameters on `mesh`.

    Where `expert_dispatch` is used, it takes experts' weights as they are at rest: without `gather_experts`.
    """

    def one(x: Any, letters: Any) -> Any:
        if isinstance(letters, tuple):
            if len(letters) > 1 and mesh.shape["tensor"] == 1 and math.prod(stages) > 1:  # heads are not sharded
                return gathered_as_one(x, letters)
            return tuple(gathered(*its) for its in zip(x, letters, strict=True))
        if "B" not in letters and "." not in letters:
            return gathered(x, letters)
        x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(letters, activations)))
        # Otherwise XLA may save residuals in another layout than the backward pass reads, and then copy them layer
        # by layer.
        return with_layout_constraint(x, ROW_MAJOR) if letters in SAVED and platform(mesh) == "tpu" else x

    stages = fsdp_stages(mesh)
    names = tuple(f"fsdp{i}" for i in range(len(stages)))
    shape = (mesh.shape["slice"], mesh.shape["data"], *stages, mesh.shape["tensor"])
    axis_names = ("slice", "data", *names, "tensor")
    staged = Mesh(mesh.devices.reshape(shape), axis_names, axis_types=(AxisType.Auto,) * len(shape))

    def split(x: jax.Array, letters: str, over: int) -> jax.Array:
        """Shards a parameter over the outermost `over` FSDP stages; other axes as at rest."""
        if table_of(letters) is EXPERTS:  # in one stage: experts stay on their devices
            table = EXPERTS if over or not gather_experts else EXPERTS | {"D": None}
            return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(letters, table)))
        entries = ((names[:over] or None) if PARAMETERS[a] == FSDP else PARAMETERS[a] for a in letters)
        return jax.lax.with_sharding_constraint(x, NamedSharding(staged, PartitionSpec(*entries)))

    # The transpose of a constraint is the same constraint, which here would sum every full gradient on every device
    # before slicing it: an all-reduce where a reduce-scatter suffices.
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

    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def gathered_as_one(arrays: tuple[jax.Array, ...], letters: tuple[str, ...]) -> tuple[jax.Array, ...]:
        """Gathers attention's weights as one array; their gradients are scattered one by one.

        Alone, TPUs would all-reduce the smaller ones as zero-padded shards, and reorder the gathered `o_proj` in HBM.
        """
        parts = [jnp.einsum(f"{its}->{_heads_first(its)}", x) for x, its in zip(arrays, letters, strict=True)]
        whole = gathered(jnp.concatenate(parts), "NDH")
        whole = with_layout_constraint(whole, ROW_MAJOR) if platform(mesh) == "tpu" else whole
        found = jnp.split(whole, np.cumsum([len(x) for x in parts[:-1]]).tolist())
        return tuple(jnp.einsum(f"{_heads_first(its)}->{its}", x) for x, its in zip(found, letters, strict=True))

    def joint_forward(arrays: tuple[jax.Array, ...], letters: tuple[str, ...]) -> tuple[Any, None]:
        return gathered_as_one(arrays, letters), None

    def joint_backward(letters: tuple[str, ...], _: None, gradients: tuple[jax.Array, ...]) -> tuple[Any]:
        return (tuple(backward(its, None, g)[0] for its, g in zip(letters, gradients, strict=True)),)

    gathered_as_one.defvjp(joint_forward, joint_backward)
    return one


def _heads_first(letters: str) -> str:
    """Returns axes with heads in front: "DNH" or "NHD" -> "NDH"."""
    heads, width = letters.replace("D", "")
    return f"{heads}D{width}"


def over_slices(mesh: Mesh, function: Callable[[Params, Arrays], Any]) -> Callable[[Params, Arrays], Any]:
    """Makes `function`, called with (params, all rows), run per slice on (params, slice's rows) and sum the results.

    The slices' results stay on an axis of their own until they are summed, so that nothing inside `function` waits for
    another slice, and only its result crosses DCN, once, sharded as within a slice.
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
    """[B, T, ...] -> [B * context, T / context, ...], laid out by `TOKENS`: each device keeps its own tokens."""
    context = mesh.shape["context"]
    if context == 1:
        return x
    groups = axis_size(mesh, *BATCH_AXES[1:])
    B, T = x.shape[:2]
    x = x.reshape(groups, B // groups, context, T // context, *x.shape[2:]).swapaxes(1, 2)
    x = x.reshape(B * context, T // context, *x.shape[4:])
    return constrain_on(mesh, TOKENS)(x, "BTD"[: x.ndim])


def zigzag(mesh: Mesh, batch: Arrays) -> Arrays:
    """Reorders the tokens of rows [B, T] into the zigzag order of `Shard` and splits them over context."""
    count = mesh.shape["context"]
    if count == 1:
        return batch

    def one(x: jax.Array) -> jax.Array:
        chunks = x.reshape(x.shape[0], 2 * count, -1)[:, np.array(chunk_order(count))]
        return constrain_on(mesh)(chunks.reshape(x.shape), "BT")

    return jax.tree.map(one, batch)

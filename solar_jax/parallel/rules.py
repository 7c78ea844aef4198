"""Sharding as two tables of axis letters: where parameters rest, and how activations are laid out.

Parameters, and optimiser state with them, are split over fsdp on D and over tensor on heads, mlp and vocabulary.
Activations are split over their batch, and over tensor where a weight made them so.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from solar_jax.config import ModelConfig
from solar_jax.errors import UserError
from solar_jax.model.attention import Attend
from solar_jax.model.llama import Params, axes, sizes
from solar_jax.parallel.mesh import fsdp_stages, platform

MeshAxes = str | tuple[str, ...] | None

PARAMETERS: dict[str, MeshAxes] = {
    "L": None, "V": "tensor", "D": "fsdp", "F": "tensor", "N": "tensor", "K": "tensor", "H": None,
}  # fmt: skip
ACTIVATIONS: dict[str, MeshAxes] = {
    "B": ("data", "fsdp"), "T": None, "D": None, "F": "tensor", "N": "tensor", "K": "tensor", "H": None,
    "V": "tensor", ".": None,
}  # fmt: skip
BATCH_AXES = ("data", "fsdp")
ROW_MAJOR, SAVED = Layout(major_to_minor=(0, 1, 2)), ("BTD", "BTF")

_KEY = {
    "V": "vocab_size", "D": "hidden_size", "F": "intermediate_size", "N": "num_attention_heads",
    "K": "num_key_value_heads",
}  # fmt: skip


def spec(letters: str, table: dict[str, MeshAxes]) -> PartitionSpec:
    """The table's mesh axes of each letter.

    Raises:
      ValueError: a letter that the table lacks, or a mesh axis that would split two axes of one array.
    """
    for letter in letters:
        if letter not in table:
            raise ValueError(f"axis {letter!r} of an array {letters!r} is in no sharding rule.")
    entries = [table[letter] for letter in letters]
    used = [a for e in entries for a in ((e,) if isinstance(e, str) else e or ())]
    if len(set(used)) != len(used):
        raise ValueError(f"an array {letters!r} would be split over one mesh axis twice: {entries}.")
    return PartitionSpec(*entries)


def parameter_shardings(cfg: ModelConfig, mesh: Mesh) -> Params:
    """The sharding of every array of the state.

    Raises:
      UserError: a mesh axis does not divide the axis that it splits.
    """
    size = sizes(cfg)
    for letter, axis in PARAMETERS.items():
        if isinstance(axis, str) and size[letter] % mesh.shape[axis]:
            raise UserError(
                f"config.mesh.{axis}={mesh.shape[axis]} does not divide the model's {_KEY[letter]}={size[letter]}."
            )
    return jax.tree.map(lambda letters: NamedSharding(mesh, spec(letters, PARAMETERS)), axes(cfg))


def like_parameters(tree: Any, cfg: ModelConfig, mesh: Mesh) -> Any:
    """Shardings for a tree that holds copies of the parameters' tree, as an optimiser's state does.

    A leaf follows the parameter whose path its own path ends with; scalars are replicated.

    Raises:
      ValueError: a leaf is neither.
    """
    by_path = {
        jax.tree_util.keystr(path): sharding
        for path, sharding in jax.tree.leaves_with_path(parameter_shardings(cfg, mesh))
    }

    def one(path: Any, leaf: Any) -> NamedSharding:
        for i in range(len(path)):
            if (key := jax.tree_util.keystr(path[i:])) in by_path:
                return by_path[key]
        if leaf.ndim == 0:
            return replicated(mesh)
        raise ValueError(f"{jax.tree_util.keystr(path)} of shape {leaf.shape} is in no sharding rule.")

    return jax.tree.map_with_path(one, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of [B, T]: rows split over the devices that do not share one row's work."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def padded_rows(rows: int, mesh: Mesh, microbatches: int = 1) -> int:
    """`rows` made up to what divides over the devices and microbatches; the added rows get weight 0."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"] * microbatches
    return -(-rows // ways) * ways


def constrain(mesh: Mesh) -> Callable[[jax.Array, str], jax.Array]:
    """A `model.llama.Constrain` that lays activations and gathered parameters out on `mesh`."""

    def one(x: jax.Array, letters: str) -> jax.Array:
        if "B" not in letters and "." not in letters:
            return gathered(x, letters)
        x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(letters, ACTIVATIONS)))
        # Left to itself XLA may write what is saved for the backward pass in another order than that reads it in, and
        # then copies it layer by layer.
        return with_layout_constraint(x, ROW_MAJOR) if letters in SAVED and platform(mesh) == "tpu" else x

    stages = fsdp_stages(mesh)
    names = tuple(f"fsdp{i}" for i in range(len(stages)))
    shape = (mesh.shape["data"], *stages, mesh.shape["tensor"])
    staged = Mesh(mesh.devices.reshape(shape), ("data", *names, "tensor"), axis_types=(AxisType.Auto,) * len(shape))

    def split(x: jax.Array, letters: str, over: int) -> jax.Array:
        """A parameter split over the outermost `over` stages of fsdp, as it rests otherwise."""
        entries = ((names[:over] or None) if PARAMETERS[a] == "fsdp" else PARAMETERS[a] for a in letters)
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


def attend(mesh: Mesh, kernel: Attend) -> Attend:
    """A kernel for the rows and heads of one device, run on each device's own."""
    q, k, angles, ids = (spec(letters, ACTIVATIONS) for letters in ("BTNH", "BTKH", "BTH", "BT"))
    # check_vma: kernels do not say over which axes their results vary.
    return jax.shard_map(kernel, mesh=mesh, in_specs=(q, k, k, angles, ids), out_specs=q, check_vma=False)

"""Sharding as tables of axis letters: where parameters rest, and how activations are laid out.

Parameters, and optimiser state with them, are split over fsdp and context on D and over tensor on heads, mlp and
vocabulary; every slice and every replica of `data` has them all. Activations are split over their batch, over context
on their tokens, and over tensor where a weight made them so.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from solar_jax.config import ModelConfig
from solar_jax.errors import UserError
from solar_jax.model.attention import Attend, Shard, chunk_order
from solar_jax.model.llama import LAYER_AXES, Params, axes, is_vector, sizes
from solar_jax.parallel.mesh import axis_size, fsdp_stages, platform

Arrays = dict[str, jax.Array]
MeshAxes = str | tuple[str, ...] | None

FSDP = ("fsdp", "context")
PARAMETERS: dict[str, MeshAxes] = {
    "L": None, "V": "tensor", "D": FSDP, "F": "tensor", "N": "tensor", "K": "tensor", "H": None,
}  # fmt: skip
# Of one slice: what crosses slices is only the sum of their gradients.
ACTIVATIONS: dict[str, MeshAxes] = {
    "B": ("data", "fsdp"), "T": "context", "D": None, "F": "tensor", "N": "tensor", "K": "tensor", "H": None,
    "V": "tensor", ".": None,
}  # fmt: skip
# Where it does not matter which tokens make a row, as in the loss: each device's are rows of its own.
TOKENS = ACTIVATIONS | {"B": ("data", "fsdp", "context"), "T": None}
BATCH_AXES = ("slice", "data", "fsdp")
ROW_MAJOR, SAVED = Layout(major_to_minor=(0, 1, 2)), ("BTD", "BTF")
_HANDFUL = 8  # numbers that need no splitting

_KEY = {
    "V": "vocab_size", "D": "hidden_size", "F": "intermediate_size", "N": "num_attention_heads",
    "K": "num_key_value_heads",
}  # fmt: skip


def _names(entry: MeshAxes) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()


def spec(letters: str, table: dict[str, MeshAxes]) -> PartitionSpec:
    """The table's mesh axes of each letter.

    Raises:
      ValueError: a letter that the table lacks, or a mesh axis that would split two axes of one array.
    """
    for letter in letters:
        if letter not in table:
            raise ValueError(f"axis {letter!r} of an array {letters!r} is in no sharding rule.")
    entries = [table[letter] for letter in letters]
    used = [a for e in entries for a in _names(e)]
    if len(set(used)) != len(used):
        raise ValueError(f"an array {letters!r} would be split over one mesh axis twice: {entries}.")
    return PartitionSpec(*entries)


def ways(letters: str, table: dict[str, MeshAxes], mesh: Mesh | AbstractMesh) -> int:
    """Over how many devices of a mesh the table splits an array of these axes."""
    return axis_size(mesh, *(axis for letter in letters for axis in _names(table[letter])))


def parameter_shardings(cfg: ModelConfig, mesh: Mesh | AbstractMesh) -> Params:
    """The sharding of every array of the state.

    Raises:
      UserError: a mesh axis does not divide the axis that it splits.
    """
    size = sizes(cfg)
    for letter, axes_of in PARAMETERS.items():
        over = [a for a in _names(axes_of) if mesh.shape[a] > 1]
        if size[letter] % axis_size(mesh, *over):
            written = " x ".join(f"{a}={mesh.shape[a]}" for a in over)
            raise UserError(f"config.mesh.{written} does not divide the model's {_KEY[letter]}={size[letter]}.")
    return jax.tree.map(lambda letters: NamedSharding(mesh, spec(letters, PARAMETERS)), axes(cfg))


def like_parameters(tree: Any, cfg: ModelConfig, mesh: Mesh | AbstractMesh) -> Any:
    """Shardings for a tree that holds copies of the parameters' tree, as an optimiser's state does.

    A leaf follows the parameter whose path its own path ends with, axis by axis where it lacks some of them; a
    handful of numbers that follow none, such as counts, are replicated.

    Raises:
      ValueError: a leaf is neither.
    """
    by_path = {jax.tree_util.keystr(path): letters for path, letters in jax.tree.leaves_with_path(axes(cfg))}
    parameter_shardings(cfg, mesh)  # for its refusals

    def one(path: Any, leaf: Any) -> NamedSharding:
        ends = [jax.tree_util.keystr(path[i:]) for i in range(len(path))]
        letters = next((by_path[end] for end in ends if end in by_path), None)
        entries = None if letters is None else _follow(leaf.shape, letters, sizes(cfg))
        if entries is None and leaf.size > _HANDFUL:
            raise ValueError(f"{jax.tree_util.keystr(path)} of shape {leaf.shape} is in no sharding rule.")
        return NamedSharding(mesh, PartitionSpec(*(entries or ())))

    return jax.tree.map_with_path(one, tree)


def _follow(shape: tuple[int, ...], letters: str, size: dict[str, int]) -> list[MeshAxes] | None:
    """The mesh axes of an array whose axes are some of a parameter's in their order, or of size 1; None: they are not.

    Of two axes of one size the first is taken, which changes where an array lies and not what it holds.
    """
    entries: list[MeshAxes] = []
    left = iter(letters)
    for n in shape:
        letter = None if n == 1 else next((a for a in left if size[a] == n), "")
        if letter == "":
            return None
        entries.append(PARAMETERS[letter] if letter else None)
    return entries


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


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of [B, T]: rows split over the devices that do not share one row's work; those that do have it whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def padded_rows(rows: int, mesh: Mesh | AbstractMesh, microbatches: int = 1) -> int:
    """`rows` made up to what divides over the devices and microbatches; the added rows get weight 0."""
    ways = axis_size(mesh, *BATCH_AXES) * max(1, microbatches)
    return -(-rows // ways) * ways


def constrain(mesh: Mesh, activations: dict[str, MeshAxes] = ACTIVATIONS) -> Callable[[jax.Array, str], jax.Array]:
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
    return constrain(mesh, TOKENS)(x, "BTD"[: x.ndim])


def attend(mesh: Mesh, kernel: Callable[..., jax.Array]) -> Attend:
    """A kernel for the rows, heads and queries of one device, run on each device's own.

    Segment ids are taken whole, [B, T] in the order of the text. Where a row is split, the kernel gets its `shard`.
    """
    q, k, angles, ids = (spec(letters, ACTIVATIONS) for letters in ("BTNH", "BTKH", "BTH", "B."))

    def local(
        q: jax.Array, k: jax.Array, v: jax.Array, rope: tuple[jax.Array, jax.Array], segment_ids: jax.Array | None
    ) -> jax.Array:
        split = {"shard": context_shard(mesh)} if mesh.shape["context"] > 1 else {}
        return kernel(q, k, v, rope, segment_ids, **split)

    # check_vma: kernels do not say over which axes their results vary.
    return jax.shard_map(local, mesh=mesh, in_specs=(q, k, k, angles, ids), out_specs=q, check_vma=False)


def context_shard(mesh: Mesh) -> Shard:
    """Within a `shard_map` over `mesh`: which tokens of its rows a device has."""
    gather = functools.partial(jax.lax.all_gather, axis_name="context")
    return Shard(mesh.shape["context"], jax.lax.axis_index("context"), gather)


def zigzag(mesh: Mesh, batch: Arrays) -> Arrays:
    """Rows [B, T] with their tokens in the order in which `Shard`s have them, split over context."""
    count = mesh.shape["context"]
    if count == 1:
        return batch

    def one(x: jax.Array) -> jax.Array:
        chunks = x.reshape(x.shape[0], 2 * count, -1)[:, np.array(chunk_order(count))]
        return constrain(mesh)(chunks.reshape(x.shape), "BT")

    return jax.tree.map(one, batch)

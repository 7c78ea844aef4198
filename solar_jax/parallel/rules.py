"""Sharding as tables of axis letters: where parameters rest, and how activations are laid out.

Parameters, and optimiser state with them, are split over fsdp and context on D and over tensor on heads, mlp and
vocabulary; every slice and every replica of `data` has them all. Activations are split over their batch, over context
on their tokens, and over tensor where a weight made them so.
"""

from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from solar_jax.config import ModelConfig
from solar_jax.errors import UserError
from solar_jax.model.llama import Params, axes, sizes
from solar_jax.parallel.mesh import axis_size

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


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of [B, T]: rows split over the devices that do not share one row's work; those that do have it whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def padded_rows(rows: int, mesh: Mesh | AbstractMesh, microbatches: int = 1) -> int:
    """`rows` made up to what divides over the devices and microbatches; the added rows get weight 0."""
    ways = axis_size(mesh, *BATCH_AXES) * max(1, microbatches)
    return -(-rows // ways) * ways

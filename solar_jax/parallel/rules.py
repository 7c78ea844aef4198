"""Sharding rules as tables of axis letters, for parameters at rest and for activations.

Parameters and optimiser state are sharded over fsdp and context on D, and over tensor on heads, MLP and vocabulary;
they are replicated over `slice` and `data`. Where tensor does not divide the vocabulary, embedding and head rest with D
over tensor too, and XLA pads the vocabulary while they are used. Activations are sharded over data and fsdp on the
batch, over context on tokens, and over tensor where a weight shards them.
"""

from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from solar_jax.config import LoraConfig, ModelConfig
from solar_jax.errors import UserError
from solar_jax.model.lora import adapter_axes
from solar_jax.model.shapes import Params, param_axes, sizes
from solar_jax.parallel.mesh import axis_size

MeshAxes = str | tuple[str, ...] | None

FSDP = ("fsdp", "expert", "context")
PARAMETERS: dict[str, MeshAxes] = {
    "L": None, "V": "tensor", "D": FSDP, "F": "tensor", "N": "tensor", "K": "tensor", "H": None,
    "R": None, "E": None,
}  # fmt: skip
# Experts' weights are never gathered over the axis that shards the experts themselves.
EXPERTS = PARAMETERS | {"E": "expert", "D": ("fsdp", "context")}
# Within one slice: only the gradient sum crosses slices.
ACTIVATIONS: dict[str, MeshAxes] = {
    "B": ("data", "fsdp", "expert"), "T": "context", "D": None, "F": "tensor", "N": "tensor", "K": "tensor", "H": None,
    "V": "tensor", "R": None, "E": None, ".": None,
}  # fmt: skip
# For uses that do not depend on row boundaries, such as the loss: each device's tokens form rows of their own.
TOKENS = ACTIVATIONS | {"B": ("data", "fsdp", "expert", "context"), "T": None}
BATCH_AXES = ("slice", "data", "fsdp", "expert")
_HANDFUL = 8  # elements; arrays up to this size need no sharding

_KEY = {
    "D": "hidden_size", "F": "intermediate_size", "N": "num_attention_heads",
    "K": "num_key_value_heads", "E": "num_local_experts",
}  # fmt: skip


def _names(entry: MeshAxes) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()


def spec(letters: str, table: dict[str, MeshAxes]) -> PartitionSpec:
    """Builds the PartitionSpec of an array with these axis letters.

    Raises:
      ValueError: a letter is not in the table, or one mesh axis would shard two axes of the array.
    """
    for letter in letters:
        if letter not in table:
            raise ValueError(f"axis {letter!r} of an array {letters!r} has no sharding rule.")
    entries = [table[letter] for letter in letters]
    used = [a for e in entries for a in _names(e)]
    if len(set(used)) != len(used):
        raise ValueError(f"an array {letters!r} would be sharded over one mesh axis twice: {entries}.")
    return PartitionSpec(*entries)


def ways(letters: str, table: dict[str, MeshAxes], mesh: Mesh | AbstractMesh) -> int:
    """Returns the number of shards into which the table splits an array with these axes."""
    return axis_size(mesh, *(axis for letter in letters for axis in _names(table[letter])))


def table_of(letters: str) -> dict[str, MeshAxes]:
    """Returns the table by which a parameter with these axes is sharded at rest."""
    return EXPERTS if "E" in letters and "F" in letters else PARAMETERS


def at_rest(letters: str, cfg: ModelConfig, mesh: Mesh | AbstractMesh) -> dict[str, MeshAxes]:
    """Returns the table by which a parameter with these axes is sharded at rest, where shards must be of equal size."""
    if "V" not in letters or cfg.vocab_size % mesh.shape["tensor"] == 0:
        return table_of(letters)
    over = (*FSDP, "tensor")
    return PARAMETERS | {"V": None, "D": FSDP if cfg.hidden_size % axis_size(mesh, *over) else over}


def parameter_shardings(cfg: ModelConfig, mesh: Mesh | AbstractMesh) -> Params:
    """Returns the sharding of every array of the state.

    Raises:
      UserError: a mesh axis does not divide the array axis that it shards.
    """
    size = sizes(cfg)
    for letter, axes_of in (PARAMETERS | {"E": "expert"}).items():
        if letter in "VR" or (letter == "E" and not cfg.num_local_experts):
            continue
        over = [a for a in _names(axes_of) if mesh.shape[a] > 1]
        if size[letter] % axis_size(mesh, *over):
            written = " x ".join(f"{a}={mesh.shape[a]}" for a in over)
            raise UserError(f"config.mesh.{written} does not divide the model's {_KEY[letter]}={size[letter]}.")
    return jax.tree.map(
        lambda letters: NamedSharding(mesh, spec(letters, at_rest(letters, cfg, mesh))), param_axes(cfg)
    )


def adapter_shardings(lora: LoraConfig, mesh: Mesh | AbstractMesh) -> Params:
    """Returns the sharding of every array of an adapter, whose axes are those of its projections."""
    return {
        name: NamedSharding(mesh, spec("L" + letters, PARAMETERS)) for name, letters in adapter_axes(lora).items()
    }  # fmt: skip


def like_parameters(tree: Any, cfg: ModelConfig, mesh: Mesh | AbstractMesh, lora: LoraConfig | None = None) -> Any:
    """Returns shardings for a tree that contains copies of the parameter tree, such as optimiser state.

    A leaf is sharded like the parameter whose path is a suffix of its own, axis by axis if it has only some of the
    axes; tiny arrays that match no parameter, such as counts, are replicated.

    Raises:
      ValueError: a leaf is neither.
    """
    axes, size = param_axes(cfg), sizes(cfg)
    if lora is not None:
        axes |= {"lora": {name: "L" + letters for name, letters in adapter_axes(lora).items()}}
        size |= {"R": lora.rank}
    by_path = {jax.tree_util.keystr(path): letters for path, letters in jax.tree.leaves_with_path(axes)}
    parameter_shardings(cfg, mesh)  # for its checks

    def one(path: Any, leaf: Any) -> NamedSharding:
        ends = [jax.tree_util.keystr(path[i:]) for i in range(len(path))]
        letters = next((by_path[end] for end in ends if end in by_path), None)
        table = PARAMETERS if letters is None else at_rest(letters, cfg, mesh)
        entries = None if letters is None else _follow(leaf.shape, letters, size, table)
        if entries is None and leaf.size > _HANDFUL:
            raise ValueError(f"{jax.tree_util.keystr(path)} of shape {leaf.shape} has no sharding rule.")
        return NamedSharding(mesh, PartitionSpec(*(entries or ())))

    return jax.tree.map_with_path(one, tree)


def _follow(
    shape: tuple[int, ...], letters: str, size: dict[str, int], table: dict[str, MeshAxes]
) -> list[MeshAxes] | None:
    """Returns mesh axes for an array whose axes are an ordered subset of a parameter's, or of size 1; otherwise None.

    Of two axes of equal size the first is taken, which affects only placement, not values.
    """
    entries: list[MeshAxes] = []
    left = iter(letters)
    for n in shape:
        letter = None if n == 1 else next((a for a in left if size[a] == n), "")
        if letter == "":
            return None
        entries.append(table[letter] if letter else None)
    return entries


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of [B, T]: rows split over `BATCH_AXES`; devices that share a row's work each hold it in full."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def padded_rows(rows: int, mesh: Mesh | AbstractMesh, microbatches: int = 1) -> int:
    """Rounds `rows` up to a multiple of batch shards x microbatches; padding rows get weight 0."""
    ways = axis_size(mesh, *BATCH_AXES) * max(1, microbatches)
    return -(-rows // ways) * ways

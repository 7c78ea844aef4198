"""The handle of a checkpoint: names, shapes, dtypes, reads and origins of its tensors; no weight is held."""

import dataclasses
import math
import pathlib
from collections.abc import Hashable, Iterator
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from solar_jax.checkpoints.tensor_table import DERIVED, TENSORS, hf_shape, hf_tensors, pick, to_hf
from solar_jax.config import ModelConfig
from solar_jax.errors import UserError
from solar_jax.formats.safetensors import Entry
from solar_jax.growth.operators import LayerMap, identity
from solar_jax.model.shapes import Params, sizes

BLOCK = 1 << 24  # elements of a tensor that are held at a time, where it need not be held whole


class Read(Protocol):
    """The tensor of an HF name in HF's layout, or rows of its first axis."""

    def __call__(self, name: str, rows: slice = slice(None)) -> np.ndarray: ...


Origin = Hashable  # tensors of equal origin have equal bytes, whatever checkpoints they are of


@dataclasses.dataclass(frozen=True)
class View:
    """How a checkpoint is computed from another one."""

    base: "Checkpoint"
    layer_map: LayerMap | None = None  # layers are placed, averaged and scaled by it
    dtype: str | None = None  # all tensors are cast to it


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's config, companions, and access to each tensor by its HF name; opened from files, or a view.

    Writers copy `entry_of` in the kernel. Writers and loaders read tensors of equal `origin` once.
    """

    where: str  # for messages; of a view, its base's
    hf_config: dict[str, Any]  # the content of config.json
    cfg: ModelConfig
    companions: dict[str, bytes]  # tokenizer, template and generation files by name
    shape_of: dict[str, tuple[int, ...]]
    dtype_of: dict[str, np.dtype]
    read: Read
    entry_of: dict[str, Entry] = dataclasses.field(default_factory=dict)  # the tensors that are plain bytes of a file
    files: tuple[pathlib.Path, ...] = ()  # hold the weights
    lineage: dict[str, Any] | None = None  # the content of lineage.json
    origins: dict[str, Origin] = dataclasses.field(default_factory=dict)  # of a view's tensors
    view: View | None = None  # None: opened, not computed

    def origin(self, name: str) -> Origin:
        return self.origins.get(name, (self.where, name))

    @property
    def source(self) -> "Checkpoint":
        """The opened checkpoint under all views."""
        return self.view.base.source if self.view else self

    @property
    def layer_map(self) -> LayerMap:
        """The layer map from `source` to this checkpoint; identity where nothing grew.

        Raises:
          ValueError: it was grown more than once.
        """
        if self.view is None:
            return identity(self.cfg.num_hidden_layers)
        below, own = self.view.base.layer_map, self.view.layer_map
        if own and not below.is_identity:
            raise ValueError(f"{self.where} is grown twice, {below.operator} and {own.operator}")
        return own or below

    @property
    def cast_to(self) -> str | None:
        """The dtype that a view casts all tensors to; None where each keeps its own."""
        return (self.view.dtype or self.view.base.cast_to) if self.view else None

    @property
    def common_dtype(self) -> str | None:
        """The dtype of all tensors; None where they have several, as bfloat16 weights with float32 norms."""
        found = {dtype.name for name, dtype in self.dtype_of.items() if not name.endswith(DERIVED)}
        return found.pop() if len(found) == 1 else None

    @property
    def dtype(self) -> str:
        """One that holds every tensor exactly."""
        return self.common_dtype or "float32"


def from_params(
    params: Params, cfg: ModelConfig, hf_config: dict[str, Any], companions: dict[str, bytes]
) -> Checkpoint:
    """The stacked state in memory, seen as a checkpoint."""
    where = {name: (path, layer) for name, path, layer in hf_tensors(cfg)}

    def read(name: str, rows: slice = slice(None)) -> np.ndarray:
        path, layer = where[name]
        return to_hf(np.asarray(pick(params, path, layer)), path, cfg)[rows]

    return Checkpoint(
        where="the model in memory",
        hf_config=hf_config,
        cfg=cfg,
        companions=companions,
        shape_of={name: hf_shape(path, cfg) for name, (path, _) in where.items()},
        dtype_of={name: np.dtype(pick(params, path).dtype) for name, (path, _) in where.items()},
        read=read,
    )


def some(names: set[str]) -> str:
    """The first names of a set, and how many more there are."""
    first = sorted(names)[:4]
    return ", ".join(first) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def check_tensors(c: Checkpoint) -> None:
    """Every tensor of the config is there with its shape, and nothing else is."""
    layers, found = c.cfg.num_hidden_layers, len(c.shape_of)
    if layers > found:  # before anything is listed: a config may say a billion
        raise UserError(f"{c.where}: num_hidden_layers={layers} needs more tensors than the {found} there are.")
    expected = {name: hf_shape(path, c.cfg) for name, path, _ in hf_tensors(c.cfg)}
    missing = set(expected) - set(c.shape_of)
    if missing:
        raise UserError(f"{c.where}: tensors of its config are missing: {some(missing)}.")
    for name, shape in expected.items():
        if c.shape_of[name] != shape:
            raise UserError(f"{c.where}: {name} must have shape {shape} by its config, found {c.shape_of[name]}.")
    unused = {name for name in set(c.shape_of) - set(expected) if not name.endswith(DERIVED)}
    head, embed = TENSORS["lm_head"].hf, TENSORS["embed"].hf
    if c.cfg.tie_word_embeddings and head in unused and c.shape_of[head] == c.shape_of[embed]:
        blocks = row_blocks(c.shape_of[embed])
        if not all(np.array_equal(c.read(head, rows), c.read(embed, rows), equal_nan=True) for rows in blocks):
            raise UserError(f"{c.where}: tie_word_embeddings is true, but {head} differs from {embed}.")
        unused.remove(head)
    if unused:
        raise UserError(f"{c.where}: tensors have no place in the model: {some(unused)}.")


def numpy_dtype(name: str) -> np.dtype:
    """float32, bfloat16 or float16."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def row_blocks(shape: tuple[int, ...], unit: int = 1) -> Iterator[slice]:
    """Cuts a tensor's first axis, at multiples of `unit` rows, into equal blocks of at most BLOCK where it can."""
    step = max(BLOCK // max(math.prod(shape[1:]), 1) // unit, 1) * unit
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def row_unit(path: str, cfg: ModelConfig) -> int:
    """Rows of the file's tensor that stand for one step on our axis: H where its first axis holds heads."""
    return math.prod(sizes(cfg)[letter] for letter in TENSORS[path].hf_axes[0][1:])


def tensor_name(path: str, layer: int | None) -> str:
    """The HF name of a row of `TENSORS`, in a layer where it has layers."""
    return TENSORS[path].hf.format("" if layer is None else layer)


def equal_layers(c: Checkpoint, path: str) -> list[list[int | None]]:
    """The layers at which an array has the same bytes, grouped; [[None]] outside the stack."""
    if not path.startswith("layers/"):
        return [[None]]
    groups: dict[Origin, list[int | None]] = {}
    for layer in range(c.cfg.num_hidden_layers):
        groups.setdefault(c.origin(tensor_name(path, layer)), []).append(layer)
    return list(groups.values())

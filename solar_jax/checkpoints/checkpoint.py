"""Checkpoint handle: names, shapes, dtypes, reads and origins of its tensors; no weights are held in memory."""

import dataclasses
import math
import pathlib
from collections.abc import Hashable, Iterator
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from solar_jax.checkpoints.tensor_table import TENSORS, hf_shape, hf_tensors, pick, to_hf
from solar_jax.config import ModelConfig
from solar_jax.formats.safetensors import Entry
from solar_jax.growth.operators import LayerMap, identity
from solar_jax.model.shapes import Params, sizes

BLOCK = 1 << 24  # elements of a tensor held in memory at a time, where the full tensor is not needed


class Read(Protocol):
    """Reads a tensor by HF name in HF's layout, or rows of its first axis."""

    def __call__(self, name: str, rows: slice = slice(None)) -> np.ndarray: ...


Origin = Hashable  # tensors of equal origin have equal bytes, even across checkpoints


@dataclasses.dataclass(frozen=True)
class View:
    """Recipe that computes a checkpoint from another one."""

    base: "Checkpoint"
    layer_map: LayerMap | None = None  # places, averages and scales layers
    dtype: str | None = None  # dtype that all tensors are cast to


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Config, companions and per-tensor access by HF name of a checkpoint that was opened from files or is a view.

    Writers copy tensors in `entry_of` in the kernel. Writers and loaders read tensors of equal `origin` once.
    """

    where: str  # for messages; a view has its base's
    hf_config: dict[str, Any]  # the content of config.json
    cfg: ModelConfig
    companions: dict[str, bytes]  # tokenizer, template and generation files by name
    shape_of: dict[str, tuple[int, ...]]
    dtype_of: dict[str, np.dtype]
    read: Read
    entry_of: dict[str, Entry] = dataclasses.field(default_factory=dict)  # tensors stored as plain bytes in a file
    files: tuple[pathlib.Path, ...] = ()  # the files that hold the weights
    unread: tuple[str, ...] = ()  # weight files beside `files` that were not chosen
    lineage: dict[str, Any] | None = None  # the content of lineage.json
    origins: dict[str, Origin] = dataclasses.field(default_factory=dict)  # for a view's tensors
    view: View | None = None  # None: opened, not computed
    merged_from: tuple["Checkpoint", ...] = ()  # the inputs of a merge
    recipe: dict[str, Any] | None = None  # of a merge, for its lineage

    def origin(self, name: str) -> Origin:
        return self.origins.get(name, (self.where, name))

    @property
    def source(self) -> "Checkpoint":
        """The opened checkpoint beneath all views."""
        return self.view.base.source if self.view else self

    @property
    def layer_map(self) -> LayerMap:
        """The layer map from `source` to this checkpoint; the identity if nothing was grown.

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
        """The dtype that a view casts all tensors to; None if each keeps its own."""
        return (self.view.dtype or self.view.base.cast_to) if self.view else None

    @property
    def common_dtype(self) -> str | None:
        """The dtype shared by all tensors; None if they differ, e.g. bfloat16 weights with float32 norms."""
        found = {dtype.name for dtype in self.dtype_of.values()}
        return found.pop() if len(found) == 1 else None

    @property
    def dtype(self) -> str:
        """A dtype that represents every tensor exactly."""
        return self.common_dtype or "float32"


def from_params(
    params: Params, cfg: ModelConfig, hf_config: dict[str, Any], companions: dict[str, bytes]
) -> Checkpoint:
    """Presents the stacked state in memory as a checkpoint."""
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
    """Lists the first names of a set and how many more there are."""
    first = sorted(names)[:4]
    return ", ".join(first) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def numpy_dtype(name: str) -> np.dtype:
    """Returns the dtype named "float32", "bfloat16" or "float16"."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def row_blocks(shape: tuple[int, ...], unit: int = 1) -> Iterator[slice]:
    """Splits a tensor's first axis at multiples of `unit` rows into equal blocks, of at most BLOCK if possible."""
    step = max(BLOCK // max(math.prod(shape[1:]), 1) // unit, 1) * unit
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def row_unit(path: str, cfg: ModelConfig) -> int:
    """Returns how many rows of the file's tensor map to one index of our axis: H if its first axis holds heads."""
    return math.prod(sizes(cfg)[letter] for letter in TENSORS[path].hf_axes[0][1:])


def tensor_name(path: str, layer: int | None) -> str:
    """Returns the HF name of a row of `TENSORS`, in a given layer if it is per layer."""
    return TENSORS[path].hf.format("" if layer is None else layer)


def equal_layers(c: Checkpoint, path: str) -> list[list[int | None]]:
    """Groups the layers at which an array has the same bytes; [[None]] outside the layer stack."""
    if not path.startswith("layers/"):
        return [[None]]
    groups: dict[Origin, list[int | None]] = {}
    for layer in range(c.cfg.num_hidden_layers):
        groups.setdefault(c.origin(tensor_name(path, layer)), []).append(layer)
    return list(groups.values())

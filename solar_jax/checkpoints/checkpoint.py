"""An opened checkpoint, and its tensors put into the stacked state, grown on the way where a plan says so."""

import dataclasses
import math
import pathlib
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np
import tokenizers

from solar_jax.checkpoints.tensor_table import DERIVED, TENSORS, from_hf, hf_shape, hf_tensors, pick, to_hf
from solar_jax.config import ModelConfig
from solar_jax.errors import UserError
from solar_jax.formats.safetensors import Entry
from solar_jax.growth.apply import SCALED, grown_config
from solar_jax.growth.operators import GrowthPlan, identity
from solar_jax.model.llama import Params, shapes, sizes

BLOCK = 1 << 24  # elements of a tensor that are held at a time, where it need not be held whole


class Read(Protocol):
    """The tensor of an HF name in HF's layout, or rows of its first axis."""

    def __call__(self, name: str, rows: slice = slice(None)) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Everything of a checkpoint but the weights, and a way to each tensor. Tensors go by their HF names."""

    where: str  # for messages
    hf_config: dict[str, Any]  # the content of config.json
    cfg: ModelConfig
    companions: dict[str, bytes]  # tokenizer, template and generation files by name
    shape_of: dict[str, tuple[int, ...]]
    dtype_of: dict[str, np.dtype]
    read: Read
    entry_of: dict[str, Entry] = dataclasses.field(default_factory=dict)  # the tensors that are plain bytes of a file
    files: tuple[pathlib.Path, ...] = ()  # that hold the weights
    lineage: dict[str, Any] | None = None  # the content of lineage.json

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


def source_name(path: str, layer: int | None, plan: GrowthPlan) -> str:
    """The HF tensor of the base that a tensor of the grown model comes from."""
    return TENSORS[path].hf.format("" if layer is None else plan.source[layer])


def is_copy(path: str, layer: int | None, plan: GrowthPlan) -> bool:
    """Whether a tensor of the grown model is one of the base's, bit by bit."""
    if layer is None:
        return True
    scaled = path.rpartition("/")[2] in SCALED and plan.scale[layer] != 1.0
    return plan.partner[layer] == plan.source[layer] and not scaled


def grown_rows(c: Checkpoint, plan: GrowthPlan, path: str, layer: int | None, rows: slice = slice(None)) -> np.ndarray:
    """Rows of one tensor of the grown model, in HF's layout: what `growth.apply.grow` does, without the whole.

    Args:
      c: the base.
      plan: made for its layers.
      path: a row of `TENSORS`.
      layer: of the grown model; None for a tensor outside the stack.
      rows: of the file's first axis.

    Returns:
      An array of the base's dtype.
    """
    x = c.read(source_name(path, layer, plan), rows)
    if layer is None or is_copy(path, layer, plan):
        return x
    if plan.partner[layer] != plan.source[layer]:
        other = c.read(TENSORS[path].hf.format(plan.partner[layer]), rows)
        x = ((x.astype(np.float32) + other.astype(np.float32)) / 2).astype(x.dtype)
    if path.rpartition("/")[2] in SCALED:
        x = x * np.asarray(plan.scale[layer], x.dtype)
    return x


def places(plan: GrowthPlan, path: str) -> list[list[int | None]]:
    """The layers of the grown model at which an array is the same, together; [[None]] outside the stack."""
    if not path.startswith("layers/"):
        return [[None]]
    groups: dict[Any, list[int | None]] = {}
    for layer in range(plan.layers):
        same = plan.source[layer] if is_copy(path, layer, plan) else ("made", layer)
        groups.setdefault(same, []).append(layer)
    return list(groups.values())


def load_params(
    c: Checkpoint, shardings: Params | None = None, dtype: Any = np.float32, plan: GrowthPlan | None = None
) -> Params:
    """The checkpoint's weights as the stacked state, grown on the way.

    A process reads of each tensor the rows that its devices need, once, whatever the devices and the layers that they
    go to; beside the devices' own parts it holds one tensor.

    Args:
      c: an opened checkpoint.
      shardings: of the state's arrays; the first device holds everything if None.
      dtype: of the state's arrays; a tree of dtypes where they differ.
      plan: made for its layers; identity if None.

    Returns:
      A tree shaped as `model.llama.shapes` of the grown config.
    """
    plan = plan or identity(c.cfg.num_hidden_layers)
    cfg = grown_config(c.cfg, plan)
    if shardings is None:
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: one, shapes(cfg))

    dtypes = dtype if isinstance(dtype, dict) else jax.tree.map(lambda _: dtype, shapes(cfg))

    def load(key_path: Any, shape: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding, dtype: Any) -> jax.Array:
        parts = _parts(c, plan, "/".join(k.key for k in key_path), shape.shape, sharding, dtype)
        return jax.make_array_from_callback(shape.shape, sharding, lambda index: parts[str(index)])

    return jax.tree.map_with_path(load, shapes(cfg), shardings, dtypes)


def _parts(
    c: Checkpoint, plan: GrowthPlan, path: str, shape: tuple[int, ...], sharding: jax.sharding.Sharding, dtype: Any
) -> dict[str, np.ndarray]:
    """What the devices of this process hold of one array, by index."""
    row, unit, stacked = TENSORS[path], row_unit(path, c.cfg), path.startswith("layers/")
    axis = row.axes.index(row.hf_axes[0][0])  # of one layer's array, along which the file's rows run
    indices: Any = {str(i): i for i in sharding.addressable_devices_indices_map(shape).values()}
    spans = {key: [range(n)[i] for n, i in zip(shape, index, strict=True)] for key, index in indices.items()}
    parts = {key: np.empty([len(span) for span in spans[key]], dtype) for key in indices}
    for layers in places(plan, path):
        wanted = [(key, layer) for key in indices for layer in layers if not stacked or layer in spans[key][0]]
        if not wanted:
            continue
        rows = [spans[key][axis + stacked] for key, _ in wanted]
        start, stop = min(r.start for r in rows), max(r.stop for r in rows)
        x = from_hf(grown_rows(c, plan, path, layers[0], slice(start * unit, stop * unit)), path, c.cfg)
        for key, layer in wanted:
            index = list(indices[key][stacked:])
            own = spans[key][axis + stacked]
            index[axis] = slice(own.start - start, own.stop - start)
            into = parts[key] if layer is None else parts[key][layer - spans[key][0].start]
            into[...] = x[tuple(index)]
    return parts


def load_tokenizer(c: Checkpoint) -> tokenizers.Tokenizer:
    """The checkpoint's tokenizer.

    Raises:
      UserError: it has none as tokenizer.json, or its ids do not fit the embedding.
    """
    if "tokenizer.json" not in c.companions:
        raise UserError(f"{c.where}: tokenizer.json is missing.")
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(c.companions["tokenizer.json"])
    except ValueError as e:
        raise UserError(f"{c.where}: tokenizer.json cannot be read: {e}.") from e
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest < 0:
        raise UserError(f"{c.where}: tokenizer.json has no tokens.")
    if largest >= c.cfg.vocab_size:
        raise UserError(
            f"{c.where}: the tokenizer has ids up to {largest}, but config.json's vocab_size is {c.cfg.vocab_size}."
        )
    return tokenizer


def eos_id(c: Checkpoint) -> int:
    """The token that ends a document (HF `eos_token_id`, the first where it lists several).

    Raises:
      UserError: config.json does not name one within the vocabulary.
    """
    found = c.hf_config.get("eos_token_id")
    first = found[0] if isinstance(found, list) and found else found
    if type(first) is not int or not 0 <= first < c.cfg.vocab_size:
        raise UserError(f"{c.where}: eos_token_id must be a token under {c.cfg.vocab_size}, found {found!r}.")
    return first

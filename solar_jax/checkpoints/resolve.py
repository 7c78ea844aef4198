"""Resolves what a file calls its tensors, once and for every format, when a checkpoint is opened.

Names lose what a training program put around them, a tied head is the embedding whichever of the two is stored, and
buffers that follow from config.json are compared with it and dropped.
"""

import dataclasses
import re
from collections.abc import Iterable

import numpy as np

from solar_jax.checkpoints.checkpoint import Checkpoint, row_blocks, some
from solar_jax.checkpoints.hf_families import fused_tensors, stacked_tensors, usual_name
from solar_jax.checkpoints.tensor_table import TENSORS, hf_shape, hf_tensors
from solar_jax.errors import UserError
from solar_jax.formats.safetensors import Entry
from solar_jax.model.rope import rope_frequencies

# Modules that wrap others: torch.compile, FSDP, activation checkpointing. They occur anywhere within a name.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_PREFIXES = ("module.", "base_model.model.")  # DistributedDataParallel and DeepSpeed; PEFT
_MODEL = "model."  # absent in checkpoints of a model without its head
_LAYER = re.compile(r"(.*?)layers\.0\.input_layernorm\.weight")

_FREQUENCIES = re.compile(r"(^|\.)((original_)?inv_freq|rope\.freqs)$")
_TABLES = re.compile(r"(^|\.)(cos|sin)_cached$")  # of cosines or sines by position, [..., positions, H or H / 2]
# Buffers of attention and rope that hold no weights, in any generation of transformers and of Meta's code.
_DERIVED = re.compile(
    r"(^|\.)((original_)?inv_freq|rope\.freqs|freqs_cis|freqs_c(os|is)|freqs_sin|(cos|sin)_cached|"
    r"rotary_emb\.\w+|masked_bias|(self_attn|attn|attention)\.bias|causal_mask|position_ids)$"
)
_TABLE_ERROR = 1e-2  # of a value up to 1, which bfloat16 rounds by up to 0.004
# dtype of a stored frequency -> (relative, absolute) rounding error that it may have
_ROUNDING = {"float32": (1e-4, 0.0), "bfloat16": (1e-2, 0.0), "float16": (2e-3, 6e-8)}


def is_derived(name: str) -> bool:
    """Returns whether a tensor is a buffer that follows from config.json."""
    return bool(_DERIVED.search(name))


def resolved(c: Checkpoint) -> Checkpoint:
    """Returns the checkpoint under HF's names and without derived buffers.

    Raises:
      UserError: two tensors have the same name without what is around them, or a buffer contradicts config.json.
    """
    name_of = {found: usual_name(name, c.hf_config) for found, name in hf_names(c.shape_of).items()}
    if len(set(name_of.values())) < len(name_of):
        twice = {found for found, name in name_of.items() if list(name_of.values()).count(name) > 1}
        raise UserError(f"{c.where}: must hold each tensor once, found {some(twice)}.")
    others = [(found, name) for found, name in name_of.items() if usual_name(found, c.hf_config) != name]
    if renamed := len(others):
        found, name = others[0]
        print(f"{c.where}: reads {found} as {name}, and {renamed - 1} more in the same way", flush=True)
    stored = {name: found for found, name in name_of.items() if not is_derived(name)}
    for found, name in name_of.items():
        if _FREQUENCIES.search(name):
            _check_frequencies(c, found)
        elif _TABLES.search(name):
            _check_table(c, found)
    head, embed = TENSORS["lm_head"].hf, TENSORS["embed"].hf
    if c.cfg.tie_word_embeddings and embed not in stored and head in stored:
        stored[embed] = stored.pop(head)
    if all(name == found for name, found in stored.items()) and len(stored) == len(c.shape_of):
        return _joined(_split(c))
    renamed_checkpoint = dataclasses.replace(
        c,
        shape_of={name: c.shape_of[found] for name, found in stored.items()},
        dtype_of={name: c.dtype_of[found] for name, found in stored.items()},
        read=lambda name, rows=slice(None): c.read(stored[name], rows),
        entry_of={name: c.entry_of[found] for name, found in stored.items() if found in c.entry_of},
    )
    return _joined(_split(renamed_checkpoint))


def _joined(c: Checkpoint) -> Checkpoint:
    """Presents the tensors of a layer's experts, which files hold one by one, as the usual one, expert after expert."""
    if not stacked_tensors(c.hf_config) or c.cfg.num_hidden_layers > len(c.shape_of):  # a config may claim a billion
        return c
    experts, parts_of = range(min(c.cfg.num_local_experts, len(c.shape_of))), {}
    for name, _, _ in hf_tensors(c.cfg):
        for usual, own in stacked_tensors(c.hf_config).items():
            if name.endswith(f".{usual}"):
                parts_of[name] = [name.removesuffix(usual) + own.format(e) for e in experts]
    parts_of = {name: parts for name, parts in parts_of.items() if all(part in c.shape_of for part in parts)}
    for parts in parts_of.values():
        for kind, of in (("shape", c.shape_of), ("dtype", c.dtype_of)):
            if other := next((part for part in parts if of[part] != of[parts[0]]), None):
                raise UserError(
                    f"{c.where}: {other} must have the {kind} of {parts[0]}, {of[parts[0]]}, found {of[other]}."
                )
    inside = {part for parts in parts_of.values() for part in parts}
    kept = [name for name in c.shape_of if name not in inside]

    def read(name: str, rows: slice = slice(None)) -> np.ndarray:
        if name not in parts_of:
            return c.read(name, rows)
        parts = parts_of[name]
        each = c.shape_of[parts[0]][0]
        start, stop, _ = rows.indices(each * len(parts))
        spans = [(part, max(start - i * each, 0), min(stop - i * each, each)) for i, part in enumerate(parts)]
        found = [c.read(part, slice(first, last)) for part, first, last in spans if first < last]
        return found[0] if len(found) == 1 else np.concatenate(found or [c.read(parts[0], slice(0, 0))])

    def rows_of(parts: list[str]) -> tuple[int, ...]:
        height, *width = c.shape_of[parts[0]]
        return (height * len(parts), *width)

    return dataclasses.replace(
        c,
        shape_of={n: c.shape_of[n] for n in kept} | {n: rows_of(parts) for n, parts in parts_of.items()},
        dtype_of={n: c.dtype_of[n] for n in kept} | {n: c.dtype_of[parts[0]] for n, parts in parts_of.items()},
        read=read,
        entry_of={n: c.entry_of[n] for n in kept if n in c.entry_of},
    )


def _split(c: Checkpoint) -> Checkpoint:
    """Presents tensors that a family's files hold as one as the usual ones, each a range of its rows."""
    if not fused_tensors(c.hf_config) or c.cfg.num_hidden_layers > len(c.shape_of):  # a config may claim a billion
        return c
    rows_of = {name: hf_shape(path, c.cfg)[0] for name, path, _ in hf_tensors(c.cfg)}
    places: dict[str, tuple[str, slice]] = {}
    for whole, parts in fused_tensors(c.hf_config).items():
        for found in [name for name in c.shape_of if name.endswith(f".{whole}")]:
            names = [found.removesuffix(whole) + part for part in parts]
            sizes = [rows_of.get(name, 0) for name in names]
            if sum(sizes) != c.shape_of[found][0]:
                raise UserError(f"{c.where}: {found} must have {sum(sizes)} rows, found {c.shape_of[found][0]}.")
            ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
            places |= {n: (found, slice(end - s, end)) for n, s, end in zip(names, sizes, ends, strict=True)}
    if not places:
        return c
    kept = {name: (name, slice(0, c.shape_of[name][0])) for name in c.shape_of} | places
    for found, _ in places.values():
        kept.pop(found, None)

    def read(name: str, rows: slice = slice(None)) -> np.ndarray:
        found, place = kept[name]
        start, stop, _ = rows.indices(place.stop - place.start)
        return c.read(found, slice(place.start + start, place.start + stop))

    def entry(name: str) -> Entry:
        found, place = kept[name]
        whole = c.entry_of[found]
        width = (whole.stop - whole.start) // max(1, whole.shape[0])
        start = whole.start + place.start * width
        stop = whole.start + place.stop * width
        return dataclasses.replace(whole, shape=(place.stop - place.start, *whole.shape[1:]), start=start, stop=stop)

    return dataclasses.replace(
        c,
        shape_of={n: (at.stop - at.start, *c.shape_of[found][1:]) for n, (found, at) in kept.items()},
        dtype_of={name: c.dtype_of[found] for name, (found, _) in kept.items()},
        read=read,
        entry_of={name: entry(name) for name, (found, _) in kept.items() if found in c.entry_of},
    )


def hf_names(found: Iterable[str]) -> dict[str, str]:
    """Maps names as they are stored to names of Hugging Face's classes with a language model head."""
    names = {name: _unwrapped(name) for name in found}
    if not any(name.startswith(_MODEL) for name in names.values()):
        bare = [row.hf.removeprefix(_MODEL).split(".")[0] + "." for row in TENSORS.values() if row.hf[:6] == _MODEL]
        names = {f: _MODEL + name if name.startswith(tuple(bare)) else name for f, name in names.items()}
    return names


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def check_tensors(c: Checkpoint) -> None:
    """Checks that a checkpoint has exactly the tensors of its config, with their shapes."""
    layers, count = c.cfg.num_hidden_layers, len(c.shape_of)
    if layers > count:  # before listing any: a config may claim a billion layers
        raise UserError(f"{c.where}: num_hidden_layers={layers} needs more tensors than the {count} found.")
    expected = {name: hf_shape(path, c.cfg) for name, path, _ in hf_tensors(c.cfg)}
    missing, unused = set(expected) - set(c.shape_of), set(c.shape_of) - set(expected)
    if missing:
        there = f"; instead it holds {strange(unused)}" if unused else ""
        raise UserError(f"{c.where}: tensors of its config are missing: {some(missing)}{there}.")
    for name, shape in expected.items():
        if c.shape_of[name] != shape:
            raise UserError(f"{c.where}: {name} must have shape {shape} as in its config, found {c.shape_of[name]}.")
    head, embed = TENSORS["lm_head"].hf, TENSORS["embed"].hf
    if c.cfg.tie_word_embeddings and head in unused and c.shape_of[head] == c.shape_of[embed]:
        blocks = row_blocks(c.shape_of[embed])
        if not all(np.array_equal(c.read(head, rows), c.read(embed, rows), equal_nan=True) for rows in blocks):
            raise UserError(f"{c.where}: tie_word_embeddings is true, but {head} differs from {embed}.")
        unused.remove(head)
    if unused:
        raise UserError(f"{c.where}: must hold only tensors of its model, found {strange(unused)}.")


def strange(names: set[str]) -> str:
    """Describes tensors that do not belong to the model: what they seem to be, and the first names."""
    if any("lora_" in name for name in names):
        return f"{some(names)}; that is an adapter, so merge it into its base first (PEFT's merge_and_unload)"
    if any(name.endswith((".qweight", ".weight_scale", ".absmax", ".qzeros", ".scales")) for name in names):
        return f"{some(names)}; these are quantised weights, so convert them to bfloat16 first"
    prefixes = {m[1] for name in names if (m := _LAYER.match(name))}
    if len(prefixes) == 1:
        return f"{some(names)}; their names begin with {prefixes.pop()!r} where {_MODEL!r} is expected"
    return some(names)


def _check_table(c: Checkpoint, name: str) -> None:
    """Raises a UserError if the second row of a stored table, position 1, is not that of config.json's frequencies."""
    if name not in c.dtype_of:
        return
    half, shape = c.cfg.head_dim // 2, c.shape_of[name]
    function = np.cos if name.endswith("cos_cached") else np.sin
    if len(shape) >= 2 and shape[-2] > 1 and shape[-1] in (half, 2 * half):
        row = np.asarray(c.read(name), np.float64).reshape(-1, shape[-2], shape[-1])[0, 1, :half]
        for cfg in (c.cfg, dataclasses.replace(c.cfg, rope_scaling="")):
            factor = cfg.rope_attention_factor or 1.0
            if np.allclose(row, factor * function(rope_frequencies(cfg)), atol=_TABLE_ERROR):
                return
    raise UserError(
        f"{c.where}: {name} must hold {function.__name__}(position x frequency) of config.json's rope_theta="
        f"{c.cfg.rope_theta:g}, [positions, {2 * half}]; found another table, {list(shape)}."
    )


def _check_frequencies(c: Checkpoint, name: str) -> None:
    """Raises a UserError if stored rotary frequencies are not those of config.json, with or without its scaling."""
    if name not in c.dtype_of:
        return
    x = np.asarray(c.read(name), np.float64)
    plain = dataclasses.replace(c.cfg, rope_scaling="")
    relative, absolute = _ROUNDING[c.dtype_of[name].name]
    for cfg in (c.cfg, plain):
        expected = rope_frequencies(cfg)
        if x.shape == expected.shape and np.allclose(x, expected, rtol=relative, atol=absolute):
            return
    found = f"found {x.shape}"
    if x.shape == (c.cfg.head_dim // 2,) and x.size > 1 and x[0] == 1 and x[1] > 0:
        found = f"found those of rope_theta={x[1] ** (-x.size):.6g}"
    raise UserError(
        f"{c.where}: {name} must be the {c.cfg.head_dim // 2} rotary frequencies of config.json, of "
        f"rope_theta={c.cfg.rope_theta:g}, {found}."
    )

"""Layer map of a model by its lineage, and the checkpoint that growth or training started from, if it is there."""

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.checkpoints.lineage import fingerprint, public
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.views import cast, grown
from solar_jax.errors import UserError
from solar_jax.growth.operators import LayerMap, composed, identity
from solar_jax.storage.json_files import read_json
from solar_jax.storage.paths import is_local

_NO_LINEAGE = "It has no lineage.json, so it is taken as a model without growth."
_NO_GROWTH = "No growth is in its lineage."
_MERGED = "It is a merge; layer map and start are those of its first input."
_CUT = "It grew more than once with means of layers in between; the layer map is that of the last growth alone."


@dataclasses.dataclass(frozen=True)
class Ancestry:
    """Layer map and origin of a model, read from its lineage."""

    layer_map: LayerMap  # from the first base to the model
    last: LayerMap  # of the last growth alone, from `origin` to the model
    origin: dict[str, Any] | None  # fingerprint of what the last growth grew, or of the oldest parent
    hints: tuple[str, ...]  # SRC as commands of the lineage had it
    notes: tuple[str, ...]  # sentences for the reader


def ancestry(c: Checkpoint) -> Ancestry:
    """Reads the layer map of an opened checkpoint from its lineage.

    Several growths are composed: layer i of the model copies layer below[above[i]] of the first base.

    Raises:
      UserError: lineage.json contradicts itself or the model.
    """
    layers = c.cfg.num_hidden_layers
    if c.lineage is None:
        return Ancestry(identity(layers), identity(layers), None, (), (_NO_LINEAGE,))
    chain = list(_chain(c.lineage))
    maps = [_map_of(record, c.where) for record in chain]
    if maps[0].layers != layers:
        raise UserError(f"{c.where}: lineage.json is of {maps[0].layers} layers, but the model has {layers}.")
    notes = [_MERGED] if any(len(record.get("parents", ())) > 1 for record in chain) else []
    whole = maps[0]
    for below in maps[1:]:
        if max(whole.source) >= below.layers:
            raise UserError(f"{c.where}: lineage.json copies layer {max(whole.source)} of {below.layers}.")
        try:
            whole = composed(below, whole)
        except UserError:
            notes.append(_CUT)
            break
    at = next((k for k, own in enumerate(maps) if not own.is_identity), len(chain) - 1)
    if whole.is_identity:
        notes.append(_NO_GROWTH)
    hints = [hint for record in chain for hint in _sources(record.get("command", ()))]
    return Ancestry(whole, maps[at], chain[at].get("source"), tuple(dict.fromkeys(hints)), tuple(notes))


def _chain(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields a lineage record and its parents, the first of each."""
    while True:
        if "source_layers" in record:
            yield record
        if not record.get("parents"):
            return
        record = record["parents"][0]


def _map_of(record: dict[str, Any], where: str) -> LayerMap:
    """Returns the layer map of one record, whose base has as many layers as the map needs at least."""
    source, partner = record["source_layers"], record.get("partner_layers")
    lists = [x for x in (source, partner, record.get("scale")) if x is not None]
    numbers = all(isinstance(x, list) and x and len(x) == len(source) for x in lists)
    if not numbers or not all(type(i) is int and i >= 0 for x in (source, partner or []) for i in x):
        raise UserError(f"{where}: lineage.json's source_layers must be a list of layers, found {str(source)[:60]}.")
    scale = tuple(float(s) for s in record.get("scale") or ())
    base = max((*source, *(partner or ()))) + 1
    return LayerMap(
        str(record.get("operator")), base, tuple(source), scale, tuple(partner or ()),
        mix=str(record.get("mix", "mean")), noise=tuple(bool(x) for x in record.get("noise", ())),
    )  # fmt: skip


def _sources(argv: Sequence[str]) -> Iterator[str]:
    """Yields what a command line named as its source."""
    for arg, following in zip(argv, [*argv[1:], ""], strict=True):
        if match := re.fullmatch(r"--?(?:config\.)?source(?:=(.+))?", arg):
            yield match[1] or following


@dataclasses.dataclass(frozen=True)
class FirstWeights:
    """Weights that a model's layers started with."""

    checkpoint: Checkpoint | None  # with the model's layers; None if it was not found
    said: str  # a sentence: what it is, or why there is none


def find_start(c: Checkpoint, its: Ancestry, source: str | None) -> FirstWeights:
    """Finds the weights that growth gave the model, or, without growth, those of its oldest parent.

    Without `source`, what the lineage's commands and the run's config name is tried, where that is on this machine; it
    counts if its files have the sizes and hashes that the lineage has.

    Args:
      c: the model.
      its: its ancestry.
      source: SRC of the base, or of the grown model as growth left it; None to search.

    Raises:
      UserError: `source` does not fit the model.
    """
    if source is not None:
        found = open_checkpoint(source)
        differs = bool(its.origin) and not _is_same(found, its.origin)
        note = "; its files are not those that the lineage names" if differs else ""
        return FirstWeights(_as_grown(found, c, its, source), f"Distances are from {_name(source)}{note}.")
    if its.origin is None:
        return FirstWeights(None, "Distances from a start are left out: no lineage names one; --source SRC does.")
    for text in _candidates(c, its):
        try:
            found = open_checkpoint(text)
            start = _as_grown(found, c, its, text) if _is_same(found, its.origin) else None
        except UserError:
            continue
        if start is not None:
            how = "" if its.last.is_identity else f", grown by {its.last.operator}"
            return FirstWeights(start, f"Distances are from {_name(text)}{how}.")
    return FirstWeights(
        None,
        f"Distances from a start are left out: {its.origin.get('where')}, which the lineage names, was not found here; "
        "--source SRC names it.",
    )


def _candidates(c: Checkpoint, its: Ancestry) -> Iterator[str]:
    """Yields places on this machine where the start may be; asks no hub and no bucket."""
    place = pathlib.Path(c.source.where)
    runs = (place.parent.parent, place.parent) if is_local(c.source.where) else ()  # RUN/checkpoints/STEP, RUN/hf
    for run in runs:
        content = read_json(run / "config.json") if (run / "config.json").is_file() else None
        named = content.get("source") if isinstance(content, dict) else None
        if isinstance(named, str) and _is_here(named):
            yield named
    yield from (hint for hint in its.hints if _is_here(hint))


def _name(text: str) -> str:
    return f"`{public(text)}`"


def _is_here(text: str) -> bool:
    return text == "smollm2" or (is_local(text) and pathlib.Path(text).expanduser().exists())


def _is_same(c: Checkpoint, known: dict[str, Any] | None) -> bool:
    """Returns whether a checkpoint's config and files are those of a fingerprint, wherever they lie."""
    own = fingerprint(c)
    return known is not None and all(own[key] == known.get(key) for key in ("config_sha256", "files"))


def _as_grown(found: Checkpoint, c: Checkpoint, its: Ancestry, text: str) -> Checkpoint:
    """Returns a start with the model's layers and dtype."""
    layers, base = c.cfg.num_hidden_layers, found.cfg.num_hidden_layers
    if base != layers and base >= its.last.base_layers:
        found = grown(found, dataclasses.replace(its.last, base_layers=base))
    if found.cfg.num_hidden_layers != layers or found.cfg.hidden_size != c.cfg.hidden_size:
        raise UserError(
            f"--source={text}: expected the base that {its.last.operator} grows to {layers} layers of "
            f"{c.cfg.hidden_size}, or the grown model, found {base} layers of {found.cfg.hidden_size}."
        )
    return cast(found, c.common_dtype)  # what was only rounded when it was written has not moved

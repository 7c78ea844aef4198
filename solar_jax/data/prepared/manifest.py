"""Manifest of a prepared folder: shards with their final names, counts, and reports."""

import collections
import json
import os
import pathlib
import re
import shutil
from typing import Any

from solar_jax.data.prepared import records
from solar_jax.data.prepared.build import DUPLICATES, PARTS, SHARDS, SourceFacts
from solar_jax.data.prepared.decontamination import Index
from solar_jax.data.prepared.rows import FORMAT, MANIFEST, OF_SOURCE
from solar_jax.storage import paths

CONTAMINATED = "contaminated.jsonl"
_NAMES = "names.json"  # in the folder of shards: everything else is written, only renames remain
_EXAMPLES = 5
_COUNTS = ("rows", "tokens", "documents", "document_tokens", "bytes")


def is_written(folder: pathlib.Path) -> bool:
    """Returns whether an interrupted run got as far as naming shards."""
    return (folder / SHARDS / _NAMES).exists() or (folder / MANIFEST).exists()


def write_manifest(
    folder: pathlib.Path, sources: list[SourceFacts], index: Index | None, about: dict[str, Any]
) -> None:
    """Writes manifest.json, one more per source if there are several, and the report of contaminated documents.

    Args:
      folder: holds the shards.
      sources: in the config's order.
      index: of the evaluation sets that documents were compared with.
      about: further manifest entries: tokenizer, packing, versions.
    """
    shards, names = _numbered(sources)
    matches = [
        dict(zip(("document", "evaluation", "words", "places"), match, strict=True))
        for facts in sources for part in PARTS for shard in facts.shards[part].finished for match in shard["matches"]
    ]  # fmt: skip
    manifest = {"format": FORMAT} | about
    manifest["duplicates"] = _duplicates(folder, sources) if (folder / DUPLICATES).exists() else None
    manifest["decontamination"] = None if index is None else _decontamination(index, matches)
    if index is not None:
        paths.write_file(folder / CONTAMINATED, "".join(json.dumps(match) + "\n" for match in matches))
    described = [_source(i, facts, shards) for i, facts in enumerate(sources)]
    for i, (facts, one) in enumerate(zip(sources, described, strict=True)):
        if len(sources) > 1:
            its = [shard | {"source": 0} for shard in shards if shard["source"] == i]
            content = manifest | {"sources": [one], "shards": its}
            paths.write_file(
                folder / f"{i}-{_stem(facts.source.path)}{OF_SOURCE}", json.dumps(content, indent=1) + "\n"
            )
    totals = {part: {key: sum(s[key] for s in shards if s["part"] == part) for key in _COUNTS} for part in PARTS}
    content = manifest | {"totals": totals, "sources": described, "shards": shards}
    paths.write_file(folder / SHARDS / _NAMES, json.dumps(names))
    paths.write_file(folder / MANIFEST, json.dumps(content, indent=1) + "\n")


def name_shards(folder: pathlib.Path) -> None:
    """Gives the shards their final names, including after an interrupted run that renamed only some."""
    if (folder / SHARDS / _NAMES).exists():
        for made, name in json.loads((folder / SHARDS / _NAMES).read_text()).items():
            if (folder / SHARDS / made).exists():
                os.replace(folder / SHARDS / made, folder / name)
    shutil.rmtree(folder / SHARDS, ignore_errors=True)


def _numbered(sources: list[SourceFacts]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Returns the shards that have rows, as described in the manifest, and a map from old to final names."""
    shards, names = [], {}
    for part in PARTS:
        made = [
            (i, facts.shards[part].rows_file(k), shard)
            for i, facts in enumerate(sources) for k, shard in enumerate(facts.shards[part].finished) if shard["rows"]
        ]  # fmt: skip
        for k, (i, file, shard) in enumerate(made):
            name = f"{part}-{k:05d}-of-{len(made):05d}.array_record"
            names[file.name] = name
            counts = {key: shard[key] for key in (*_COUNTS, "blocks", "first", "last")}
            shards.append({"file": name, "part": part, "source": i} | counts)
    return shards, names


def _source(i: int, facts: SourceFacts, shards: list[dict[str, Any]]) -> dict[str, Any]:
    its = {part: [s for s in shards if s["source"] == i and s["part"] == part] for part in PARTS}
    return {
        "path": facts.source.path,
        "text_key": facts.source.text_key,
        "held_out_by": facts.holdout,
        "documents": facts.documents,
        "text_bytes": facts.bytes,
        "empty": facts.empty,
        "duplicates": facts.duplicates,
        "contaminated": sum(len(s["matches"]) for part in PARTS for s in facts.shards[part].finished),
        "left_out": _left_out(facts),
        **{part: {key: sum(s[key] for s in its[part]) for key in _COUNTS} for part in PARTS},
        "files": list(facts.files),
    }


def _left_out(facts: SourceFacts) -> dict[str, list[str]]:
    """The ids of the records that were not used, by reason."""
    found: dict[str, list[str]] = {}
    for shard in (shard for part in PARTS for shard in facts.shards[part].finished):
        for reason, ids in shard.get("left_out", {}).items():
            found.setdefault(reason, []).extend(ids)
    return found


def _duplicates(folder: pathlib.Path, sources: list[SourceFacts]) -> dict[str, Any]:
    with (folder / DUPLICATES).open() as f:
        examples = [json.loads(line) for _, line in zip(range(_EXAMPLES), f, strict=False)]
    return {"documents": sum(facts.duplicates for facts in sources), "report": DUPLICATES, "examples": examples}


def _decontamination(index: Index, matches: list[dict[str, Any]]) -> dict[str, Any]:
    by_file = collections.Counter(records.place(match["evaluation"])[0] for match in matches)
    return {
        "words_in_a_row": index.n,
        "records": len(index.names),
        "records_too_short": index.short,  # for anything to match
        "files": sorted({records.place(name)[0] for name in index.names}),
        "documents": len(matches),
        "by_file": dict(sorted(by_file.items())),
        "report": CONTAMINATED,
        "examples": matches[:_EXAMPLES],
    }


def _stem(path: str) -> str:
    """Returns a shell-safe name for a source."""
    last = pathlib.PurePosixPath(path).name.split(".")[0]
    return re.sub(r"\W+", "-", last).strip("-") or "source"

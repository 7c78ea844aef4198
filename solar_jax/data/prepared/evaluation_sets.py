"""Texts of evaluation sets: JSONL, JSON and Parquet files, or the preset with the paper's sets."""

import contextlib
import gzip
import json
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

from solar_jax.data.readers import pyarrow
from solar_jax.errors import UserError

Evaluations = Iterator[tuple[str, list[str]]]  # "FILE:RECORD" and every text in the record

# Tasks that the paper removed from its instruction data as contaminated -> the hub data set that holds each.
SOLAR = {
    "task228_arc_answer_generation_easy": "allenai/ai2_arc",
    "ai2_arc/ARC-Challenge:1.0.0": "allenai/ai2_arc",
    "ai2_arc/ARC-Easy:1.0.0": "allenai/ai2_arc",
    "task229_arc_answer_generation_hard": "allenai/ai2_arc",
    "hellaswag:1.1.0": "Rowan/hellaswag",
    "task1389_hellaswag_completion": "Rowan/hellaswag",
    "cot_gsm8k": "openai/gsm8k",
    "cot_gsm8k_ii": "openai/gsm8k",
    "drop:2.0.0": "ucinlp/drop",
    "winogrande:1.1.0": "allenai/winogrande",
}
PRESETS = {"solar": SOLAR}
_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
_NO_DATA = ("dataset_infos.json", "dataset_info.json", "state.json")


def find_evaluations(specs: list[str]) -> list[pathlib.Path]:
    """Lists the files of evaluation sets.

    Args:
      specs: each a file, a folder of files, a name of `PRESETS`, whose data sets are downloaded from the hub, or
        "PRESET=FOLDER" with a folder that holds them, each under the last part of its name.

    Raises:
      UserError: a spec matches nothing, or a data set of a preset is missing.
    """
    files: list[pathlib.Path] = []
    for spec in specs:
        preset, _, folder = spec.partition("=")
        if preset in PRESETS and not pathlib.Path(spec).exists():
            found = [_data_set(preset, name, folder) for name in dict.fromkeys(PRESETS[preset].values())]
        else:
            found = [pathlib.Path(spec).expanduser()]
        for place in found:
            files += _files(place, spec)
    return files


def read_evaluations(files: list[pathlib.Path]) -> Evaluations:
    """Yields the texts of every record, in order.

    Raises:
      UserError: a file is damaged; the message names file and record.
    """
    for file in files:
        kind = "".join(file.suffixes[-2:]) if file.suffix == ".gz" else file.suffix
        try:
            for number, record in _READERS[kind](file):
                yield f"{file}:{number}", list(_texts(record))
        except (OSError, EOFError, ValueError, zlib.error) as e:
            raise UserError(f"{file}: cannot be read: {' '.join(str(e).split())}.") from e


def _files(place: pathlib.Path, spec: str) -> list[pathlib.Path]:
    if place.is_file() and place.name.endswith(_SUFFIXES):
        return [place]
    files = sorted(p for p in place.rglob("*") if p.is_file() and p.name.endswith(_SUFFIXES) and p.name not in _NO_DATA)
    if not files:
        found = "a folder without any" if place.is_dir() else "another kind of file" if place.is_file() else "nothing"
        raise UserError(
            f"--decontaminate: {spec}: must be a preset ({', '.join(PRESETS)}), or a file or folder of JSONL, JSON or "
            f"Parquet, found {found}."
        )
    return files


def _data_set(preset: str, name: str, folder: str) -> pathlib.Path:
    """Returns the folder of one data set of a preset, downloaded from the hub unless `folder` is given."""
    last = name.split("/")[-1]
    if folder:
        place = pathlib.Path(folder).expanduser() / last
        if place.is_dir():
            return place
        raise UserError(f"--decontaminate: {preset}={folder}: must hold a folder {last} with the hub's {name}.")
    import huggingface_hub  # imported lazily, since it is slow and only presets need it

    try:
        patterns = ["*.parquet", "*.jsonl", "*.jsonl.gz"]
        return pathlib.Path(huggingface_hub.snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except Exception as e:  # the hub client raises a dozen unrelated types for a failed download
        names = ", ".join(dict.fromkeys(PRESETS[preset].values()))
        raise UserError(
            f"--decontaminate: {preset}: {name} could not be downloaded from the hub ({type(e).__name__}); give "
            f"{preset}=FOLDER with a folder that holds {names}, each under "
            "the last part of its name."
        ) from e


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _jsonl(file: pathlib.Path) -> Iterator[tuple[int, Any]]:
    with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except ValueError as e:
                    raise UserError(f"{file}:{number}: is not JSON: {e}.") from e


def _json(file: pathlib.Path) -> Iterator[tuple[int, Any]]:
    """Yields the elements of a list; any other value is a single record."""
    content = json.loads(file.read_bytes())
    yield from enumerate(content if isinstance(content, list) else [content])


def _parquet(file: pathlib.Path) -> Iterator[tuple[int, Any]]:
    parquet = pyarrow(".parquet", str(file))
    with contextlib.closing(parquet.ParquetFile(file)) as table:
        rows = (row for batch in table.iter_batches(1024) for row in batch.to_pylist())
        yield from enumerate(rows)


_READERS = {".jsonl": _jsonl, ".jsonl.gz": _jsonl, ".json": _json, ".parquet": _parquet}

"""Seed questions with their original answers, read from a file of records."""

import dataclasses
import hashlib
import json
import pathlib
from fractions import Fraction
from typing import Any

from solar_jax.data.files import File
from solar_jax.data.making.numbers import final_number
from solar_jax.data.readers import WHOLE, read_documents
from solar_jax.errors import UserError

# Keys of a question and of its answer: GSM8K's, MATH's and Alpaca's. The first that a record has are taken.
SEED_KEYS = (("question", "answer"), ("problem", "solution"), ("instruction", "output"))
_MORE = "input"  # goes on with an instruction


@dataclasses.dataclass(frozen=True)
class Seed:
    record: int  # its number in the file: lines from 1, rows from 0
    question: str
    answer: str
    number: Fraction | None  # that the answer ends in
    sha256: str  # of the record as JSON with sorted keys


def read_seeds(file: pathlib.Path) -> list[Seed]:
    """Reads the questions of a file of JSONL, JSON, Parquet or another kind of records.

    Raises:
      UserError: the file is missing, damaged or empty, or a record has no question or answer.
    """
    if not file.is_file():
        raise UserError(f"--questions: {file}: {'is a folder; name a file' if file.is_dir() else 'no such file'}.")
    seeds = []
    for number, record in read_documents(File(str(file)), WHOLE):
        assert number is not None  # a file of records
        seeds.append(_seed(number, record, f"{file}:{number}"))
    if not seeds:
        raise UserError(f"--questions: {file}: must hold records with questions, found none.")
    return seeds


def _seed(number: int, record: Any, where: str) -> Seed:
    expected = " or ".join(" and ".join(map(repr, keys)) for keys in SEED_KEYS)
    found = sorted(record) if isinstance(record, dict) else type(record).__name__
    keys = next((keys for keys in SEED_KEYS if isinstance(record, dict) and all(key in record for key in keys)), None)
    if keys is None:
        raise UserError(f"{where}: a question and its answer must be under {expected}, found {found}.")
    question, answer = (_text_under(record, key, where) for key in keys)
    if keys[0] == "instruction" and record.get(_MORE):
        question = f"{question}\n\n{_text_under(record, _MORE, where)}"
    content = json.dumps(record, sort_keys=True, ensure_ascii=False, default=str)
    return Seed(
        number, question, answer, final_number(answer), hashlib.sha256(content.encode(errors="replace")).hexdigest()
    )


def _text_under(record: dict[str, Any], key: str, where: str) -> str:
    value = record[key]
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)  # some sets have the bare number
    if not isinstance(value, str) or not value.strip():
        found = "empty text" if isinstance(value, str) else type(value).__name__
        raise UserError(f"{where}: {key!r} must hold text, found {found}; the record has the keys {sorted(record)}.")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"{where}: the text under {key!r} has a lone surrogate, which is not a character.") from e
    return value.strip()


def file_sha256(file: pathlib.Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

"""Questions read from every kind of file, and files that are refused by record and keys."""

import gzip
import json
import pathlib
from fractions import Fraction

import pyarrow
import pyarrow.parquet
import pytest

from solar_jax.data.making.seeds import read_seeds
from solar_jax.errors import UserError

RECORDS = [
    {"question": "How many?", "answer": "Some.\n#### 1,200"},
    {"problem": "What is $x$?", "solution": r"It is $\boxed{\frac{1}{2}}$.", "level": "Level 1", "type": "Algebra"},
    {"instruction": "Add.", "input": "3 and 4", "output": "The answer is 7."},
    {"instruction": "Add 3 and 4.", "input": "", "output": "No idea."},
    {"question": "How much?", "answer": 42},
]
READ = [
    ("How many?", Fraction(1200)), ("What is $x$?", Fraction(1, 2)), ("Add.\n\n3 and 4", Fraction(7)),
    ("Add 3 and 4.", None), ("How much?", Fraction(42)),
]  # fmt: skip


@pytest.mark.parametrize("name", ["q.jsonl", "q.jsonl.gz", "q.json"])
def test_questions_of_every_form_are_read(tmp_path, name):
    text = json.dumps(RECORDS) if name == "q.json" else "".join(json.dumps(r) + "\n" for r in RECORDS)
    file = tmp_path / name
    file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    seeds = read_seeds(file)
    assert [(seed.question, seed.number) for seed in seeds] == READ
    assert [seed.record for seed in seeds] == (list(range(5)) if name == "q.json" else list(range(1, 6)))
    assert len({seed.sha256 for seed in seeds}) == 5


def test_questions_are_read_from_parquet(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS[:1]), tmp_path / "q.parquet")
    (seed,) = read_seeds(tmp_path / "q.parquet")
    (tmp_path / "q.jsonl").write_text(json.dumps(RECORDS[0]))
    assert (seed.record, seed.sha256) == (0, read_seeds(tmp_path / "q.jsonl")[0].sha256)


KEYS = "under 'question' and 'answer' or 'problem' and 'solution' or 'instruction' and 'output', found"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("q.jsonl", "", "must hold records with questions, found none"),
        ("q.jsonl", '{"question": "a", "text": "b"}', f"q.jsonl:1: a question and its answer must be {KEYS} ['que"),
        ("q.jsonl", '{"question": "a", "answer": "1"}\n[1]', f"q.jsonl:2: a question and its answer must be {KEYS} li"),
        ("q.jsonl", '{"question": " ", "answer": "1"}', "q.jsonl:1: 'question' must hold text, found empty text; the"),
        ("q.jsonl", '{"question": "a", "answer": null}', "'answer' must hold text, found NoneType; the record has"),
        ("q.jsonl", '{"question": "a"', "q.jsonl:1: is not JSON"),
        ("q.txt", "How many?", "q.txt: must hold records"),
        ("q.csv", "question,answer", "q.csv: is a table"),
        ("q.parquet", "PAR1", "q.parquet: cannot be read"),
    ],
)  # fmt: skip
def test_a_file_without_questions_is_refused_by_record_and_keys(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as e:
        read_seeds(tmp_path / name)
    assert expected in str(e.value)
    assert len(str(e.value).splitlines()) == 1


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--questions: .*nowhere.jsonl: no such file"):
        read_seeds(pathlib.Path(tmp_path / "nowhere.jsonl"))
    with pytest.raises(UserError, match="is a folder; name a file"):
        read_seeds(tmp_path)

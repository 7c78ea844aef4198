"""Evaluation sets found in documents: by hand, with what must not be found; the files of sets; reports."""

import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from solar_jax.data.prepared import evaluation_sets
from solar_jax.data.prepared.decontamination import make_index
from solar_jax.data.prepared.evaluation_sets import find_evaluations, read_evaluations
from solar_jax.data.sources import Document
from solar_jax.errors import UserError
from solar_jax.prepare import Options, prepare
from tests.data.prepared.test_build import config, jsonl, random_texts

QUESTION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."


def index(*texts: str, n: int = 5):
    return make_index(((f"eval:{i}", [text]) for i, text in enumerate(texts)), n)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Before. " + QUESTION + " After.", True),
        ("NATALIA -- sold:  clips\nto   48!", True),  # five words, however written
        ("x natalia sold clips to", False),  # four
        ("Natalia sold clips of 48 of her enemies", False),  # five of eight, not in a row
        ("48 to clips sold natalia", False),  # in another order
        ("Natalia sold clips to 480 of her", False),  # a word is a whole one
        ("half as many clips in", True),
        ("May. Natalia sold clips to", False),  # not from one end of a text to its beginning
        ("", False),
    ],
)
def test_five_words_in_a_row_are_found_however_they_are_written(text, found):
    match = index(QUESTION).matches(Document("doc", text))
    assert (match is not None) == found


def test_a_match_tells_document_record_words_and_how_often():
    match = index("one two three", QUESTION, "a b c d e f").matches(Document("doc", "So: A b, c d e f g! A B C D E."))
    assert match is not None
    assert (match.document, match.evaluation, match.words, match.places) == ("doc", "eval:2", "a b c d e", 3)


def test_words_of_two_texts_are_not_in_a_row():
    both = make_index(iter([("eval:0", ["one two three", "four five six seven eight"])]), 5)
    assert both.matches(Document("doc", "one two three four five")) is None
    assert both.matches(Document("doc", "three four five six seven eight")) is not None
    assert both.short == 0


def test_records_with_too_few_words_are_counted_and_if_all_are_it_is_refused():
    assert index("too short", QUESTION, "also").short == 2
    with pytest.raises(UserError, match="none of 2 records has 5 words in a row"):
        index("too short", "also")


def test_all_runs_and_no_others_are_found():
    # Against looking at every run of words.
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcd"), rng.integers(0, 12))) for _ in range(400)]
    sets, documents = texts[:100], texts[100:]
    runs = {tuple(t.split()[i : i + 5]) for t in sets for i in range(len(t.split()) - 4)}
    made = index(*sets)
    assert len(made.hashes) == len(runs)
    for text in documents:
        words = text.split()
        expected = sum(tuple(words[i : i + 5]) in runs for i in range(len(words) - 4))
        match = made.matches(Document("doc", text))
        assert (0 if match is None else match.places) == expected


def test_files_of_every_kind_are_read_with_all_their_texts(tmp_path):
    record = {"id": 3, "question": "what is", "choices": {"text": ["a", "b"], "label": ["A"]}, "none": None}
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n\n" + json.dumps(record) + "\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(record).encode()))
    (tmp_path / "c.json").write_text(json.dumps([record, record]))
    (tmp_path / "sub").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "sub" / "d.parquet")
    (tmp_path / "README.md").write_text("no set")
    (tmp_path / "dataset_infos.json").write_text('{"description": "no set"}')
    found = list(read_evaluations(find_evaluations([str(tmp_path)])))
    assert [name.removeprefix(f"{tmp_path}/") for name, _ in found] == [
        "a.jsonl:1", "a.jsonl:3", "b.jsonl.gz:1", "c.json:0", "c.json:1", "sub/d.parquet:0",
    ]  # fmt: skip
    assert all(texts == ["what is", "a", "b", "A"] for _, texts in found)


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text', "a.jsonl:2: is not JSON"),
        ("a.json", b"[1, 2", "a.json: cannot be read"),
        ("a.parquet", b"PAR1", "a.parquet: cannot be read"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: cannot be read"),
        (
            "a.csv",
            b"x,y",
            "must be a preset (solar), or a file or folder of JSONL, JSON or Parquet, found another kind of file",
        ),
    ],
)
def test_a_damaged_set_is_told_by_file_and_record(tmp_path, name, data, expected):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as e:
        list(read_evaluations(find_evaluations([str(tmp_path / name)])))
    assert expected in str(e.value)


def test_a_set_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="found nothing"):
        find_evaluations([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="found a folder without any"):
        find_evaluations([str(tmp_path)])


def test_the_papers_preset_is_its_ten_names_and_a_folder_stands_in_for_the_hub(tmp_path, monkeypatch):
    assert len(evaluation_sets.SOLAR) == 10
    names = ["ai2_arc", "hellaswag", "gsm8k", "drop", "winogrande"]
    for name in names:
        (tmp_path / name / "data").mkdir(parents=True)
        jsonl(tmp_path / name / "data" / "test.jsonl", [f"of {name}"])
    found = find_evaluations([f"solar={tmp_path}"])
    assert [file.parts[-3] for file in found] == names
    (tmp_path / "drop" / "data" / "test.jsonl").unlink()
    with pytest.raises(UserError, match="found a folder without any"):
        find_evaluations([f"solar={tmp_path}"])
    (tmp_path / "drop" / "data").rmdir()
    (tmp_path / "drop").rmdir()
    with pytest.raises(UserError, match="must hold a folder drop with the hub's ucinlp/drop"):
        find_evaluations([f"solar={tmp_path}"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="allenai/ai2_arc could not be downloaded from the hub"):
        find_evaluations(["solar"])


def test_contaminated_documents_are_left_out_of_training_and_reported(tiny, tmp_path):
    texts = random_texts(5, 60)
    clean, dirty = texts[:40], [f"{text} so, {QUESTION}" for text in texts[40:]]
    data, sets = jsonl(tmp_path / "data.jsonl", clean + dirty), jsonl(tmp_path / "eval.jsonl", ["short", QUESTION])
    options = Options(1, decontaminate=(str(sets),))
    manifest = prepare(config(tiny, data), tmp_path / "out", options)
    report = manifest["decontamination"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "contaminated.jsonl").read_text().splitlines()]
    heldout = manifest["totals"]["heldout"]["documents"]
    assert 10 < len(lines) < 20  # the rest is held out
    assert report["documents"] == manifest["sources"][0]["contaminated"] == len(lines)
    assert (report["words_in_a_row"], report["records"], report["records_too_short"]) == (13, 2, 1)
    assert report["by_file"] == {str(sets): len(lines)}
    assert lines[0] in report["examples"]
    assert {line["evaluation"] for line in lines} == {f"{sets}:2"}
    assert all(int(line["document"].rsplit(":", 1)[1]) > 40 for line in lines)
    assert lines[0]["words"] == "natalia sold clips to 48 of her friends in april and then she"
    assert lines[0]["places"] == len(QUESTION.split()) - 12
    kept = manifest["totals"]["train"]["documents"]
    assert kept + len(lines) + heldout == sum(bool(text) for text in clean + dirty)
    # The same without them, and nothing is left out of what shares no 13 words.
    clean_data = jsonl(tmp_path / "clean.jsonl", clean)
    assert prepare(config(tiny, clean_data), tmp_path / "none", options)["decontamination"]["documents"] == 0

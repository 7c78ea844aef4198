"""Prepared folders: the rows of packing on the fly, whatever the workers; duplicates and evaluation sets left out."""

import dataclasses
import json
import pathlib
import pickle
import resource

import numpy as np
import pytest

from solar_jax import prepare as command
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.tokenizer import eos_id, load_tokenizer
from solar_jax.config import Config, DataConfig
from solar_jax.data import packing
from solar_jax.data.corpus import heldout_rows, load_corpus
from solar_jax.data.pipeline import batch_documents, training_rows
from solar_jax.data.prepared import engines, records, shards
from solar_jax.data.prepared.rows import Prepared, is_prepared, open_prepared
from solar_jax.errors import UserError
from solar_jax.prepare import Options, prepare
from solar_jax.storage.atomic_folder import partial
from tests.conftest import byte_tokenizer

EOS = 2
LENGTH = 32


def jsonl(file: pathlib.Path, texts: list[str]) -> pathlib.Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def random_texts(seed: int, count: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("abcdef "), n)) for n in rng.integers(0, 90, count)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of some 400 characters and shards of 4 blocks, so that there are several of each."""
    monkeypatch.setattr(packing, "_BLOCK_CHARACTERS", 400)
    monkeypatch.setattr(packing, "_ROWS_A_BLOCK", 1)
    monkeypatch.setattr(shards, "BLOCKS_A_SHARD", 4)
    monkeypatch.setattr(command, "_WORTH_A_PROCESS", 1)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("texts")
    jsonl(folder / "a.jsonl", random_texts(0, 150))
    jsonl(folder / "b.jsonl", random_texts(1, 60))
    (folder / "c.txt").write_text("one two three four five " * 100)
    return folder


def config(tiny, *sources, **data) -> Config:
    cfg = DataConfig(tuple(map(str, sources)), sequence_length=LENGTH, holdout_every=4, **data)
    return Config(source=str(tiny), data=cfg)


def opened(cfg: Config, folder: pathlib.Path) -> Prepared:
    checkpoint = open_checkpoint(cfg.source)
    return open_prepared(str(folder), load_tokenizer(checkpoint), eos_id(checkpoint), cfg.data)


def content(folder: pathlib.Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def assert_same_rows(found, expected):
    assert len(found) == len(expected)
    assert found.tokens == expected.tokens
    for i in range(len(expected)):
        assert found.documents(i) == expected.documents(i)
        for name, value in expected[i].items():
            np.testing.assert_array_equal(found[i][name], value, err_msg=name)
            assert found[i][name].dtype == value.dtype


FORMS = [
    {"packing": "best_fit"},
    {"packing": "concat"},
    {"packing": "concat", "mask_documents": False},
    {"packing": "best_fit", "holdout": "position"},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("name", ["a.jsonl", "c.txt"])
def test_rows_are_those_of_packing_on_the_fly(tiny, texts, tmp_path, form, name):
    # c.txt is one document, so that its end is held out.
    cfg = config(tiny, texts / name, **form)
    prepare(cfg, tmp_path / "out", Options(1))
    found, corpus = opened(cfg, tmp_path / "out"), load_corpus(cfg.data, byte_tokenizer(), EOS)
    assert len(found.train.shards) > 1 or name == "c.txt"
    assert_same_rows(found.train, corpus.train[0][1])
    assert_same_rows(found.heldout, corpus.heldout[0][1])


def test_rows_can_be_sent_to_other_processes(tiny, texts, tmp_path):
    cfg = config(tiny, texts / "a.jsonl")
    prepare(cfg, tmp_path / "out", Options(1))
    rows = opened(cfg, tmp_path / "out").train
    rows[0]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(rows))[3]["tokens"], rows[3]["tokens"])


@pytest.mark.parametrize("packing_name", ["best_fit", "concat"])
def test_any_number_of_workers_gives_the_same_bytes(tiny, texts, tmp_path, monkeypatch, packing_name):
    cfg = config(tiny, texts / "a.jsonl", texts / "b.jsonl", packing=packing_name)
    seen = jsonl(tmp_path / "seen.jsonl", ["one two three four five", random_texts(0, 150)[17]])
    options = Options(1, dedup=True, decontaminate=(str(seen),), ngram=4)
    prepare(cfg, tmp_path / "one", options)
    assert len(list((tmp_path / "one").glob("train-*"))) > 3
    prepare(cfg, tmp_path / "three", dataclasses.replace(options, workers=3))
    assert content(tmp_path / "three") == content(tmp_path / "one")

    def backwards(work, items, workers):  # as if the last block were always ready first
        del workers
        items = list(items)
        yield from reversed([work(item) for item in reversed(items)])

    monkeypatch.setitem(engines.ENGINES, "backwards", backwards)
    prepare(cfg, tmp_path / "backwards", dataclasses.replace(options, engine="backwards"))
    assert content(tmp_path / "backwards") == content(tmp_path / "one")


class Killed(BaseException):
    """Nothing handles it, as nothing handles the end of a process."""


@pytest.mark.parametrize("packing_name", ["best_fit", "concat"])
def test_a_run_that_stops_anywhere_goes_on_to_the_same_bytes(tiny, texts, tmp_path, monkeypatch, packing_name):
    cfg = config(tiny, texts / "a.jsonl", texts / "b.jsonl", packing=packing_name)
    options = Options(1, dedup=True)
    prepare(cfg, tmp_path / "whole", options)
    out = tmp_path / "out"
    worked: list[int] = []

    def stopping(after):
        def engine(work, items, workers):
            del workers
            for i, item in enumerate(items):
                if i == after:
                    raise Killed
                worked.append(1)
                yield work(item)

        return engine

    for after in (0, 3, 6, 9, 11):
        monkeypatch.setitem(engines.ENGINES, "local", stopping(after))
        with pytest.raises(Killed):
            prepare(cfg, out, options)
        assert not out.exists()
        assert not is_prepared(str(out))
    monkeypatch.setitem(engines.ENGINES, "local", stopping(-1))
    before = len(worked)
    kept = {f.name: f.stat().st_mtime_ns for f in (partial(out) / "shards").glob("*.array_record")}
    assert len(kept) > 3
    prepare(cfg, out, options)
    assert content(out) == content(tmp_path / "whole")
    # Finished shards were not made again.
    blocks = sum(s["blocks"] for s in json.loads((out / "manifest.json").read_text())["shards"])
    assert len(worked) - before == blocks - 4 * len(kept)


def test_a_run_that_stops_while_files_are_named_goes_on(tiny, texts, tmp_path, monkeypatch):
    cfg = config(tiny, texts / "a.jsonl", texts / "b.jsonl")
    prepare(cfg, tmp_path / "whole", Options(1))
    out, real, left = tmp_path / "out", command.manifest.os.replace, [0]

    def replace(source, target):
        if "-of-" in target.name:
            left[0] += 1
            if left[0] == 3:
                raise Killed
        real(source, target)

    monkeypatch.setattr(command.manifest.os, "replace", replace)
    with pytest.raises(Killed):
        prepare(cfg, out, Options(1))
    assert len(list(partial(out).glob("train-*"))) == 2
    prepare(cfg, out, Options(1))
    assert content(out) == content(tmp_path / "whole")


def test_a_full_disk_is_told_and_what_was_made_stays(tiny, texts, tmp_path, monkeypatch):
    cfg, out = config(tiny, texts / "a.jsonl"), tmp_path / "out"
    prepare(cfg, tmp_path / "whole", Options(1))
    real, made = records.writer, []

    def limited(path: str):
        made.append(path)
        if len(made) == 4:  # from here on no file may grow beyond a few blocks
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        return real(path)

    monkeypatch.setattr(records, "writer", limited)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(UserError, match=r"cannot be written: .*File too large"):
            prepare(cfg, out, Options(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not out.exists()
    assert len(list((partial(out) / "shards").glob("*.json"))) >= 1
    prepare(cfg, out, Options(1))
    assert content(out) == content(tmp_path / "whole")


def test_documents_that_changed_meanwhile_are_noticed_and_made_anew(tiny, tmp_path, monkeypatch):
    file, out = jsonl(tmp_path / "a.jsonl", random_texts(0, 150)), tmp_path / "out"
    cfg = config(tiny, file)

    def stopping(work, items, workers):
        del workers
        for i, item in enumerate(items):
            if i == 7:
                raise Killed
            yield work(item)

    monkeypatch.setitem(engines.ENGINES, "stopping", stopping)
    with pytest.raises(Killed):
        prepare(cfg, out, Options(1, engine="stopping"))
    jsonl(file, ["another", *random_texts(0, 150)[1:]])
    with pytest.raises(UserError, match="changed since an interrupted run of prepare"):
        prepare(cfg, out, Options(1))
    prepare(cfg, out, Options(1))
    prepare(cfg, tmp_path / "fresh", Options(1))
    assert content(out) == content(tmp_path / "fresh")


def test_of_texts_that_come_again_the_first_stays_across_sources(tiny, tmp_path):
    a = jsonl(tmp_path / "a.jsonl", ["first", "second", "first", "Second", *random_texts(2, 30)])
    b = jsonl(tmp_path / "b.jsonl", ["third", "second", "third ", *random_texts(3, 30)])
    found = {}
    for dedup in (False, True):
        out = tmp_path / f"out{dedup}"
        manifest = prepare(config(tiny, a, b), out, Options(1, dedup=dedup))
        found[dedup] = [s["duplicates"] for s in manifest["sources"]]
    assert found == {False: [0, 0], True: [1, 1]}  # of another case, or with a space more, a text is another
    assert not (tmp_path / "outFalse" / "duplicates.jsonl").exists()
    lines = [json.loads(line) for line in (tmp_path / "outTrue" / "duplicates.jsonl").read_text().splitlines()]
    expected = [
        {"document": f"{a}:3", "same_as": f"{a}:1"},
        {"document": f"{b}:2", "same_as": f"{a}:2"},
    ]
    assert lines == expected
    assert manifest["duplicates"] == {"documents": 2, "report": "duplicates.jsonl", "examples": expected}
    rows = opened(config(tiny), tmp_path / "outTrue")
    documents = {d for part in (rows.train, rows.heldout) for i in range(len(part)) for d in part.documents(i)}
    assert f"{a}:1" in documents
    assert not {f"{a}:3", f"{b}:2"} & documents


def test_the_manifest_tells_what_the_rows_are(tiny, texts, tmp_path):
    cfg = dataclasses.replace(config(tiny, texts / "a.jsonl", texts / "b.jsonl"), seed=7)
    manifest = prepare(cfg, tmp_path / "out", Options(1))
    assert (manifest["format"], manifest["sequence_length"], manifest["packing"], manifest["seed"]) == (
        1, LENGTH, "best_fit", 7,
    )  # fmt: skip
    assert manifest["holdout"] == {"rule": "hash", "every": 4}
    assert (manifest["tokenizer"]["eos"], manifest["tokenizer"]["vocabulary"]) == (EOS, 259)
    for k, name in enumerate(("a", "b")):
        source = manifest["sources"][k]
        whole = [t for t in random_texts(k, 150 if name == "a" else 60) if t]
        assert source["path"] == str(texts / f"{name}.jsonl")
        assert source["files"] == [str(texts / f"{name}.jsonl")]
        assert (source["documents"], source["text_bytes"]) == (len(whole), sum(map(len, whole)))
        assert source["train"]["documents"] + source["heldout"]["documents"] == len(whole)
        # Of every byte a token, of every document an end; each is a target but the documents' first tokens.
        assert sum(source[p]["document_tokens"] for p in ("train", "heldout")) == sum(len(t) + 1 for t in whole)
        assert sum(source[p]["tokens"] for p in ("train", "heldout")) == sum(map(len, whole))
    train = [s for s in manifest["shards"] if s["part"] == "train"]
    assert [s["file"] for s in train] == [f"train-{k:05d}-of-{len(train):05d}.array_record" for k in range(len(train))]
    assert [s["source"] for s in train] == sorted(s["source"] for s in train)
    rows = opened(cfg, tmp_path / "out").train
    assert (len(rows), rows.tokens) == (manifest["totals"]["train"]["rows"], manifest["totals"]["train"]["tokens"])
    # The range of a shard's documents.
    numbers = [int(d.rsplit(":", 1)[1]) for i in range(train[0]["rows"]) for d in rows.documents(i)]
    assert (min(numbers), max(numbers)) == tuple(int(train[0][k].rsplit(":", 1)[1]) for k in ("first", "last"))


def test_each_of_several_sources_can_be_opened_alone(tiny, texts, tmp_path):
    cfg = config(tiny, texts / "a.jsonl", texts / "b.jsonl")
    prepare(cfg, tmp_path / "out", Options(1))
    prepare(config(tiny, texts / "b.jsonl"), tmp_path / "b", Options(1))
    alone = opened(cfg, tmp_path / "out" / "1-b.manifest.json")
    assert is_prepared(str(tmp_path / "out" / "1-b.manifest.json"))
    assert_same_rows(alone.train, opened(cfg, tmp_path / "b").train)
    both = opened(cfg, tmp_path / "out")
    first = opened(cfg, tmp_path / "out" / "0-a.manifest.json")
    assert len(both.train) == len(first.train) + len(alone.train)


@pytest.mark.parametrize(
    ("source", "expected"),
    [("nothing.jsonl", "no such file"), ("a.jsonl?limit=100", "are for train"), ("a.jsonl?epochs=2", "are for train")],
)
def test_a_source_that_cannot_be_prepared_is_refused_and_leaves_nothing(tiny, texts, tmp_path, source, expected):
    with pytest.raises(UserError, match=expected):
        prepare(config(tiny, f"{texts}/{source}"), tmp_path / "out", Options(1))
    assert list(tmp_path.iterdir()) == []


def test_prepared_rows_are_not_prepared_again_and_a_taken_folder_is_not_replaced(tiny, texts, tmp_path):
    cfg, out = config(tiny, texts / "a.jsonl"), tmp_path / "taken"
    prepare(cfg, out, Options(1))
    with pytest.raises(UserError, match="is already prepared"):
        prepare(config(tiny, out), tmp_path / "out", Options(1))
    with pytest.raises(UserError, match="already exists"):
        prepare(cfg, out, Options(1))


def test_a_run_reads_the_same_batches_prepared_or_packed_at_its_start(tiny, texts, tmp_path):
    cfg = config(tiny, f"{texts}/a.jsonl:2", f"{texts}/b.jsonl")
    prepare(cfg, tmp_path / "out", Options(1))
    named = [f"{tmp_path}/out/0-a.manifest.json:2", f"{tmp_path}/out/1-b.manifest.json"]
    data = dataclasses.replace(cfg.data, sources=tuple(named))
    corpora = [load_corpus(d, byte_tokenizer(), EOS) for d in (cfg.data, data)]
    first, second = (training_rows(corpus, 3) for corpus in corpora)
    for i in range(300):  # more than one pass
        for name, value in first[i].items():
            np.testing.assert_array_equal(second[i][name], value)
    assert batch_documents(corpora[1], 3, 10, 8) == batch_documents(corpora[0], 3, 10, 8)
    for found, expected in zip(*(heldout_rows(corpus, 20) for corpus in corpora), strict=True):
        np.testing.assert_array_equal(found["targets"], expected["targets"])

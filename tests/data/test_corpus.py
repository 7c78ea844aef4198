"""Sources of a run: prepared folders next to text, the same batches from either, and limits of both."""

import contextlib
import dataclasses
import json
import pathlib

import numpy as np
import pytest
from absl import flags

from solar_jax.config import Config, DataConfig
from solar_jax.data.corpus import Corpus, load_corpus
from solar_jax.data.pipeline import Feed, batch_documents, training_rows
from solar_jax.errors import UserError
from solar_jax.parallel.rules import batch_sharding
from solar_jax.prepare import Options, prepare
from tests.conftest import byte_tokenizer
from tests.parallel.test_mesh import mesh_of

EOS, LENGTH = 2, 32


def config(*sources: str) -> DataConfig:
    return DataConfig(sources, sequence_length=LENGTH, holdout_every=4)


def load(*sources: str) -> Corpus:
    return load_corpus(config(*sources), byte_tokenizer(), EOS)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> pathlib.Path:
    """a.jsonl and b.jsonl, and a.jsonl prepared as `prepared`."""
    found, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    for name in "ab":
        lines = [json.dumps({"text": "".join(rng.choice(list("abcdef"), n))}) for n in rng.integers(1, 90, 200)]
        (found / f"{name}.jsonl").write_text("\n".join(lines))
    prepare(Config(source=str(tiny), data=config(f"{found}/a.jsonl")), found / "prepared", Options(workers=1))
    return found


def batches(corpus: Corpus, workers: int = 0) -> list[dict[str, np.ndarray]]:
    feed = Feed(training_rows(corpus, 0), 3, 4, 4, batch_sharding(mesh_of(1, 1, 1)), workers)
    with contextlib.closing(feed):
        return [{name: np.asarray(x) for name, x in feed(k).items()} for k in range(30)]


def assert_same(found: list[dict[str, np.ndarray]], expected: list[dict[str, np.ndarray]]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for name, value in b.items():
            np.testing.assert_array_equal(a[name], value)


def test_a_mixture_of_prepared_rows_and_text_has_the_batches_of_text_alone(folder):
    text, mixed = (load(f"{folder}/{name}:3", f"{folder}/b.jsonl") for name in ("a.jsonl", "prepared"))
    assert_same(batches(mixed), batches(text))
    assert batch_documents(mixed, 0, 7, 4) == batch_documents(text, 0, 7, 4)


@pytest.mark.slow  # new processes import for seconds
def test_worker_processes_read_prepared_rows(folder):
    flags.FLAGS.mark_as_parsed()  # as a command's start does; grain reads flags of its own
    corpus = load(f"{folder}/prepared")
    assert_same(batches(corpus, workers=2), batches(corpus))


def test_a_limit_takes_the_first_prepared_rows(folder):
    whole, cut = load(f"{folder}/prepared"), load(f"{folder}/prepared?limit=1000")
    for (_, rows), (_, first), limit in ((whole.train[0], cut.train[0], 1000), (whole.heldout[0], cut.heldout[0], 333)):
        assert len(first) == int(limit / (rows.tokens / len(rows)))
        assert first.tokens <= limit
        assert first.documents(2) == rows.documents(2)
        np.testing.assert_array_equal(first[len(first) - 1]["tokens"], rows[len(first) - 1]["tokens"])
        with pytest.raises(IndexError):
            first[len(first)]


def test_a_limit_under_one_row_is_refused(folder):
    with pytest.raises(UserError, match="prepared has 0 training tokens within its limit of 3, but a row of"):
        load(f"{folder}/prepared?limit=3")


def test_a_folder_prepared_in_another_way_is_refused(folder):
    cfg = dataclasses.replace(config(f"{folder}/prepared"), sequence_length=16)
    with pytest.raises(UserError, match=r"was prepared with config\.data\.sequence_length=32, but this run has 16"):
        load_corpus(cfg, byte_tokenizer(), EOS)

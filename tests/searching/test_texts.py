"""Texts of a search: whose document each target is, what is held out stays out, errors by document."""

import numpy as np
import pytest

from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.tokenizer import eos_id, load_tokenizer
from solar_jax.config import DataConfig
from solar_jax.data.corpus import load_corpus
from solar_jax.data.packing import pack
from solar_jax.data.sources import Document, Source, part, split
from solar_jax.searching.texts import (
    SearchText,
    by_document,
    heldout_text,
    mean_and_error,
    other_text,
    text_of_rows,
    training_texts,
)
from tests.conftest import byte_tokenizer

EOS = 2


def text_of(packing: str, *texts: str, length: int = 4) -> SearchText:
    """A text of all rows of some documents, a token a character."""
    documents = [Document(f"d{i}", text) for i, text in enumerate(texts)]
    rows = pack(documents, byte_tokenizer(), EOS, length, packing=packing, mask_documents=packing == "best_fit")
    return text_of_rows("made", [(rows, i) for i in range(len(rows))])


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_every_target_belongs_to_the_document_it_is_from(packing):
    """Documents of one letter each: a target other than the end tells its document."""
    text = text_of(packing, "aaaaaa", "bb", "ccc", "d", "eeeee")
    letters = {byte_tokenizer().token_to_id(x): f"d{i}" for i, x in enumerate("abcde")}
    checked = 0
    for row, owners in zip(text.rows, text.owners, strict=True):
        for target, weight, owner in zip(row["targets"].tolist(), row["weights"], owners, strict=True):
            if weight and target in letters:
                assert text.documents[owner] == letters[target]
                checked += 1
            assert weight == 0 or owner >= 0
    assert checked > 8


def test_the_search_reads_no_document_that_a_run_holds_out(tiny):
    c = open_checkpoint(str(tiny))
    cfg = DataConfig(sequence_length=256, holdout="position")
    corpus = load_corpus(cfg, load_tokenizer(c), eos_id(c))
    search, final = training_texts(corpus, 2048)
    source = Source("pydoc-topics")
    held_out = {d.id for d in part(source, split(source, 8, "position"), held_out=True)}
    assert len(held_out) > 5
    assert not held_out & ({*search.documents} | {*final.documents})
    assert {*heldout_text(corpus, 8).documents} <= held_out
    assert len(search.documents) >= 6
    assert search.sha256() != final.sha256()
    assert not {row["tokens"].tobytes() for row in search.rows} & {row["tokens"].tobytes() for row in final.rows}


def test_sums_by_document_add_up_to_the_loss_and_to_those_of_parts():
    text = text_of("best_fit", "aaaaaa", "bb", "ccc", "d", "eeeee", "ffffff")
    values = np.random.default_rng(0).random(text.owners.shape)
    sums, counts = by_document(values, text)
    assert counts.sum() == text.tokens
    assert mean_and_error(sums, counts)[0] == pytest.approx((values * text.weights).sum() / text.weights.sum())
    parts = [by_document(values[i : i + 2], text, i) for i in range(0, len(values), 2)]
    assert np.sum([p[0] for p in parts], axis=0) == pytest.approx(sums)


def test_the_standard_error_is_over_documents_not_tokens():
    # Three documents of 10 tokens with differences 1, 2, 3 a token: mean 2, deviation 1, error 1 / sqrt 3.
    mean, error = mean_and_error(np.array([10.0, 20.0, 30.0]), np.array([10.0, 10.0, 10.0]))
    assert (mean, error) == (2.0, pytest.approx(3**-0.5))
    # Documents that no row has do not count.
    assert mean_and_error(np.array([10.0, 20.0, 30.0, 0.0]), np.array([10.0, 10.0, 10.0, 0.0])) == (mean, error)


def test_the_other_domain_is_code_of_many_modules():
    text = other_text("python-stdlib", byte_tokenizer(), EOS, 64, 6, 320)
    assert len(text.rows) == 6
    assert len(text.documents) >= 6
    assert all(name.startswith("python-stdlib:") for name in text.documents)

"""Held-out documents: apart from training text, halves that do not meet, and losses of each as if it were alone."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solar_jax.checkpoints.load import load_params
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.tokenizer import eos_id, load_tokenizer
from solar_jax.config import MeshConfig
from solar_jax.data.corpus import load_corpus
from solar_jax.errors import UserError
from solar_jax.model import llama
from solar_jax.parallel import rules
from solar_jax.parallel.mesh import make_mesh
from solar_jax.studying.documents import choose_documents, make_target_step, packed_rows
from solar_jax.training.partition import everything
from tests.studying.studies import WORDS, made


def chosen(study):
    c = open_checkpoint(study.run.source)
    return choose_documents(study, load_tokenizer(c), eos_id(c), c.cfg.vocab_size)


def test_a_documents_loss_is_that_of_the_model_that_reads_it_alone(parts):
    c = open_checkpoint(str(parts / "model"))
    study, params = made(parts), load_params(c)
    rng = np.random.default_rng(0)
    streams = [rng.integers(3, 320, n).astype(np.int32) for n in (5, 20, 9, 70, 2)]  # 70: pieces of 32, 32 and 5
    documents = chosen(study)
    object.__setattr__(documents, "ids", tuple("abcde"))
    object.__setattr__(documents, "rows", packed_rows("abcde", streams, 32))
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    step = make_target_step(c.cfg, study.run.train, 32, mesh, everything(c.cfg))
    found = documents.losses(step, params, documents.batches(2, rules.batch_sharding(mesh)))

    def alone(piece: np.ndarray) -> float:
        tokens = jnp.array(piece[None, :-1])
        logits = llama.logits(c.cfg, params, tokens, jnp.arange(tokens.shape[1])[None], jnp.zeros_like(tokens))
        return -float(jnp.sum(jax.nn.log_softmax(logits)[0, jnp.arange(tokens.shape[1]), piece[1:]]))

    pieces = [[s[a : a + 33] for a in range(0, len(s) - 1, 32)] for s in streams]
    assert [len(p) for p in pieces] == [1, 1, 1, 3, 1]
    expected = [sum(map(alone, p)) for p in pieces]
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_halves_do_not_meet_and_no_document_is_in_training_rows(parts):
    study = made(parts)
    documents = chosen(study)
    assert np.array_equal(documents.split("validation"), ~documents.split("test"))
    assert min(documents.validation.sum(), (~documents.validation).sum()) >= 8
    c = open_checkpoint(study.run.source)
    corpus = load_corpus(study.run.data, load_tokenizer(c), eos_id(c))
    (_, train), (_, heldout) = corpus.train[0], corpus.heldout[0]
    trained = {name for i in range(len(train)) for name in train.documents(i)}
    held = {name for i in range(len(heldout)) for name in heldout.documents(i)}
    assert set(documents.ids) == held  # a negative control: the names are those of the same documents
    assert not set(documents.ids) & trained
    texts = [json.loads(line)["text"] for line in (parts / "docs.jsonl").read_text().splitlines()]
    first = documents.ids[0]
    assert documents.tokens[0] == len(texts[int(first.rpartition(":")[2]) - 1])  # bytes, and then the end of text


def test_the_first_documents_by_hash_are_taken_and_cut(parts):
    every, few = chosen(made(parts)), chosen(made(parts, validation_documents=3, test_documents=4, document_tokens=7))
    for split, count in (("validation", 3), ("test", 4)):
        of = [i for i, inside in zip(every.ids, every.split(split), strict=True) if inside]
        assert [i for i, inside in zip(few.ids, few.split(split), strict=True) if inside] == of[:count]
    assert set(few.tokens) == {7}
    assert few.fingerprint != every.fingerprint
    assert chosen(made(parts)).fingerprint == every.fingerprint


def test_a_document_that_training_text_holds_is_in_neither_half(parts, tmp_path):
    texts = [" ".join(WORDS[(i * 7 + k * k) % 12] for k in range(9)) + f" {i}" for i in range(64)]
    # By position, documents 0, 4, 8 ... are held out, whatever their text.
    texts[4] = texts[1].replace(" ", "  ")  # one that also is a training document
    texts[8] = texts[5][3:-2]  # a part of one
    texts[16] = texts[12]  # held out twice
    file = tmp_path / "docs.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    documents = chosen(made(parts, run_data_sources=(str(file),), run_data_holdout="position"))
    left_out = {f"docs.jsonl:{i + 1}" for i in (4, 8, 16)}
    assert len(documents.ids) == 16 - 3
    assert not left_out & set(documents.ids)
    assert documents.note.startswith(
        "13 held-out documents; left out: 2 that are a training document or held out twice"
    )
    assert documents.note.endswith("1 that are part of one")


def test_too_few_documents_are_refused(parts):
    with pytest.raises(UserError, match=r"held-out document\(s\) for the (validation|test) text of the study, which"):
        chosen(made(parts, run_data_holdout_every=100))

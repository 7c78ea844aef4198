"""Tokens that do not stand for their text are noticed: cut, unknown, or beyond the model's embedding."""

import json
import pathlib

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.tokenizer import load_tokenizer
from solar_jax.config import Config, DataConfig
from solar_jax.data.corpus import load_corpus
from solar_jax.data.doubts import tokens_of_text
from solar_jax.data.prepared.rows import open_prepared
from solar_jax.data.sources import Source
from solar_jax.errors import UserError
from solar_jax.prepare import Options, prepare
from tests.conftest import byte_tokenizer, hf_model, save_hf

TEXT = "depth up scaling grows a model by its own layers " * 40


@pytest.fixture
def text(tmp_path) -> pathlib.Path:
    (tmp_path / "a.txt").write_text(TEXT)
    return tmp_path / "a.txt"


def test_a_tokenizer_that_cuts_its_text_is_noticed(text):
    tokenizer = byte_tokenizer()
    assert tokens_of_text(Source(str(text)), tokenizer) == "1.00 characters a token in the first 1 document(s)"
    tokenizer.enable_truncation(64)
    assert "WARNING: text has fewer than 16, so this tokenizer" in tokens_of_text(Source(str(text)), tokenizer)


def test_a_tokenizer_that_knows_none_of_the_words_is_noticed(text):
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "Tiefe": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert "WARNING: 100 % of the tokens are <unk>" in tokens_of_text(Source(str(text)), tokenizer)


@pytest.fixture(scope="module")
def larger(tmp_path_factory) -> pathlib.Path:
    """A model of 256 bytes and three tokens whose tokenizer has a fourth, as after `add_tokens` without resizing."""
    folder = save_hf(hf_model(vocab_size=259, num_hidden_layers=1), tmp_path_factory.mktemp("larger") / "m")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def config(model: pathlib.Path, text: pathlib.Path, **data) -> Config:
    return Config(source=str(model), data=DataConfig((str(text),), sequence_length=32, holdout_every=4, **data))


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_a_token_beyond_the_embedding_is_refused_where_it_occurs(larger, text, tmp_path, capsys, packing):
    c = open_checkpoint(str(larger))
    tokenizer = load_tokenizer(c)
    assert "ids up to 259, more than the model's vocab_size of 259" in capsys.readouterr().out
    cfg = config(larger, text, packing=packing)
    assert load_corpus(cfg.data, tokenizer, 2, c.cfg.vocab_size).train
    prepare(cfg, tmp_path / "prepared", Options(workers=1))
    assert json.loads((tmp_path / "prepared" / "manifest.json").read_text())["tokens_below"] == 259
    text.write_text(TEXT + "<|im_end|>" + TEXT)
    expected = f"{text}: has the token '<|im_end|>' of id 259, but the model's vocab_size is 259; remove that text"
    with pytest.raises(UserError, match=expected.replace("|", r"\|")):
        load_corpus(cfg.data, tokenizer, 2, c.cfg.vocab_size)
    with pytest.raises(UserError, match=expected.replace("|", r"\|")):
        prepare(cfg, tmp_path / "again", Options(workers=1))


def test_prepared_tokens_beyond_the_embedding_of_another_model_are_refused(tiny, text, tmp_path):
    cfg = config(tiny, text)
    prepare(cfg, tmp_path / "prepared", Options(workers=1))
    tokenizer = load_tokenizer(open_checkpoint(str(tiny)))
    assert open_prepared(str(tmp_path / "prepared"), tokenizer, 2, cfg.data, 259).train
    with pytest.raises(UserError, match=r"was prepared for tokens below 259, but this model's vocab_size is 258\."):
        open_prepared(str(tmp_path / "prepared"), tokenizer, 2, cfg.data, 258)

"""Prepared folders opened: what is one, and what is refused."""

import dataclasses
import pathlib
import shutil

import pytest

from solar_jax.config import Config
from solar_jax.data.prepared.rows import is_prepared, open_prepared
from solar_jax.errors import UserError
from solar_jax.prepare import Options, prepare
from tests.conftest import byte_tokenizer
from tests.data.prepared.test_build import EOS, LENGTH, config, jsonl, opened, random_texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("texts")
    jsonl(folder / "a.jsonl", random_texts(0, 150))
    return folder


@pytest.fixture(scope="module")
def prepared(tiny, texts, tmp_path_factory) -> tuple[Config, pathlib.Path]:
    out = tmp_path_factory.mktemp("prepared") / "out"
    cfg = config(tiny, texts / "a.jsonl")
    prepare(cfg, out, Options(1))
    return cfg, out


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"sequence_length": 64}, "config.data.sequence_length=32, but this run has 64"),
        ({"packing": "concat"}, "config.data.packing='best_fit', but this run has 'concat'"),
    ],
)
def test_rows_of_another_form_are_refused(prepared, changed, expected):
    cfg, out = prepared
    with pytest.raises(UserError) as e:
        opened(dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **changed)), out)
    assert expected in str(e.value)


def test_another_tokenizer_is_refused(prepared):
    cfg, out = prepared
    other = byte_tokenizer()
    other.add_tokens(["ab"])
    for tokenizer, eos in ((other, EOS), (byte_tokenizer(), 1)):
        with pytest.raises(UserError, match="was prepared with another tokenizer"):
            open_prepared(str(out), tokenizer, eos, cfg.data)


def test_damage_is_told_by_file(prepared, tmp_path):
    cfg, out = prepared
    copy = shutil.copytree(out, tmp_path / "out")
    shard = sorted(copy.glob("train-*"))[0]
    data = bytearray(shard.read_bytes())
    whole = opened(cfg, copy).train[0]
    data[len(data) // 100 + 700] ^= 255
    shard.write_bytes(data)
    rows = opened(cfg, copy).train
    with pytest.raises(UserError, match=f"{shard.name}: row .* is damaged"):
        [rows[i] for i in range(len(rows))]
    shard.write_bytes(data[:-10])
    with pytest.raises(UserError, match=rf"{shard.name}: must have {len(data)} bytes .* found {len(data) - 10}"):
        opened(cfg, copy)
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: is missing"):
        opened(cfg, copy)
    (copy / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="must be the manifest of prepared data, but lacks the keys format"):
        opened(cfg, copy)
    assert whole["tokens"].shape == (LENGTH,)


def test_what_is_prepared_is_told_from_what_is_not(prepared, texts):
    _, out = prepared
    assert is_prepared(str(out))
    assert not is_prepared(str(texts))
    assert not is_prepared(str(texts / "a.jsonl"))
    assert not is_prepared(str(texts / "nothing"))

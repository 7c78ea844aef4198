"""Runs that `train` refuses: one sentence with the key and both values, and no file left."""

import json
import pathlib

import pytest

from solar_jax import train
from solar_jax.errors import UserError
from solar_jax.training import run_folder
from tests.conftest import hf_model, save_hf
from tests.test_train import command, make_config


def broken(tiny: pathlib.Path, tmp_path: pathlib.Path, what: str) -> pathlib.Path:
    """A copy of the tiny checkpoint with one thing wrong."""
    folder = save_hf(hf_model(), tmp_path / what)
    if what == "truncated":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[:-1000])
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source": "/no/such/checkpoint"}, ["/no/such/checkpoint", "no such checkpoint"]),
        ({"source": "truncated"}, ["model.safetensors", "cut short"]),
        ({"growth_m": 3}, ["dus(m=3)", "6 layers"]),
        ({"growth_operator": "double"}, ["growth.operator", "'double'"]),
        ({"train_trainable": "old"}, ["config.train.trainable", "'old'"]),
        ({"train_remat": "half"}, ["config.train.remat", "'half'"]),
        ({"optimizer_schedule": "step"}, ["config.optimizer.schedule", "'step'"]),
        ({"data_sources": ("/no/such/text",)}, ["/no/such/text"]),
        ({"data_sequence_length": 2000}, ["sequence_length=2000", "max_position_embeddings=1024"]),
        ({"mesh_tensor": 8, "mesh_fsdp": 1}, ["mesh.tensor=8", "num_attention_heads=4"]),
        ({"mesh_data": 3}, ["data=3", "8 device(s)"]),
        ({"mesh_context": 4, "data_sequence_length": 100}, ["config.mesh.context=4", "multiple of 8", "found 100"]),
        ({"mesh_slice": 3}, ["slice=3", "8 device(s)"]),
        ({"model_num_hidden_layers": 7}, ["config.model.num_hidden_layers", "7", "6"]),
        ({"export_max_shard_size": "big"}, ["max_shard_size", "'big'"]),
    ],
)
def test_bad_input_gets_one_sentence_and_leaves_nothing(tiny, text, tmp_path, changes, words):
    if changes.get("source") in ("truncated", "vocabulary"):
        changes = {"source": str(broken(tiny, tmp_path, changes["source"]))}
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as refused:
        train.run(make_config(**({"source": tiny, "text": text} | changes)), tmp_path / "run")
    message = str(refused.value)
    assert "\n" not in message
    assert message.endswith((".", "?"))
    for word in words:
        assert word in message
    assert sorted(tmp_path.rglob("*")) == before


def test_a_cut_beside_that_does_not_fit_is_refused(tiny, text, tmp_path):
    with pytest.raises(UserError, match=r"blocks\(4:9\) .* found 4:9"):
        train.run(make_config(tiny, text, growth_beside="4:9"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"growth\.beside='1:3' needs growth before the first step"):
        make_config(tiny, text, growth_beside="1:3", growth_at_step=2)


def test_a_run_does_not_go_on_with_another_tokenizer_unless_it_is_allowed(tmp_path):
    record = {"tokenizer": "0" * 64, "train source 0": {"rows": 2, "tokens": 64, "hash": "1" * 64}}
    (tmp_path / "data.json").write_text(json.dumps(record))
    run_folder.check_text(tmp_path, record)
    with pytest.raises(UserError, match=r"another tokenizer .* SHA-256 000000000000... where this one's is 222222"):
        run_folder.check_text(tmp_path, record | {"tokenizer": "2" * 64}, ["data"])
    run_folder.check_text(tmp_path, record | {"tokenizer": "2" * 64}, ["tokenizer"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=configs/dus_48l.py:smollm2", "--config.unknown=1"], ["config.unknown"]),
        (["--config=configs/dus_48l.py:smollm2", "--config.train.stepz=1"], ["config.train.steps"]),
        (["--config=configs/dus_48l.py:huge"], ["'huge'"]),
        (["--config=configs/none.py"], ["configs/none.py"]),
        (["--config=configs/dus_48l.py"], ["10,731,524,096", "GiB", "configs/dus_48l.py:smollm2"]),
    ],
)
def test_the_command_refuses_with_one_line_and_status_2(tmp_path, arguments, words):
    done = command(*arguments, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]
    assert not (tmp_path / "run").exists()

"""lineage.json: what a checkpoint was made from, by which command, through all generations."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import sys

import pytest
import safetensors.torch

from solar_jax.checkpoints import lineage
from solar_jax.checkpoints.convert import Target
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.config import GrowthConfig
from solar_jax.convert import convert
from solar_jax.errors import UserError
from solar_jax.upscale import upscale


def read(folder: pathlib.Path) -> dict:
    return json.loads((folder / "lineage.json").read_text())


@pytest.fixture(scope="module")
def once(tiny, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("lineage") / "once"
    upscale(str(tiny), GrowthConfig("dus", m=2), Target(out))
    return out


def test_a_record_says_what_was_made_of_what_by_which_versions(tiny, once):
    found = read(once)
    assert (found["made_by"], found["operator"]) == ("upscale", "dus(m=2)")
    assert found["source_layers"] == [0, 1, 2, 3, 2, 3, 4, 5]
    assert (found["partner_layers"], found["scale"]) == (None, None)
    assert (found["form"], found["dtype"], found["parents"]) == ("hf", "float32", [])
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(found["date"])
    assert datetime.timedelta(0) <= age < datetime.timedelta(hours=1)
    assert found["command"] == lineage.public_command(sys.argv)
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["jax"] == importlib.metadata.version("jax")
    assert found["source"]["where"] == tiny.name
    (file,) = found["source"]["files"]
    assert file["name"] == "model.safetensors"
    assert file["bytes"] == (tiny / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("growth", "partner", "scale"),
    [
        (GrowthConfig("average", every=3), [0, 1, 2, 3, 3, 4, 5], None),
        (GrowthConfig("llama_pro", every=3), None, [1, 1, 1, 0, 1, 1, 1, 0]),
    ],
    ids=lambda x: getattr(x, "operator", ""),
)
def test_means_and_scales_are_told_where_there_are_any(tiny, tmp_path, growth, partner, scale):
    upscale(str(tiny), growth, Target(tmp_path / "out"))
    assert (read(tmp_path / "out")["partner_layers"], read(tmp_path / "out")["scale"]) == (partner, scale)


def test_a_checkpoint_s_parents_travel_with_it_through_both_forms(tiny, once, tmp_path):
    convert(str(once), Target(tmp_path / "own", "orbax", "bfloat16"))
    convert(str(tmp_path / "own"), Target(tmp_path / "back"), GrowthConfig("naive"))
    last = read(tmp_path / "back")
    (parent,) = last["parents"]
    (grandparent,) = parent["parents"]
    assert (last["made_by"], last["operator"], last["form"]) == ("convert", "naive(copies=2)", "hf")
    assert (parent["operator"], parent["form"], parent["dtype"]) == ("identity", "orbax", "bfloat16")
    assert parent == read(tmp_path / "own" / "model")
    assert grandparent == read(once)
    assert last["source"]["where"] == "own/checkpoints/0"


def test_no_folder_above_a_model_is_named_in_what_travels_with_it():
    assert lineage.public("/secret/folder/model") == "model"
    assert lineage.public("/secret/runs/a/checkpoints/120") == "a/checkpoints/120"
    assert lineage.public("gs://bucket/folder/model") == "gs://bucket/folder/model"
    assert lineage.public("/cache/hub/models--a--b-c/snapshots/0123abc") == "a/b-c@0123abc"
    argv = ["/bin/upscale.py", "--source=/secret/m", "--out", "~/o/p", "--config.data.sources=/a/b.txt:0.5",
            "--workdir=gs://b/c", "--slices=0:24,8:32", "relative/path", "--x=/a/b,/c/d"]  # fmt: skip
    assert lineage.public_command(argv) == [
        "upscale", "--source=m", "--out", "p", "--config.data.sources=b.txt:0.5", "--workdir=gs://b/c",
        "--slices=0:24,8:32", "relative/path", "--x=b,d",
    ]  # fmt: skip


def test_a_lineage_is_no_companion_and_a_broken_one_is_refused(once, tmp_path):
    assert "lineage.json" not in open_checkpoint(str(once)).companions
    folder = shutil.copytree(once, tmp_path / "m")
    (folder / "lineage.json").write_text("[]")
    with pytest.raises(UserError, match=r"lineage\.json: must hold a JSON object"):
        open_checkpoint(str(folder))


def test_text_that_no_file_can_hold_is_kept_escaped(tmp_path):
    lineage.write_record(tmp_path, {"command": ["\udcff", "ü"]}, "lineage.json")
    assert read(tmp_path) == {"command": ["\udcff", "ü"]}
    lineage.write_record(tmp_path, {"command": ["ü"]}, "lineage.json")
    assert "ü" in (tmp_path / "lineage.json").read_text()


# ---- What tells one checkpoint from another -------------------------------------------------------------------------


def test_the_same_weights_elsewhere_have_the_same_identity_but_for_the_place(tiny, tmp_path):
    copy = shutil.copytree(tiny, tmp_path / "copy")
    one, other = (lineage.fingerprint(open_checkpoint(str(f))) for f in (tiny, copy))
    assert one.pop("where") != other.pop("where")
    assert one == other


def test_other_weights_and_another_config_have_another_identity(tiny, tmp_path):
    def identities(folder):
        found = lineage.fingerprint(open_checkpoint(str(folder)))
        return found["config_sha256"], found["files"][0]["sample_sha256"]

    copy = shutil.copytree(tiny, tmp_path / "copy")
    config, weights = identities(copy)
    tensors = safetensors.torch.load_file(copy / "model.safetensors")
    tensors["lm_head.weight"][-1, -1] += 1
    safetensors.torch.save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    found = identities(copy)
    assert found[0] == config
    assert found[1] != weights
    changed = json.loads((copy / "config.json").read_text()) | {"rope_theta": 1e6}
    (copy / "config.json").write_text(json.dumps(changed | {"rope_parameters": None}))
    assert identities(copy)[0] != config


@pytest.mark.parametrize("size", [0, 1, 4096, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (1 << 20) + 5000, 5 << 20])
def test_a_file_is_sampled_from_its_first_byte_to_its_last(tmp_path, size):
    data = bytearray(os.urandom(size))
    file = tmp_path / "x"
    file.write_bytes(data)
    whole = lineage.sample_sha256(file)
    assert lineage.sample_sha256(file) == whole
    positions = {0, size - 1} | ({size // 2} if size <= 1 << 20 else set())
    for at in positions if size else ():
        damaged = bytearray(data)
        damaged[at] ^= 1
        file.write_bytes(damaged)
        assert lineage.sample_sha256(file) != whole, at
    file.write_bytes(data + b"\0")
    assert lineage.sample_sha256(file) != whole


def test_a_block_anywhere_in_a_large_file_is_noticed(tmp_path):
    """Samples lie 1/255 of the file apart: a region of a hundredth that was lost or zeroed holds one."""
    size = 64 << 20
    file = tmp_path / "x"
    file.write_bytes(bytes([1]) * size)
    whole = lineage.sample_sha256(file)
    for part in range(0, 100, 7):
        with file.open("r+b") as f:
            f.seek(size * part // 100)
            f.write(bytes(size // 100))
        assert lineage.sample_sha256(file) != whole, part
        with file.open("r+b") as f:
            f.seek(size * part // 100)
            f.write(bytes([1]) * (size // 100))
    assert lineage.sample_sha256(file) == whole


def test_a_record_of_training_holds_what_it_is_told(tiny):
    c = open_checkpoint(str(tiny))
    found = lineage.lineage_record(c, "train", steps=12)
    assert (found["made_by"], found["operator"], found["steps"]) == ("train", "identity", 12)
    assert json.loads(json.dumps(found)) == found


def test_a_model_of_several_files_is_told_by_each(tiny, tmp_path):
    convert(str(tiny), Target(tmp_path / "m", max_shard_size="200KB"))
    found = lineage.fingerprint(open_checkpoint(str(tmp_path / "m")))["files"]
    assert [f["name"] for f in found] == sorted(f.name for f in (tmp_path / "m").glob("*.safetensors"))
    assert len({f["sample_sha256"] for f in found}) == len(found) > 3

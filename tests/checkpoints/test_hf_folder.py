"""Which files of a folder are opened: none that a link or an index takes out of it, and none that is waited for."""

import json
import os
import pathlib
import shutil
import signal

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from solar_jax.checkpoints.convert import Target
from solar_jax.checkpoints.hf_folder import INDEX
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.convert import convert
from solar_jax.storage import paths
from tests.conftest import hf_model, refusal, save_hf


@pytest.fixture(autouse=True)
def _alarm():
    """Fails the test where something would be waited for forever."""
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.fixture
def folder(tiny, tmp_path) -> pathlib.Path:
    """A copy of `tiny` to damage."""
    return shutil.copytree(tiny, tmp_path / "m")


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> dict[str, pathlib.Path]:
    """A model in several files, as safetensors and as .bin, by what their names end with."""
    model = hf_model(num_hidden_layers=2)
    safe = save_hf(model, tmp_path_factory.mktemp("several") / "safe", max_shard_size="100KB")
    old = safe.parent / "bin"
    shutil.copytree(safe, old, ignore=shutil.ignore_patterns("*.safetensors*"))
    index = json.loads((safe / INDEX).read_text())
    weight_map = {}
    for file in safe.glob("*.safetensors"):
        name = file.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        tensors = safetensors.torch.load_file(file)
        torch.save(tensors, old / name)
        weight_map |= dict.fromkeys(tensors, name)
    (old / "pytorch_model.bin.index.json").write_text(json.dumps(index | {"weight_map": weight_map}))
    return {"safetensors": safe, "bin": old}


def weights(folder: pathlib.Path) -> dict[str, bytes]:
    c = open_checkpoint(str(folder))
    return {name: c.read(name).tobytes() for name in c.shape_of}


def test_the_same_model_as_safetensors_and_as_bin_files(several):
    assert weights(several["bin"]) == weights(several["safetensors"])


# ---- Links ----------------------------------------------------------------------------------------------------------

FILES = ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "lineage.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("by", ["file", "chain", "folder above"])
def test_a_link_out_of_the_folder_is_refused(folder, tmp_path, name, by):
    (folder / "lineage.json").write_text("{}")
    outside = tmp_path / "outside" / name
    outside.parent.mkdir()
    (folder / name).rename(outside)
    match by:
        case "file":
            (folder / name).symlink_to(outside)
        case "chain":
            (folder / ".hidden").symlink_to(outside)
            (folder / name).symlink_to(".hidden")
        case "folder above":
            (folder / ".hidden").symlink_to(outside.parent)
            (folder / name).symlink_to(f".hidden/{name}")
    text = refusal(folder)
    assert text.startswith(f"/{name}: must lie in its folder, found a link to {outside}")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(several, tmp_path, kind):
    folder = shutil.copytree(several[kind], tmp_path / "m")
    file = sorted(folder.glob(f"*.{kind}"))[1]
    shutil.move(file, tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert refusal(folder).startswith(f"/{file.name}: must lie in its folder")


def test_a_link_within_the_folder_and_to_the_folder_is_followed(folder, tmp_path, tiny):
    (folder / "model.safetensors").rename(folder / "weights.data")
    (folder / "model.safetensors").symlink_to("weights.data")
    (tmp_path / "link").symlink_to(folder)
    assert weights(tmp_path / "link") == weights(tiny)


def hub_cache(source: pathlib.Path, cache: pathlib.Path) -> pathlib.Path:
    """The files as huggingface_hub caches them: blobs, and a snapshot that links to them."""
    snapshot = cache / "models--a--b" / "snapshots" / "0123abc"
    (cache / "models--a--b" / "blobs").mkdir(parents=True)
    for i, file in enumerate(f for f in source.rglob("*") if f.is_file()):
        shutil.copy(file, cache / "models--a--b" / "blobs" / f"{i:064x}")
        link = snapshot / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        up = "../" * (len(file.relative_to(source).parts) + 1)
        link.symlink_to(f"{up}blobs/{i:064x}")
    return snapshot


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_the_hub_s_cache_is_read_through_its_links(several, tmp_path, kind):
    source = shutil.copytree(several[kind], tmp_path / "source")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("{{ tool }}")
    snapshot = hub_cache(source, tmp_path / "cache")
    assert weights(snapshot) == weights(source)
    found = open_checkpoint(str(snapshot)).companions
    assert found == open_checkpoint(str(source)).companions
    assert found["additional_chat_templates/tool.jinja"] == b"{{ tool }}"
    convert(str(snapshot), Target(tmp_path / "out"))
    assert not any(f.is_symlink() for f in (tmp_path / "out").rglob("*"))


def test_a_snapshot_that_links_to_another_repository_is_refused(tiny, tmp_path):
    snapshot = hub_cache(tiny, tmp_path / "cache")
    (tmp_path / "cache" / "models--c--d").mkdir()
    other = shutil.copytree(tmp_path / "cache/models--a--b/blobs", tmp_path / "cache/models--c--d/blobs")
    link = snapshot / "config.json"
    blob = link.resolve().name
    link.unlink()
    link.symlink_to(other / blob)
    assert refusal(snapshot).startswith("/config.json: must lie in its folder")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_links_in_a_circle_and_to_nothing_are_refused(folder, name):
    (folder / name).unlink()
    (folder / name).symlink_to("a")
    assert refusal(folder).startswith(f"/{name}: ")
    (folder / "a").symlink_to(name)
    assert refusal(folder).startswith(f"/{name}: ")


# ---- Things that are no files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["pipe", "folder", "link to a pipe", "link to a device"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_is_no_file_is_refused_and_not_waited_for(folder, name, what):
    (folder / name).unlink()
    match what:
        case "pipe":
            os.mkfifo(folder / name)
        case "folder":
            (folder / name).mkdir()
        case "link to a pipe":
            os.mkfifo(folder / "pipe")
            (folder / name).symlink_to("pipe")
        case "link to a device":
            (folder / name).symlink_to("/dev/zero")
    assert refusal(folder).startswith(f"/{name}: must ")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("which", ["index", "shard"])
def test_a_pipe_among_the_shards_is_refused(several, tmp_path, kind, which):
    folder = shutil.copytree(several[kind], tmp_path / "m")
    file = next(folder.glob("*.index.json" if which == "index" else f"*-00002-*.{kind}"))
    file.unlink()
    os.mkfifo(file)
    assert refusal(folder) == f"/{file.name}: must be a file."


def test_pipes_and_folders_beside_the_weights_are_left_alone(folder, tiny):
    os.mkfifo(folder / "tokenizer.model")
    (folder / "images").mkdir()
    (folder / "images" / "x.png").write_bytes(b"x")
    (folder / "gone.txt").symlink_to("nothing")
    assert open_checkpoint(str(folder)).companions == open_checkpoint(str(tiny)).companions


@pytest.mark.parametrize("name", ["config.json", "lineage.json", "tokenizer.json", INDEX])
def test_a_file_that_is_too_large_for_what_it_is_is_refused_unread(folder, monkeypatch, name):
    monkeypatch.setattr(paths, "_MOST_SMALL_BYTES", 1 << 20)
    with (folder / name).open("ab") as f:
        f.truncate((1 << 20) + 1)
    assert refusal(folder) == f"/{name}: is too large (1048577 bytes) for anything but weights."


# ---- JSON -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "lineage.json", INDEX])
@pytest.mark.parametrize("depth", [201, 900, 100_000])
def test_json_that_is_nested_without_end_is_refused(folder, name, depth):
    (folder / name).write_text('{"id2label": ' + "[" * depth + "]" * depth + "}")
    text = refusal(folder)
    assert text.startswith(f"/{name}: ")
    assert "deep" in text or "not JSON" in text


def test_json_that_is_nested_some_is_written_as_it_is_read(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text()) | {"id2label": "x", "task_specific_params": "\ud800"}
    for _ in range(150):
        config["id2label"] = [config["id2label"]]
    (folder / "config.json").write_text(json.dumps(config))
    convert(str(folder), Target(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config


@pytest.mark.parametrize(
    "name", ["\0", "a\0.safetensors", "..", ".", "", "a/b", "../x", "/x", "x" * 300, "a\nb", 3, None, []]
)
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_an_index_names_files_of_its_folder_alone(several, tmp_path, kind, name):
    folder = shutil.copytree(several[kind], tmp_path / "m")
    index = next(folder.glob("*.index.json"))
    value = json.loads(index.read_text())
    value["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(value))
    text = refusal(folder)
    assert text.startswith(f"/{index.name}: model.norm.weight must lie in a file of this folder, found ")
    assert len(text) < 500


@pytest.mark.parametrize("name", ["a\nb", "x" * 2000])
def test_a_tensor_s_name_in_an_index_does_not_break_the_message(several, tmp_path, name):
    folder = shutil.copytree(several["safetensors"], tmp_path / "m")
    value = json.loads((folder / INDEX).read_text())
    value["weight_map"][name] = value["weight_map"]["model.norm.weight"]
    (folder / INDEX).write_text(json.dumps(value))
    text = refusal(folder)
    assert text.startswith(f"/{INDEX}: a tensor's name must be printable and short")
    assert len(text) < 500


def test_a_config_of_a_billion_layers_is_refused_at_once(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**12, "layer_types": None}))
    assert "num_hidden_layers=1000000000000 needs more tensors" in refusal(folder)


@pytest.mark.parametrize("shape", [(), (320,), (0, 64), (64, 320)], ids=str)
def test_a_tied_model_whose_two_copies_have_another_shape_is_refused(tmp_path, shape):
    folder = save_hf(hf_model(tie_word_embeddings=True, num_hidden_layers=1), tmp_path / "m")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name] = torch.zeros(shape)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    text = refusal(folder)
    assert f"model.embed_tokens.weight must have shape (320, 64) as in its config, found {shape}" in text


def test_special_numbers_in_two_equal_copies_of_a_tied_embedding_are_equal(tmp_path):
    folder = save_hf(hf_model(tie_word_embeddings=True, num_hidden_layers=1), tmp_path / "m")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][0, :2] = torch.tensor([np.nan, -0.0])
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert open_checkpoint(str(folder)).cfg.tie_word_embeddings
    tensors["lm_head.weight"][0, 2] += 1
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "tie_word_embeddings" in refusal(folder)


# ---- weights twice
def transformers_tensors(folder: pathlib.Path) -> dict[str, bytes]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: x.detach().numpy().tobytes() for name, x in model.state_dict().items()}


@pytest.fixture
def other(tmp_path) -> pathlib.Path:
    """A model with the shapes of `several`'s and other weights, in one file."""
    return save_hf(hf_model(num_hidden_layers=2, seed=1), tmp_path / "other") / "model.safetensors"


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "adapter_model.safetensors", "consolidated.safetensors",
                                  "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "optimizer.bin",
                                  "model-00001-of-00002.safetensors", "x.gguf"])  # fmt: skip
def test_of_weights_that_are_there_twice_transformers_choice_is_read_and_told(folder, tiny, other, name, capsys):
    shutil.copy(other, folder / name)
    assert weights(folder) == weights(tiny) == transformers_tensors(folder)
    assert f"{folder}: reads model.safetensors; not read: {name}" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_model_in_one_file_beside_another_in_an_index_is_refused_with_both_names(several, other, tmp_path, form):
    folder = shutil.copytree(several[form], tmp_path / "m")
    if form == "safetensors":
        shutil.copy(other, folder / "model.safetensors")
    else:
        torch.save(safetensors.torch.load_file(other), folder / "pytorch_model.bin")
    index = {"safetensors": INDEX, "bin": "pytorch_model.bin.index.json"}[form]
    single = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[form]
    assert f": holds two models, {single} and the files that {index} lists; " in refusal(folder)


def test_a_model_beside_an_adapter_that_transformers_would_apply_is_refused(folder, other):
    shutil.copy(other, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    expected = ": holds a model, model.safetensors, and an adapter, adapter_model.safetensors; merge the adapter first"
    assert refusal(folder).startswith(expected)


def test_safetensors_are_read_before_bin_files_and_leftover_shards_are_not(several, other, tmp_path):
    folder = shutil.copytree(several["safetensors"], tmp_path / "m")
    torch.save(safetensors.torch.load_file(other), folder / "pytorch_model.bin")
    shutil.copy(other, folder / "model-00001-of-00099.safetensors")
    assert weights(folder) == weights(several["safetensors"]) == transformers_tensors(folder)


def test_a_certificate_states_which_file_was_chosen(folder, other, tmp_path):
    shutil.copy(other, folder / "model.fp16.safetensors")
    convert(str(folder), Target(tmp_path / "out"), verify=True)
    source = json.loads((tmp_path / "out" / "certificate.json").read_text())["source"]
    assert [file["name"] for file in source["files"]] == ["model.safetensors"]
    assert source["not_read"] == ["model.fp16.safetensors"]


# ---- links into the hub's cache
def linked(snapshot: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """A local folder of links, as `local_dir` downloads were, or as made by hand."""
    folder.mkdir()
    for file in snapshot.iterdir():
        (folder / file.name).symlink_to(file.resolve() if file.suffix == ".json" else file)
    return folder


def test_a_folder_of_links_into_one_repository_of_the_hub_s_cache_is_read(tiny, tmp_path):
    snapshot = hub_cache(tiny, tmp_path / "cache")
    assert weights(linked(snapshot, tmp_path / "local")) == weights(tiny)


def test_a_folder_of_links_into_two_repositories_is_refused(tiny, tmp_path):
    folder = linked(hub_cache(tiny, tmp_path / "cache"), tmp_path / "local")
    second = tmp_path / "cache" / "models--c--d"
    shutil.copytree(tmp_path / "cache" / "models--a--b", second, symlinks=True)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(second / "snapshots" / "0123abc" / "model.safetensors")
    expected = "/config.json: is linked to models--a--b, but model.safetensors to models--c--d; both must be of one "
    assert refusal(folder) == f"{expected}repository."


def test_a_link_to_a_blob_of_another_file_and_a_link_elsewhere_say_what_to_do(tiny, tmp_path):
    snapshot = hub_cache(tiny, tmp_path / "cache")
    folder = linked(snapshot, tmp_path / "local")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to((snapshot / "tokenizer.json").resolve())
    assert "replace it by a copy (cp --remove-destination " in refusal(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tiny / "model.safetensors")
    assert f"found a link to {tiny / 'model.safetensors'}; replace it by a copy" in refusal(folder)

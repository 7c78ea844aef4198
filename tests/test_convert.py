"""`convert`: a checkpoint in another form is the same checkpoint."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from solar_jax import convert
from solar_jax.checkpoints.convert import Target, open_grown
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.errors import UserError
from tests.conftest import hf_model, save_hf


def write(source, out: pathlib.Path, to: str = "hf", dtype: str | None = None, **target) -> None:
    convert.convert(str(source), Target(out, to, dtype, **target))


def tensors(folder) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def bits(x: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return x.dtype, x.shape, x.contiguous().view(torch.uint8).numpy().tobytes()


def assert_same_files(found, expected) -> None:
    """Weights bit by bit, config and tokenizer; what `found` was made from stands in its lineage."""
    a, b = tensors(found), tensors(expected)
    assert set(a) == set(b)
    assert {k: bits(x) for k, x in a.items()} == {k: bits(x) for k, x in b.items()}
    assert json.loads((found / "config.json").read_text()) == json.loads((expected / "config.json").read_text())
    assert {f.name for f in found.iterdir()} == {f.name for f in expected.iterdir()} | {"lineage.json", "README.md"}
    for file in expected.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            assert (found / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_hf_to_hf_is_the_same_checkpoint(tmp_path, dtype):
    source = save_hf(hf_model(num_hidden_layers=2).to(getattr(torch, dtype)), tmp_path / "source")
    write(source, tmp_path / "out")
    assert_same_files(tmp_path / "out", source)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_through_our_own_form_and_back_is_the_same_checkpoint(tmp_path, dtype, tied):
    model = hf_model(num_hidden_layers=2, tie_word_embeddings=tied).to(getattr(torch, dtype))
    source = save_hf(model, tmp_path / "source")
    write(source, tmp_path / "own", "orbax")
    own = open_checkpoint(str(tmp_path / "own"))
    assert (own.common_dtype, own.hf_config["dtype"]) == (dtype, dtype)  # the source's
    write(tmp_path / "own", tmp_path / "out")
    assert_same_files(tmp_path / "out", source)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrower_dtype_rounds_as_torch_does_and_the_config_says_so(tmp_path, tiny, dtype):
    write(tiny, tmp_path / "out", "hf", dtype)
    found = tensors(tmp_path / "out")
    expected = {k: x.to(getattr(torch, dtype)) for k, x in tensors(tiny).items()}
    assert {k: bits(x) for k, x in found.items()} == {k: bits(x) for k, x in expected.items()}
    config = json.loads((tiny / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | {"dtype": dtype}


def test_a_wider_dtype_changes_no_number(tmp_path):
    source = save_hf(hf_model(num_hidden_layers=2).to(torch.bfloat16), tmp_path / "source")
    write(source, tmp_path / "out", "hf", "float32")
    for name, x in tensors(tmp_path / "out").items():
        assert x.dtype == torch.float32
        assert torch.equal(x, tensors(source)[name].float())


def test_what_is_written_is_said(tmp_path, tiny, capsys):
    write(tiny, tmp_path / "out", "hf", "bfloat16")
    first, last = capsys.readouterr().out.splitlines()
    assert str(tiny) in first
    assert "bfloat16" in first
    assert last == f"{tmp_path / 'out'}: written"


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_a_tensor_of_integers_leaves_nothing(tmp_path, to):
    source = save_hf(hf_model(num_hidden_layers=2), tmp_path / "source")
    broken = tensors(source)
    broken["model.norm.weight"] = broken["model.norm.weight"].long()
    safetensors.torch.save_file(broken, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight .*I64"):
        write(source, tmp_path / "out", to)
    assert [f.name for f in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_a_source_that_becomes_shorter_while_it_is_read_leaves_nothing(tmp_path, monkeypatch, to, dtype):
    source = save_hf(hf_model(num_hidden_layers=2), tmp_path / "source")
    file = source / "model.safetensors"

    def open_and_cut(name, growth):
        opened = open_grown(name, growth)
        os.truncate(file, file.stat().st_size - 1)
        return opened

    monkeypatch.setattr(convert, "open_grown", open_and_cut)
    with pytest.raises(UserError, match=r"model\.safetensors: ends .* was it modified meanwhile\?"):
        write(source, tmp_path / "out", to, dtype)
    assert [f.name for f in tmp_path.iterdir()] == ["source"]


@pytest.mark.slow
@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_a_disk_that_takes_no_more_is_one_sentence_and_leaves_nothing(tmp_path, tiny, to):
    """The system's own refusal: files of this process may not grow past 20 kB, less than the embedding."""
    limited = (
        "import resource, sys; from solar_jax import convert; resource.setrlimit(resource.RLIMIT_FSIZE, "
        "(20_000, 20_000)); sys.argv[0] = 'convert'; convert.command.begin(convert.define_flags, convert.check); "
        "convert.command.start(convert.main)"
    )
    flags = [f"--source={tiny}", f"--out={tmp_path / 'out'}", f"--to={to}"]
    done = subprocess.run([sys.executable, "-c", limited, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'out'}: cannot be written: ")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_a_target_that_is_too_small_is_told_before_anything_is_written(tmp_path, tiny, monkeypatch, to):
    size = sum(x.nbytes for x in tensors(tiny).values())
    usage = shutil.disk_usage(tmp_path)
    for free, dtype in ((size - 1, None), (size // 2 - 1, "bfloat16")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        with pytest.raises(UserError, match=r"GB of disk, but .* GB free"):
            write(tiny, tmp_path / "out", to, dtype)
        assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size))
    write(tiny, tmp_path / "out", to)
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_our_own_form_takes_any_dtype_of_the_weights(tmp_path, tiny, dtype):
    write(tiny, tmp_path / "own", "orbax", dtype)
    own = open_checkpoint(str(tmp_path / "own"))
    assert (own.common_dtype, own.hf_config["dtype"]) == (dtype, dtype)
    write(tmp_path / "own", tmp_path / "out")
    expected = {k: x.to(getattr(torch, dtype)) for k, x in tensors(tiny).items()}
    assert {k: bits(x) for k, x in tensors(tmp_path / "out").items()} == {k: bits(x) for k, x in expected.items()}


def mixed(folder: pathlib.Path) -> pathlib.Path:
    """bfloat16 weights with float32 norms, as some trainers leave them."""
    model = hf_model(num_hidden_layers=2).to(torch.bfloat16)
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data = p.data.float() + 1e-6
    return save_hf(model, folder)


@pytest.mark.parametrize("through", ["hf", "orbax"])
def test_tensors_of_several_dtypes_each_keep_their_own(tmp_path, through):
    source = mixed(tmp_path / "source")
    assert {x.dtype for x in tensors(source).values()} == {torch.bfloat16, torch.float32}
    write(source, tmp_path / "once", through)
    write(tmp_path / "once", tmp_path / "twice")
    assert {k: bits(x) for k, x in tensors(tmp_path / "twice").items()} == {
        k: bits(x) for k, x in tensors(source).items()
    }
    config = json.loads((tmp_path / "twice" / "config.json").read_text())
    assert config == json.loads((source / "config.json").read_text())  # what it says of the dtype too


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_a_checkpoint_is_replaced_when_asked_for_and_another_folder_is_not(tmp_path, tiny, to):
    small = save_hf(hf_model(num_hidden_layers=2), tmp_path / "small")
    write(tiny, tmp_path / "out", to)
    write(small, tmp_path / "out", to, overwrite=True)
    assert open_checkpoint(str(tmp_path / "out")).cfg.num_hidden_layers == 2
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out", "small"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(UserError, match="is not a checkpoint, so it is not replaced"):
        write(small, tmp_path / "mine", to, overwrite=True)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "precious"


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_a_target_that_holds_something_is_kept(tmp_path, tiny, to):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("precious")
    with pytest.raises(UserError, match="already exists"):
        write(tiny, tmp_path / "out", to)
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["x"]
    assert (tmp_path / "out" / "x").read_text() == "precious"

"""`convert`: a checkpoint in another form is the same checkpoint."""

import json

import pytest
import safetensors.torch
import torch

from solar_jax import convert
from solar_jax.errors import UserError
from solar_jax.source import open_checkpoint
from tests.conftest import hf_model, save_hf

WHOLE = 10**9  # bytes: all weights in one file


def tensors(folder) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def bits(x: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return x.dtype, x.shape, x.contiguous().view(torch.uint8).numpy().tobytes()


def assert_same_files(found, expected) -> None:
    """Weights bit by bit, config and tokenizer."""
    a, b = tensors(found), tensors(expected)
    assert set(a) == set(b)
    assert {k: bits(x) for k, x in a.items()} == {k: bits(x) for k, x in b.items()}
    assert json.loads((found / "config.json").read_text()) == json.loads((expected / "config.json").read_text())
    assert {f.name for f in found.iterdir()} == {f.name for f in expected.iterdir()}
    for file in found.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            assert file.read_bytes() == (expected / file.name).read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_hf_to_hf_is_the_same_checkpoint(tmp_path, dtype):
    source = save_hf(hf_model(num_hidden_layers=2).to(getattr(torch, dtype)), tmp_path / "source")
    convert.convert(str(source), tmp_path / "out", "hf", None, WHOLE)
    assert_same_files(tmp_path / "out", source)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_through_our_own_form_and_back_is_the_same_checkpoint(tmp_path, dtype, tied):
    model = hf_model(num_hidden_layers=2, tie_word_embeddings=tied).to(getattr(torch, dtype))
    source = save_hf(model, tmp_path / "source")
    convert.convert(str(source), tmp_path / "own", "orbax", None, WHOLE)
    own = open_checkpoint(str(tmp_path / "own"))
    assert (own.dtype, own.hf_config["dtype"]) == ("float32", "float32")  # whatever the source's was
    convert.convert(str(tmp_path / "own"), tmp_path / "out", "hf", dtype, WHOLE)
    assert_same_files(tmp_path / "out", source)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrower_dtype_rounds_as_torch_does_and_the_config_says_so(tmp_path, tiny, dtype):
    convert.convert(str(tiny), tmp_path / "out", "hf", dtype, WHOLE)
    found = tensors(tmp_path / "out")
    expected = {k: x.to(getattr(torch, dtype)) for k, x in tensors(tiny).items()}
    assert {k: bits(x) for k, x in found.items()} == {k: bits(x) for k, x in expected.items()}
    config = json.loads((tiny / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | {"dtype": dtype}


def test_a_wider_dtype_changes_no_number(tmp_path):
    source = save_hf(hf_model(num_hidden_layers=2).to(torch.bfloat16), tmp_path / "source")
    convert.convert(str(source), tmp_path / "out", "hf", "float32", WHOLE)
    for name, x in tensors(tmp_path / "out").items():
        assert x.dtype == torch.float32
        assert torch.equal(x, tensors(source)[name].float())


def test_what_is_written_is_said(tmp_path, tiny, capsys):
    convert.convert(str(tiny), tmp_path / "out", "hf", "bfloat16", WHOLE)
    first, last = capsys.readouterr().out.splitlines()
    assert str(tiny) in first
    assert "bfloat16" in first
    assert last == f"{tmp_path / 'out'}: written"


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_a_tensor_found_bad_only_when_loaded_leaves_nothing(tmp_path, to):
    source = save_hf(hf_model(num_hidden_layers=2), tmp_path / "source")
    broken = tensors(source)
    broken["model.norm.weight"] = broken["model.norm.weight"].long()
    safetensors.torch.save_file(broken, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight .*I64"):
        convert.convert(str(source), tmp_path / "out", to, None, WHOLE)
    assert [f.name for f in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_a_disk_that_fails_while_writing_leaves_nothing(tmp_path, tiny, monkeypatch, to):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "write_checkpoint" if to == "hf" else "write_companions", fail)
    with pytest.raises(OSError, match="No space left"):
        convert.convert(str(tiny), tmp_path / "out", to, None, WHOLE)
    assert list(tmp_path.iterdir()) == []


def test_training_state_is_not_written_as_a_dtype_that_it_does_not_have(tmp_path, tiny):
    with pytest.raises(UserError, match="float16"):
        convert.convert(str(tiny), tmp_path / "out", "orbax", "float16", WHOLE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_a_target_that_holds_something_is_kept(tmp_path, tiny, to):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("precious")
    with pytest.raises(UserError, match="already exists"):
        convert.convert(str(tiny), tmp_path / "out", to, None, WHOLE)
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["x"]
    assert (tmp_path / "out" / "x").read_text() == "precious"

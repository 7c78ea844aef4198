"""Hugging Face folders out: the same bits, files that transformers loads, and nothing half-written."""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from solar_jax.checkpoints.checkpoint import from_params, numpy_dtype
from solar_jax.checkpoints.hf_folder import INDEX
from solar_jax.checkpoints.load import load_params
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.write_hf import parse_size, write_model
from solar_jax.errors import UserError
from tests.conftest import hf_model, save_hf


def bits(folder) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    """Every tensor of a folder's files, as the `safetensors` package reads it."""
    found = {}
    for file in folder.glob("*.safetensors"):
        for name, x in safetensors.torch.load_file(file).items():
            assert name not in found
            found[name] = (x.dtype, x.shape, x.contiguous().view(torch.uint8).numpy().tobytes())
    return found


def export(source, out, max_shard_size: int = 10**9) -> None:
    """The checkpoint read and written, untouched."""
    c = open_checkpoint(str(source))
    params = load_params(c, dtype=numpy_dtype(c.dtype))
    out.mkdir()
    write_model(out, from_params(params, c.cfg, c.hf_config, c.companions), max_shard_size=max_shard_size)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_base_exported_untouched_is_the_base_bit_by_bit(tmp_path, dtype, tied):
    model = hf_model(tie_word_embeddings=tied, num_hidden_layers=2).to(getattr(torch, dtype))
    source = save_hf(model, tmp_path / "source")
    export(source, tmp_path / "out")
    assert bits(tmp_path / "out") == bits(source)
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((source / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert {f.name for f in (tmp_path / "out").iterdir()} == {f.name for f in source.iterdir()}


def test_special_numbers_pass_untouched(tmp_path, tiny):
    source = shutil.copytree(tiny, tmp_path / "source")
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    # NaNs with a payload, a sign or signalling, infinities, minus zero, the smallest subnormal number.
    odd = np.array([0xFFC12345, 0x7F800001, 0x7F800000, 0xFF800000, 0x80000000, 0x00000001], np.uint32)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"):
        tensors[name].view(-1)[: len(odd)] = torch.from_numpy(odd.view(np.float32))
    safetensors.torch.save_file(tensors, source / "model.safetensors", {"format": "pt"})
    export(source, tmp_path / "out")
    assert bits(tmp_path / "out") == bits(source)


def test_shards_are_loaded_by_transformers_as_the_same_model(tmp_path, tiny):
    limit = 100_000
    export(tiny, tmp_path / "out", limit)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    sizes = {}
    for i, file in enumerate(files):
        assert file.name == f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        tensors = safetensors.torch.load_file(file)
        assert {name for name, f in index["weight_map"].items() if f == file.name} == set(tensors)
        sizes[file.name] = sum(x.nbytes for x in tensors.values())
        assert sizes[file.name] <= limit or len(tensors) == 1
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert bits(tmp_path / "out") == bits(tiny)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    expected = hf_model().state_dict()
    found = model.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], x) for name, x in expected.items())


def test_a_shard_is_filled_to_the_very_limit(tmp_path, tiny):
    whole = (320 * 64 * 2 + 6 * (64 * 24 * 12 + 3 * 64 * 96 + 2 * 64) + 64) * 4
    export(tiny, tmp_path / "one", whole)
    assert (tmp_path / "one/model.safetensors").exists()
    export(tiny, tmp_path / "two", whole - 1)
    assert len(list((tmp_path / "two").glob("*.safetensors"))) == 2


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("5gb", 5 * 10**9),
        (" 200 KB ", 200_000),
        ("1.5MB", 1_500_000),
        ("2TB", 2 * 10**12),
        ("100", 100),
        ("0.001KB", 1),
    ],
)
def test_a_size_is_read_as_transformers_reads_it(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "0", "0GB", "0.5", "-1GB", "5G", "5GiB", "5 G B", "1e3", "5GB5", "five", "inf"]
)
def test_a_size_that_is_none_is_refused_as_it_was_written(text):
    with pytest.raises(UserError) as e:
        parse_size(text)
    assert str(e.value) == f"max_shard_size must be a size like 5GB, found {text!r}."

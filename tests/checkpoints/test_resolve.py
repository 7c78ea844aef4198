"""Names of tensors: wrappers, aliases and buffers of many programs are read as the model that they are, or refused."""

import pathlib
import shutil

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from solar_jax.checkpoints.load import load_params
from solar_jax.checkpoints.open import open_checkpoint
from tests.checkpoints.test_checkpoint import assert_same, edit_json
from tests.checkpoints.test_gguf import hf_tensors, write_gguf
from tests.conftest import hf_model, refusal, save_hf

ROTARY = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.fixture
def folder(tiny, tmp_path) -> pathlib.Path:
    return shutil.copytree(tiny, tmp_path / "m")


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> pathlib.Path:
    return save_hf(hf_model(tie_word_embeddings=True, num_hidden_layers=2), tmp_path_factory.mktemp("tied") / "m")


def rename(folder: pathlib.Path, change, more: dict | None = None) -> None:
    """Renames the tensors of a folder and adds others."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors = {change(name): x for name, x in tensors.items()} | (more or {})
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def params(folder: pathlib.Path):
    return load_params(open_checkpoint(str(folder)))


# ---- prefixes
@pytest.mark.parametrize(
    "change",
    [
        lambda n: f"_orig_mod.{n}",
        lambda n: f"module.{n}",
        lambda n: f"module._orig_mod.{n}",
        lambda n: f"base_model.model.{n}",
        lambda n: n.replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
        lambda n: n.replace("layers.1.", "layers.1._checkpoint_wrapped_module."),
        lambda n: n.removeprefix("model."),  # a model without its head
    ],
)
def test_what_a_training_program_put_around_names_is_taken_off_and_told(folder, tiny, change, capsys):
    rename(folder, change)
    assert_same(params(folder), params(tiny))
    assert "in the same way" in capsys.readouterr().out


def test_names_without_a_prefix_are_read_as_transformers_reads_them(tied, tmp_path):
    folder = shutil.copytree(tied, tmp_path / "m")
    rename(folder, lambda n: n.removeprefix("model."))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    c = open_checkpoint(str(folder))
    for name in c.shape_of:
        np.testing.assert_array_equal(c.read(name), theirs[name].numpy())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda n: f"text_model.{n}", "their names begin with 'text_model.model.' where 'model.' is expected."),
        (lambda n: n.replace("model.", "transformer."), "their names begin with 'transformer.' where 'model.' is"),
        (lambda n: n.replace("q_proj.weight", "q_proj.qweight"), "these are quantised weights, so convert them"),
        (lambda n: n.replace("q_proj.weight", "q_proj.lora_A.weight"), "that is an adapter, so merge it into its base"),
        (lambda n: n.replace("q_proj", "query"), "instead it holds model.layers.0.self_attn.query.weight, "),
    ],
)
def test_names_of_another_kind_are_said_beside_what_is_missing(folder, change, said):
    rename(folder, change)
    text = refusal(folder)
    assert "tensors of its config are missing: " in text
    assert said in text


def test_a_tensor_that_is_there_with_and_without_a_prefix_is_refused(folder):
    rename(folder, lambda n: n, {"module.model.norm.weight": torch.zeros(64)})
    assert "must hold each tensor once, found model.norm.weight, module.model.norm.weight." in refusal(folder)


# ---- a tied head
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_tied_model_may_be_stored_under_its_head_s_name(tied, tmp_path, form):
    folder = shutil.copytree(tied, tmp_path / "m")
    rename(folder, lambda n: n.replace("model.embed_tokens", "lm_head"))
    if form == "bin":
        torch.save(safetensors.torch.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    assert_same(params(folder), params(tied))


def test_a_tied_gguf_may_be_stored_under_its_head_s_name(tmp_path):
    tensors = hf_tensors(tied=True)
    expected = params(write_gguf(tmp_path / "a.gguf", tensors))
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    found = open_checkpoint(str(write_gguf(tmp_path / "b.gguf", tensors)))
    assert found.cfg.tie_word_embeddings
    assert_same(load_params(found), expected)


def test_an_untied_model_without_its_embedding_is_refused(folder):
    rename(folder, lambda n: n, None)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    del tensors["model.embed_tokens.weight"]
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "tensors of its config are missing: model.embed_tokens.weight." in refusal(folder)


# ---- derived buffers
def inv_freq(theta: float = 10000.0, dtype: torch.dtype = torch.float32, half: int = 12) -> torch.Tensor:
    return (theta ** -(torch.arange(0, 2 * half, 2) / (2 * half))).to(dtype)


def cached(function, theta: float = 10000.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A table of old transformers: [8 positions, 24]."""
    angles = torch.outer(torch.arange(8.0), inv_freq(theta))
    return function(torch.cat([angles, angles], dim=-1)).to(dtype)


BUFFERS = {
    ROTARY: inv_freq(),
    "model.rotary_emb.inv_freq": inv_freq(),
    "model.rotary_emb.original_inv_freq": inv_freq(dtype=torch.bfloat16),
    "model.layers.1.self_attn.rotary_emb.inv_freq": inv_freq(dtype=torch.float16),
    "rope.freqs": inv_freq(),
    "model.layers.0.self_attn.rotary_emb.cos_cached": cached(torch.cos)[None, None],
    "model.layers.0.self_attn.rotary_emb.sin_cached": cached(torch.sin, dtype=torch.bfloat16),
    "freqs_cis": torch.ones(8, 12),
    "model.layers.0.self_attn.masked_bias": torch.tensor(-1e9),
    "model.layers.0.self_attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
    "model.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
    "model.embed_positions.position_ids": torch.arange(8)[None],
}


def test_buffers_that_follow_from_the_config_change_nothing(folder, tiny):
    rename(folder, lambda n: n, {name: x.clone() for name, x in BUFFERS.items()})
    assert_same(params(folder), params(tiny))


@pytest.mark.parametrize("name", [ROTARY, "model.rotary_emb.inv_freq", "_orig_mod.rope.freqs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_rotary_base_other_than_the_config_s_is_found_by_a_buffer(folder, name, dtype):
    rename(folder, lambda n: n, {name: inv_freq(500000.0, dtype)})
    text = refusal(folder)
    assert f"{name} must be the 12 rotary frequencies of config.json, of rope_theta=10000, found those of " in text
    assert float(text.split("rope_theta=")[2].rstrip(".")) == pytest.approx(500000, rel=0.1)


def test_frequencies_of_another_head_size_are_refused(folder):
    rename(folder, lambda n: n, {ROTARY: inv_freq(half=16)})
    assert "of rope_theta=10000, found (16,)." in refusal(folder)


def test_frequencies_may_be_stored_with_or_without_the_config_s_scaling(folder):
    edit_json(folder / "config.json", lambda c: c.update(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0,
                                                                          "factor": 4.0}))  # fmt: skip
    for x in (inv_freq(), inv_freq() / 4):
        rename(folder, lambda n: n, {ROTARY: x})
        assert open_checkpoint(str(folder)).cfg.rope_factor == 4
    rename(folder, lambda n: n, {ROTARY: inv_freq() / 2})
    assert "rotary frequencies" in refusal(folder)


# ---- the dtype of a GGUF file
@pytest.mark.parametrize(("kind", "dtype"), [("BF16", "bfloat16"), ("F16", "float16"), ("F32", "float32")])
def test_a_gguf_of_plain_numbers_keeps_its_dtype(tmp_path, kind, dtype):
    half = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[kind]
    tensors = {name: torch.from_numpy(x).to(half).float().numpy() for name, x in hf_tensors().items()}
    c = open_checkpoint(str(write_gguf(tmp_path / "a.gguf", tensors, kind=gguf.GGMLQuantizationType[kind])))
    assert c.common_dtype == c.hf_config["dtype"] == dtype  # the vectors too, which the file has as float32
    for name, x in tensors.items():
        assert c.read(name).dtype.name == dtype
        np.testing.assert_array_equal(c.read(name, slice(3, 9)).astype(np.float32), x[3:9])


def test_vectors_of_a_gguf_that_need_float32_keep_it(tmp_path):
    tensors = hf_tensors()
    assert any(x.ndim == 1 and (x != x.astype(np.float16)).any() for x in tensors.values())
    c = open_checkpoint(str(write_gguf(tmp_path / "a.gguf", tensors, kind=gguf.GGMLQuantizationType.BF16)))
    assert {c.dtype_of[name].name for name, x in tensors.items() if x.ndim == 1} == {"float32"}
    assert {c.dtype_of[name].name for name, x in tensors.items() if x.ndim == 2} == {"bfloat16"}
    for name, x in tensors.items():
        if x.ndim == 1:
            np.testing.assert_array_equal(c.read(name), x)


@pytest.mark.parametrize("name", ["cos_cached", "sin_cached"])
@pytest.mark.parametrize("wrong", ["theta", "shape"])
def test_a_table_of_angles_that_contradicts_the_config_is_refused(folder, name, wrong):
    function = torch.cos if name == "cos_cached" else torch.sin
    table = cached(function, 500000.0) if wrong == "theta" else cached(function)[:, :7].contiguous()
    rename(folder, lambda n: n, {f"model.layers.0.self_attn.rotary_emb.{name}": table})
    assert f"{name} must hold {name[:3]}(position x frequency)" in refusal(str(folder))

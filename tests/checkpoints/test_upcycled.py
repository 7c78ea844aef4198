"""Upcycling as a view, and Mixtral folders both ways, against the dense base and transformers' Mixtral."""

import json
import shutil
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from solar_jax.checkpoints.convert import Target, convert_checkpoint
from solar_jax.checkpoints.load import load_params
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.tensor_table import hf_tensors
from solar_jax.checkpoints.upcycled import redrawn_channels
from solar_jax.checkpoints.views import grown
from solar_jax.cli.command import growth_config
from solar_jax.config import GrowthConfig
from solar_jax.errors import UserError
from solar_jax.growth.operators import make_layer_map
from solar_jax.model import llama
from tests.conftest import TINY, hf_model, refusal, save_hf

TOKENS = np.random.default_rng(0).integers(3, TINY["vocab_size"], (2, 250))


def upcycled(folder, **keys):
    c = open_checkpoint(str(folder))
    growth = GrowthConfig(**({"operator": "identity", "experts": 4} | keys))
    return grown(c, make_layer_map(c.cfg.num_hidden_layers, growth))


def logits(c) -> np.ndarray:
    return np.asarray(llama.logits(c.cfg, load_params(c), jnp.asarray(TOKENS)))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory, tiny):
    """A Mixtral folder whose experts differ, and the view that it was written from."""
    folder = tmp_path_factory.mktemp("mixtral") / "moe"
    c = upcycled(tiny, operator="dus", m=2, redrawn=0.5)
    convert_checkpoint(c, Target(folder), "upscale", verify=True)
    return folder, c


@pytest.mark.parametrize(("granularity", "top_k"), [(1, 1), (1, 2), (2, 2), (4, 1)])
def test_without_diversity_the_logits_are_the_dense_bases(tiny, granularity, top_k):
    base = logits(open_checkpoint(str(tiny)))
    found = upcycled(tiny, granularity=granularity, top_k=top_k)
    assert found.cfg.num_experts_per_tok == granularity * top_k
    assert np.abs(logits(found) - base).max() < 1e-5
    if granularity == 1 and top_k == 1:  # negative control: softmax over all experts shrinks what they add
        assert np.abs(logits(upcycled(tiny, top_k=1, routing="softmax")) - base).max() > 1e-2


def test_transformers_mixtral_computes_our_logits(mixtral):
    folder, c = mixtral
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model).__name__ == "MixtralForCausalLM"
    with torch.no_grad():
        theirs = model(torch.tensor(TOKENS)).logits.numpy()
    assert np.abs(theirs - logits(c)).max() < 1e-4
    assert np.abs(theirs - logits(upcycled_again := open_checkpoint(str(folder)))).max() < 1e-4
    assert upcycled_again.cfg == c.cfg


def test_a_mixtral_folder_comes_back_bit_for_bit(mixtral, tmp_path):
    folder, c = mixtral
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "theirs")
    convert_checkpoint(open_checkpoint(str(folder)), Target(tmp_path / "own", "orbax"), "convert")
    convert_checkpoint(open_checkpoint(str(tmp_path / "own")), Target(tmp_path / "back"), "convert")
    first = load_file(folder / "model.safetensors")
    again = load_file(tmp_path / "back" / "model.safetensors")
    assert first.keys() == again.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], again[name], err_msg=name)
    for name in c.shape_of:
        np.testing.assert_array_equal(open_checkpoint(str(tmp_path / "theirs")).read(name), c.read(name), err_msg=name)


def test_upscale_makes_experts_without_naming_an_operator():
    growth = growth_config(None, None, {"experts": 4})
    assert growth == GrowthConfig("identity", experts=4)
    assert growth_config(None, None, {"experts": 0}) is None
    assert growth_config("dus", None, {"m": 2, "experts": 4}) == GrowthConfig("dus", m=2, experts=4)


def test_a_mixtral_grows_deeper_and_is_certified_like_any_other(mixtral, tmp_path):
    folder, _ = mixtral
    c = open_checkpoint(str(folder))
    deeper = grown(c, make_layer_map(c.cfg.num_hidden_layers, GrowthConfig("gated", m=2, beta=0.5)))
    convert_checkpoint(deeper, Target(tmp_path / "deeper"), "upscale", verify=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "deeper", dtype=torch.float32)
    with torch.no_grad():
        assert np.abs(model(torch.tensor(TOKENS)).logits.numpy() - logits(deeper)).max() < 1e-4
    found = json.loads((tmp_path / "deeper" / "certificate.json").read_text())["tensors"]
    scaled = found["model.layers.8.block_sparse_moe.experts.w2.weight"]
    assert "scaled by 0.5" in scaled["made"], scaled


def test_a_part_of_each_expert_is_redrawn_and_the_rest_is_the_mlps(tiny):
    base, found = open_checkpoint(str(tiny)), upcycled(tiny, redrawn=0.25)
    F, D = base.cfg.intermediate_size, base.cfg.hidden_size
    masks = []
    for expert in range(4):
        rows = {"w1": slice(expert * F, (expert + 1) * F), "w2": slice(expert * D, (expert + 1) * D)}
        gate = found.read("model.layers.1.block_sparse_moe.experts.w1.weight", rows["w1"])
        down = found.read("model.layers.1.block_sparse_moe.experts.w2.weight", rows["w2"])
        same = (gate == base.read("model.layers.1.mlp.gate_proj.weight")).all(axis=1)
        np.testing.assert_array_equal(same, (down == base.read("model.layers.1.mlp.down_proj.weight")).all(axis=0))
        assert (~same).sum() == round(0.25 * F)
        drawn = gate[~same]
        source = base.read("model.layers.1.mlp.gate_proj.weight")
        assert abs(drawn.std() / source.std() - 1) < 0.1
        masks.append(tuple(same))
    assert len(set(masks)) == 4
    assert redrawn_channels("model.layers.1.block_sparse_moe.experts.w1.weight", 0, F, 1.0).all()


def test_rows_read_apart_are_those_of_the_whole(tiny):
    c = upcycled(tiny, redrawn=0.5, granularity=2, jitter=0.01)
    for name, path, _ in list(hf_tensors(c.cfg))[:14]:
        whole = c.read(name)
        parts = [c.read(name, slice(i, i + 7)) for i in range(0, len(whole), 7)]
        np.testing.assert_array_equal(np.concatenate(parts), whole, err_msg=f"{name} {path}")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"granularity": 2}, "holds experts of growth.granularity=1, found 2"),
        ({"routing": "softmax"}, "holds experts of growth.routing=renormalised, found softmax"),
    ],
)
def test_what_transformers_would_compute_otherwise_is_no_hf_folder(tiny, tmp_path, keys, said):
    c = upcycled(tiny, **keys)
    with pytest.raises(UserError, match=said):
        convert_checkpoint(c, Target(tmp_path / "hf"), "upscale")
    assert not list(tmp_path.iterdir())
    convert_checkpoint(c, Target(tmp_path / "own", "orbax"), "upscale", verify=True)
    assert open_checkpoint(str(tmp_path / "own")).cfg == c.cfg


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"experts": 1}, "at least 2 experts"),
        ({"top_k": 5}, "top_k=5"),
        ({"granularity": 7}, "growth.granularity=7 must divide the model's intermediate_size=96"),
        ({"routing": "hash"}, "config.growth.routing must be one of renormalised, softmax"),
        ({"redrawn": 1.5}, "config.growth.redrawn must be at least 0"),
    ],
)
def test_experts_that_no_model_can_have_are_refused(tiny, keys, said):
    with pytest.raises(UserError, match=said):
        upcycled(tiny, **keys)


def test_a_model_that_is_not_of_mixtrals_kind_is_refused_by_the_key(tmp_path):
    folder = save_hf(hf_model(attention_bias=True), tmp_path / "biased")
    with pytest.raises(UserError, match=r"growth\.experts=4 needs a model of Mixtral's kind, found attention_bias"):
        upcycled(folder)


def test_an_expert_that_is_missing_or_of_another_shape_is_named(mixtral, tmp_path):
    folder, _ = mixtral
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.2.block_sparse_moe.experts.3.w2.weight"
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "model.safetensors")
    assert "model.layers.2.block_sparse_moe.experts.w2.weight" in refusal(tmp_path)
    save_file(tensors | {name: tensors[name][:-1]}, tmp_path / "model.safetensors")
    assert f"{name} must have the shape of" in refusal(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 9}))
    assert "num_experts_per_tok=9 must be at most num_local_experts=4" in refusal(tmp_path)


@pytest.mark.slow
def test_a_mixtral_of_2_gb_is_streamed_in_bounded_memory_and_comes_back_bit_by_bit(tmp_path):
    """A random checkpoint of Mixtral's shape, two layers, made by numpy alone."""
    cfg = transformers.MixtralConfig(
        vocab_size=8192, hidden_size=2048, intermediate_size=7168, num_hidden_layers=3, num_attention_heads=16,
        num_key_value_heads=4, num_local_experts=8,
    )  # fmt: skip
    shapes = {"model.embed_tokens.weight": (8192, 2048), "model.norm.weight": (2048,), "lm_head.weight": (8192, 2048)}
    for i in range(3):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{x}_layernorm.weight": (2048,) for x in ("input", "post_attention")}
        shapes |= {f"{layer}self_attn.{x}_proj.weight": (n, 2048) for x, n in (("q", 2048), ("k", 512), ("v", 512))}
        shapes |= {f"{layer}self_attn.o_proj.weight": (2048, 2048), f"{layer}block_sparse_moe.gate.weight": (8, 2048)}
        for e in range(8):
            expert = f"{layer}block_sparse_moe.experts.{e}."
            shapes |= {f"{expert}w1.weight": (7168, 2048), f"{expert}w3.weight": (7168, 2048)}
            shapes |= {f"{expert}w2.weight": (2048, 7168)}
    rng, source = np.random.default_rng(0), tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(cfg.to_dict() | {"architectures": ["MixtralForCausalLM"]}))
    save_file(
        {n: rng.integers(0, 1 << 14, s, np.uint16).view(ml_dtypes.bfloat16) for n, s in shapes.items()},
        source / "model.safetensors",
    )
    assert (source / "model.safetensors").stat().st_size > 2e9
    code = (
        "import pathlib, re, runpy\n"
        "try: runpy.run_module('solar_jax.convert', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        # The peak of getrusage would begin with the parent's.
        "print('peak', re.search(r'VmHWM:\\s*(\\d+)', pathlib.Path('/proc/self/status').read_text())[1])"
    )
    # A folder is streamed expert by expert; Orbax's arrays are written and read in several blocks at a time.
    for start, to, form, limit in (
        (source, "copy", "hf", 0.5), (source, "own", "orbax", 1.0), (tmp_path / "own", "back", "hf", 1.0)
    ):  # fmt: skip
        argv = [f"--source={start}", f"--out={tmp_path / to}", f"--to={form}"]
        made = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True)
        assert int(made.stdout.split("peak")[-1]) < limit * 2**20, made.stdout  # KiB
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
    first, again = (open_checkpoint(str(tmp_path / name)) for name in ("source", "back"))
    for name in first.shape_of:
        assert np.array_equal(first.read(name).view(np.uint16), again.read(name).view(np.uint16)), name

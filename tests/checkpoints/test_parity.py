"""Every architecture against transformers, both ways, with negative controls that the same comparison must refuse.

Rows are 600 tokens: beyond the sliding windows of 100 and beyond the 256 positions that scaled rope starts from.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from solar_jax.checkpoints.checkpoint import Checkpoint, from_params
from solar_jax.checkpoints.hf_config import grown_hf_config
from solar_jax.checkpoints.load import load_params
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.write_hf import write_model
from solar_jax.config import GrowthConfig, ModelConfig
from solar_jax.growth.apply import grow, grown_config
from solar_jax.growth.operators import make_layer_map
from solar_jax.model import llama
from solar_jax.model.shapes import Params, layer_axes
from tests.conftest import TINY, save_hf

TOLERANCE = 1e-4  # absolute, float32 logits
LENGTH = 600
WINDOW = {"sliding_window": 100}
QWEN_WINDOW = WINDOW | {"use_sliding_window": True, "max_window_layers": 0}


def rope(**keys) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0} | keys}


LINEAR = rope(rope_type="linear", factor=4.0)
LLAMA3 = rope(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=256
)
YARN = rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=256)
MUP = {
    "embedding_multiplier": 6.0, "attention_multiplier": 0.3, "residual_multiplier": 0.4, "logits_scaling": 2.0,
}  # fmt: skip
NO_HEAD_DIM = {"head_dim": None}  # hidden_size / num_attention_heads

# name -> (model_type, what its config says apart from TINY)
MODELS = {
    "Llama 1 and 2": ("llama", NO_HEAD_DIM | {"num_key_value_heads": 4}),
    "Llama 3": ("llama", NO_HEAD_DIM | rope(rope_theta=5e5)),
    "Llama 3.1": ("llama", NO_HEAD_DIM | LLAMA3),
    "Llama, linear rope": ("llama", LINEAR),
    "Llama, biases": ("llama", {"attention_bias": True}),
    "SmolLM2": ("llama", NO_HEAD_DIM | {"num_attention_heads": 8, "tie_word_embeddings": True} | rope(rope_theta=1e5)),
    "Yi, TinyLlama": ("llama", NO_HEAD_DIM | {"num_key_value_heads": 1} | rope(rope_theta=5e6)),
    "Mistral v0.1": ("mistral", NO_HEAD_DIM | WINDOW),
    "Mistral v0.3": ("mistral", NO_HEAD_DIM | {"sliding_window": None} | rope(rope_theta=1e6)),
    "Mistral-Nemo": ("mistral", {"sliding_window": None, "head_dim": 32} | rope(rope_theta=1e6)),
    "Qwen2": ("qwen2", NO_HEAD_DIM | rope(rope_theta=1e6)),
    "Qwen2, tied": ("qwen2", NO_HEAD_DIM | {"tie_word_embeddings": True}),
    "Qwen2, window": ("qwen2", NO_HEAD_DIM | QWEN_WINDOW),
    "Qwen2, Llama 3.1's rope": ("qwen2", NO_HEAD_DIM | LLAMA3),
    "Qwen3": ("qwen3", rope(rope_theta=1e6)),
    "Qwen3, tied": ("qwen3", {"tie_word_embeddings": True}),
    "Qwen3, biases": ("qwen3", {"attention_bias": True}),
    "Qwen3, window": ("qwen3", QWEN_WINDOW),
    "Llama, MLP biases": ("llama", {"mlp_bias": True, "attention_bias": True}),
    "Llama, yarn": ("llama", YARN),
    "Llama, dynamic rope": ("llama", rope(rope_type="dynamic", factor=4.0) | {"max_position_embeddings": 256}),
    "Qwen3, yarn": ("qwen3", YARN),
    "InternLM3": ("internlm3", {"num_key_value_heads": 1} | rope(rope_type="dynamic", factor=6.0, rope_theta=5e7)),
    "InternLM3, biases": ("internlm3", {"attention_bias": True, "mlp_bias": True}),
    "Seed-OSS": ("seed_oss", {"attention_bias": True, "attention_out_bias": False} | rope(rope_theta=1e7)),
    "Seed-OSS, all biases": ("seed_oss", {"attention_out_bias": True, "mlp_bias": True}),
    "Ministral": ("ministral", WINDOW | {"head_dim": 32}),
    "EXAONE 3": ("exaone", NO_HEAD_DIM | LLAMA3),
    "Phi-3": ("phi3", NO_HEAD_DIM),
    "Phi-3, window": ("phi3", NO_HEAD_DIM | WINDOW),
    "SmolLM3": ("smollm3", NO_HEAD_DIM | rope(rope_theta=5e6)),
    "SmolLM3, other layers": ("smollm3", NO_HEAD_DIM | {"no_rope_layers": [0, 1, 0, 1], "attention_bias": True}),
    "Granite 3": ("granite", NO_HEAD_DIM | MUP),
    "Granite 3, biases": ("granite", NO_HEAD_DIM | MUP | {"attention_bias": True, "mlp_bias": True}),
    "HyperCLOVAX": ("hyperclovax", NO_HEAD_DIM | MUP | {"logits_scaling": 0.5}),
    "HyperCLOVAX, no post-norm": ("hyperclovax", NO_HEAD_DIM | {"use_post_norm": False, "attention_multiplier": 0.1}),
}


def hf_model(name: str) -> transformers.PreTrainedModel:
    """A random model of `MODELS`, float32, eager attention, whose norms and biases are random too."""
    kind, changes = MODELS[name]
    keys = {k: v for k, v in (TINY | {"num_hidden_layers": 4} | changes).items() if k != "head_dim" or v is not None}
    config = transformers.AutoConfig.for_model(kind, **keys, attn_implementation="eager")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():  # ones and zeros, as they start, would hide a forgotten one
        for parameter, x in model.named_parameters():
            if "norm" in parameter or parameter.endswith("bias"):
                x.add_(0.3 * torch.randn_like(x))
    return model


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, TINY["vocab_size"], (2, LENGTH))


def torch_logits(model: transformers.PreTrainedModel) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens())).logits.numpy()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> (the folder that transformers saved, its logits), each made once."""

    @functools.cache
    def one(name: str) -> tuple[pathlib.Path, np.ndarray]:
        model = hf_model(name)
        return save_hf(model, tmp_path_factory.mktemp("model") / "hf"), torch_logits(model)

    return one


def distance(cfg: ModelConfig, params: Params, expected: np.ndarray) -> float:
    """Largest absolute difference of logits."""
    ours = jax.jit(lambda p, t: llama.logits(cfg, p, t))(params, jnp.array(tokens()))
    return float(np.abs(np.asarray(ours) - expected).max())


def opened(folder: pathlib.Path) -> tuple[Checkpoint, Params]:
    checkpoint = open_checkpoint(str(folder))
    return checkpoint, load_params(checkpoint)


@pytest.mark.parametrize("name", MODELS)
def test_logits_agree_with_transformers(saved, name):
    folder, expected = saved(name)
    checkpoint, params = opened(folder)
    assert np.abs(expected).max() > 1.0  # not so small that any model would agree
    assert distance(checkpoint.cfg, params, expected) < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_what_we_write_is_the_same_model_to_transformers(saved, tmp_path, name):
    folder, expected = saved(name)
    checkpoint, params = opened(folder)
    out = tmp_path / "out"
    out.mkdir()
    write_model(out, from_params(params, checkpoint.cfg, checkpoint.hf_config, {}), max_shard_size=10**9)
    there = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    back, report = transformers.AutoModelForCausalLM.from_pretrained(
        out, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = there.state_dict(), back.eval().state_dict()
    assert list(before) == list(after)
    for key, x in before.items():
        assert x.dtype == after[key].dtype
        assert x.numpy().tobytes() == after[key].numpy().tobytes(), key
    np.testing.assert_array_equal(torch_logits(back), expected)


# ---- The same comparison, of a model that leaves something out ------------------------------------------------------


def neutral(*names: str):
    """Some arrays of the layers at values that do nothing: norms' scales one, biases zero."""

    def damage(cfg: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
        layers = params["layers"]
        same = {name: jnp.full_like(layers[name], name.endswith("norm")) for name in names}
        return cfg, params | {"layers": layers | same}

    return damage


def changed(**keys):
    """The model under another config, without the arrays that this one has no place for."""

    def damage(cfg: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
        cfg = dataclasses.replace(cfg, **keys)
        return cfg, params | {"layers": {name: params["layers"][name] for name in layer_axes(cfg)}}

    return damage


CONTROLS = [
    *((name, f"{x}_bias dropped", neutral(f"{x}_bias")) for name in ("Qwen2", "Qwen3, biases") for x in "qv"),
    ("Llama, biases", "o_bias dropped", neutral("o_bias")),
    (
        "Qwen3, biases",
        "k_bias dropped",
        neutral("k_bias"),
    ),  # forgiven by a softmax, but not by k_norm
    ("Qwen3", "q_norm's scale dropped", neutral("q_norm")),
    ("Qwen3", "k_norm's scale dropped", neutral("k_norm")),
    *((name, "no bias at all", changed(attention_bias="")) for name in ("Llama, biases", "Qwen2", "Qwen3, biases")),
    ("Qwen3", "q_norm and k_norm dropped", changed(qk_norm=False)),
    ("Llama 3.1", "scaling ignored", changed(rope_scaling="")),
    ("Llama 3.1", "scaling taken for linear", changed(rope_scaling="linear")),
    ("Llama 3.1", "scaled from twice the positions", changed(rope_original_positions=512)),
    ("Llama 3.1", "another low_freq_factor", changed(rope_low_freq_factor=2.0)),
    ("Llama 3.1", "another high_freq_factor", changed(rope_high_freq_factor=3.0)),
    ("Llama, linear rope", "scaling ignored", changed(rope_scaling="")),
    ("Llama, linear rope", "another factor", changed(rope_factor=4.1)),
    ("Qwen2", "theta of Llama", changed(rope_theta=1e4)),
    *((name, "window ignored", changed(sliding_window=0)) for name in ("Mistral v0.1", "Qwen2, window")),
    *((name, "window off by one", changed(sliding_window=99)) for name in ("Mistral v0.1", "Qwen3, window")),
    ("Mistral v0.3", "a window that is none", changed(sliding_window=100)),
    *(("Llama, MLP biases", f"{x}_bias dropped", neutral(f"{x}_bias")) for x in ("gate", "up", "down")),
    *((name, "scaling ignored", changed(rope_scaling="")) for name in ("Llama, yarn", "Llama, dynamic rope")),
    ("Llama, yarn", "cosines and sines not scaled", changed(rope_attention_factor=0.0)),
    ("Llama, yarn", "another ramp", changed(rope_beta_fast=16.0)),
    ("Llama, yarn", "a ramp from other borders", changed(rope_untruncated=True)),
    ("Llama, dynamic rope", "another factor", changed(rope_factor=4.1)),
    ("SmolLM3", "all layers rotated", changed(no_rope_layers=())),
    ("SmolLM3, other layers", "the others rotated", changed(no_rope_layers=(1, 3))),
    *(
        (name, f"{key} ignored", changed(**{key: 0.0}))
        for name in ("Granite 3", "HyperCLOVAX")
        for key in ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_multiplier")
    ),
    ("Granite 3", "logits multiplied", changed(logits_multiplier=2.0)),
    *(("HyperCLOVAX", f"{x}_out_norm's scale dropped", neutral(f"{x}_out_norm")) for x in ("attn", "mlp")),
    ("HyperCLOVAX", "no norm after", changed(post_norm=False)),
]


@pytest.mark.parametrize(("name", "what", "damage"), CONTROLS, ids=[f"{c[0]}: {c[1]}" for c in CONTROLS])
def test_the_comparison_refuses_a_model_that_leaves_something_out(saved, name, what, damage):
    folder, expected = saved(name)
    checkpoint, params = opened(folder)
    assert distance(*damage(checkpoint.cfg, params), expected) > 10 * TOLERANCE, what


# ---- Growing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Llama, biases", "Qwen2", "Qwen3, biases", "Llama, MLP biases", "HyperCLOVAX"])
def test_layers_added_with_scale_zero_change_no_logit_of_a_model_with_biases(saved, name):
    folder, expected = saved(name)
    checkpoint, params = opened(folder)
    layer_map = make_layer_map(4, GrowthConfig("llama_pro", every=2))
    grown = grow(params, layer_map)
    assert distance(grown_config(checkpoint.cfg, layer_map), grown, expected) < TOLERANCE
    if "o_bias" in params["layers"]:  # forgotten, it alone would be added by each new layer
        grown["layers"]["o_bias"] = params["layers"]["o_bias"][jnp.array(layer_map.source)]
        assert distance(grown_config(checkpoint.cfg, layer_map), grown, expected) > 10 * TOLERANCE


@pytest.mark.parametrize(
    "name",
    ["Llama 3.1", "Mistral v0.1", "Qwen2, window", "Qwen3, window", "EXAONE 3", "Phi-3", "SmolLM3",
     "SmolLM3, other layers", "HyperCLOVAX"],
)  # fmt: skip
def test_a_grown_model_is_the_same_to_transformers(saved, tmp_path, name):
    checkpoint, params = opened(saved(name)[0])
    layer_map = make_layer_map(4, GrowthConfig("dus", m=1))
    cfg, hf_config = grown_config(checkpoint.cfg, layer_map), grown_hf_config(checkpoint.hf_config, layer_map.source)
    deeper = grow(params, layer_map)
    write_model(tmp_path, from_params(deeper, cfg, hf_config, {}), max_shard_size=10**9)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert model.config.num_hidden_layers == 6
    assert distance(cfg, deeper, torch_logits(model)) < TOLERANCE

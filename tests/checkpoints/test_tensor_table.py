"""The conversion table: where each number goes, and that nothing is lost on the way."""

import dataclasses

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

from solar_jax.checkpoints.hf_config import model_config
from solar_jax.checkpoints.tensor_table import TENSORS, from_hf, hf_shape, hf_tensors, to_hf
from solar_jax.config import ModelConfig
from solar_jax.model.shapes import param_axes, sizes
from tests.conftest import TINY

H = 3
# Every size another, so that no two axes can be taken for each other.
CFG = ModelConfig(
    vocab_size=11,
    hidden_size=6,
    intermediate_size=7,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=H,
    attention_bias="qkvo",
    qk_norm=True,
    mlp_bias=True,
    post_norm=True,
)

EXPERTS = dataclasses.replace(CFG, mlp_bias=False, num_local_experts=5)


def cfg_of(path: str) -> ModelConfig:
    return EXPERTS if "expert" in path or "router" in path else CFG


# Index in our array -> index in the file's, written out by hand.
PLACES = {
    "embed": lambda v, d: (v, d),
    "layers/attn_norm": lambda d: (d,),
    "layers/q_proj": lambda d, n, h: (n * H + h, d),
    "layers/k_proj": lambda d, k, h: (k * H + h, d),
    "layers/v_proj": lambda d, k, h: (k * H + h, d),
    "layers/o_proj": lambda n, h, d: (d, n * H + h),
    "layers/q_bias": lambda n, h: (n * H + h,),
    "layers/k_bias": lambda k, h: (k * H + h,),
    "layers/v_bias": lambda k, h: (k * H + h,),
    "layers/o_bias": lambda d: (d,),
    "layers/q_norm": lambda h: (h,),
    "layers/k_norm": lambda h: (h,),
    "layers/mlp_norm": lambda d: (d,),
    "layers/gate_proj": lambda d, f: (f, d),
    "layers/up_proj": lambda d, f: (f, d),
    "layers/down_proj": lambda f, d: (d, f),
    "layers/gate_bias": lambda f: (f,),
    "layers/up_bias": lambda f: (f,),
    "layers/down_bias": lambda d: (d,),
    "layers/router": lambda d, e: (e, d),
    "layers/experts_gate": lambda e, d, f: (e * 7 + f, d),
    "layers/experts_up": lambda e, d, f: (e * 7 + f, d),
    "layers/experts_down": lambda e, f, d: (e * 6 + d, f),
    "layers/attn_out_norm": lambda d: (d,),
    "layers/mlp_out_norm": lambda d: (d,),
    "final_norm": lambda d: (d,),
    "lm_head": lambda d, v: (v, d),
}


def our_shape(path: str) -> tuple[int, ...]:
    tree, size = param_axes(cfg_of(path)), sizes(cfg_of(path))
    group, _, leaf = path.rpartition("/")
    letters = tree[group][leaf].removeprefix("L") if group else tree[leaf]
    return tuple(size[x] for x in letters)


def random_bits(shape: tuple[int, ...], dtype) -> np.ndarray:
    """Any bits: NaNs with payloads and subnormal numbers too."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(np.random.default_rng(size).bytes(size), dtype).reshape(shape)


def test_the_hand_written_places_cover_the_table():
    assert set(PLACES) == set(TENSORS)


@pytest.mark.parametrize("path", TENSORS)
def test_each_number_goes_to_its_place(path):
    hf = np.arange(np.prod(hf_shape(path, cfg_of(path))), dtype=np.float32).reshape(hf_shape(path, cfg_of(path)))
    ours = from_hf(hf, path, cfg_of(path))
    assert ours.shape == our_shape(path)
    for index in np.ndindex(ours.shape):
        assert ours[index] == hf[PLACES[path](*index)]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("path", TENSORS)
def test_no_bit_changes_there_and_back(path, dtype):
    hf = random_bits(hf_shape(path, cfg_of(path)), dtype)
    back = to_hf(from_hf(hf, path, cfg_of(path)), path, cfg_of(path))
    assert (back.shape, back.dtype, back.tobytes()) == (hf.shape, hf.dtype, hf.tobytes())
    ours = random_bits(our_shape(path), dtype)
    back = from_hf(to_hf(ours, path, cfg_of(path)), path, cfg_of(path))
    assert (back.shape, back.dtype, back.tobytes()) == (ours.shape, ours.dtype, ours.tobytes())


# Every set of tensors that an architecture has: (model_type, changes of its config).
MODELS = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True}),
    ("mistral", {}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("qwen3", {"attention_bias": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("seed_oss", {}),
    ("internlm3", {}),
    ("exaone", {}),
    ("smollm3", {"tie_word_embeddings": False}),
    ("granite", {}),
    ("hyperclovax", {"mlp_bias": True}),
]
IDS = [
    "llama", "llama, tied", "llama, biases", "mistral", "qwen2", "qwen3", "qwen3, biases", "llama, MLP biases",
    "seed_oss", "internlm3", "exaone", "smollm3", "granite", "hyperclovax, MLP biases",
]  # fmt: skip


def state_dict(kind: str, changes: dict) -> tuple[ModelConfig, dict[str, tuple[int, ...]]]:
    """A transformers model's config and its tensors' shapes, in its order."""
    config = transformers.AutoConfig.for_model(kind, **TINY | changes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    if changes.get("tie_word_embeddings"):  # the embedding under a second name, which transformers does not save
        del shapes["lm_head.weight"]
    return model_config(model.config.to_dict(), "config.json"), shapes


@pytest.mark.parametrize("model", MODELS, ids=IDS)
def test_the_tensors_and_shapes_are_those_of_transformers(model):
    cfg, shapes = state_dict(*model)
    names = [name for name, _, _ in hf_tensors(cfg)]
    assert len(names) == len(set(names))
    assert {name: hf_shape(path, cfg) for name, path, _ in hf_tensors(cfg)} == shapes


@pytest.mark.parametrize("model", MODELS, ids=IDS)
def test_the_tensors_come_in_the_order_of_transformers(model):
    cfg, shapes = state_dict(*model)
    assert [name for name, _, _ in hf_tensors(cfg)] == list(shapes)


@pytest.mark.parametrize("architecture", [gguf.MODEL_ARCH.LLAMA, gguf.MODEL_ARCH.QWEN2, gguf.MODEL_ARCH.QWEN3])
def test_the_gguf_names_are_those_of_the_gguf_package(architecture):
    names = gguf.get_tensor_name_map(architecture, 1)
    for path, row in TENSORS.items():
        if path in ("layers/q_norm", "layers/k_norm") and architecture is not gguf.MODEL_ARCH.QWEN3:
            continue
        if ("expert" in path or "router" in path) and architecture is not gguf.MODEL_ARCH.LLAMA:
            continue
        if path.endswith("out_norm"):  # of an architecture that is not read from GGUF
            continue
        hf, _, kind = row.hf.format(0).rpartition(".")
        assert f"{names.get_name(hf)}.{kind}" == row.gguf.format(0)


def test_each_tensor_is_listed_with_its_own_layer():
    for name, path, layer in hf_tensors(CFG):
        assert name == TENSORS[path].hf.format(layer)
        assert (layer is None) == (not path.startswith("layers/"))

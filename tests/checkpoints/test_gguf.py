"""GGUF files in: the original tensors bit by bit, the tokenizer, and files that are none of ours."""

import pathlib

import gguf
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from solar_jax.checkpoints.hf_config import model_config
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.tensor_table import TENSORS
from solar_jax.checkpoints.tokenizer import eos_id
from solar_jax.errors import UserError
from tests.conftest import TINY, byte_tokenizer, hf_model

LAYERS = 2


def llama_cpp_order(x: np.ndarray, heads: int) -> np.ndarray:
    """q_proj or k_proj as llama.cpp's converter stores it: the halves of each rotary pair side by side."""
    return x.reshape(heads, 2, x.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(x.shape)


def hf_tensors(tied: bool = False, **changes) -> dict[str, np.ndarray]:
    return state_dict(hf_model(num_hidden_layers=LAYERS, tie_word_embeddings=tied, **changes))


def state_dict(model: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    tied = model.config.tie_word_embeddings
    return {k: x.numpy() for k, x in model.state_dict().items() if not (tied and k == "lm_head.weight")}


def write_gguf(
    file: pathlib.Path,
    tensors: dict[str, np.ndarray],
    permute: bool = True,
    arch: str = "llama",
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    raw: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]] | None = None,
    **changes,
) -> pathlib.Path:
    """A file as llama.cpp's converter makes it of `tensors`, its matrices quantised, and of tensors that are bytes.

    `changes` are metadata keys, "__" for ".", that take another value, or are left out if None.
    """
    vocab = sorted(byte_tokenizer().get_vocab().items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocab] + ["th", "<own>"]
    metadata = {
        "general.architecture": arch,
        f"{arch}.vocab_size": TINY["vocab_size"],
        f"{arch}.context_length": TINY["max_position_embeddings"],
        f"{arch}.embedding_length": TINY["hidden_size"],
        f"{arch}.feed_forward_length": TINY["intermediate_size"],
        f"{arch}.block_count": LAYERS,
        f"{arch}.attention.head_count": TINY["num_attention_heads"],
        f"{arch}.attention.head_count_kv": TINY["num_key_value_heads"],
        f"{arch}.attention.key_length": TINY["head_dim"],
        f"{arch}.attention.layer_norm_rms_epsilon": TINY["rms_norm_eps"],
        f"{arch}.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3, *[1] * 257, 4],
        "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | {k.replace("__", "."): v for k, v in changes.items()}
    # The writer adds the architecture by itself.
    writer = gguf.GGUFWriter(file, metadata.pop("general.architecture"))
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    for name, x in tensors.items():
        layer = name.split(".")[2] if name.startswith("model.layers.") else ""
        gguf_name = {row.hf.format(layer): row.gguf.format(layer) for row in TENSORS.values()}.get(name, name)
        for projection, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if permute and arch == "llama" and projection in name:
                x = llama_cpp_order(x, TINY[heads])
        if x.ndim == 1:
            writer.add_tensor(gguf_name, np.ascontiguousarray(x, np.float32))
        else:
            packed = gguf.quants.quantize(np.ascontiguousarray(x, np.float32), kind)
            writer.add_tensor(gguf_name, packed, raw_dtype=kind)
    for name, (packed, of) in (raw or {}).items():
        writer.add_tensor(name, packed, raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def refusal(file: pathlib.Path) -> str:
    """The one line that opening `file` ends with."""
    with pytest.raises(UserError) as e:
        open_checkpoint(str(file))
    text = str(e.value)
    assert text.startswith(f"{file}: ")
    assert len(text.splitlines()) == 1
    return text.removeprefix(f"{file}: ")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> pathlib.Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "whole.gguf", hf_tensors())


def test_the_file_names_of_the_table_are_llama_cpps():
    # The writer above takes them from the table too, so only the package can tell that they are right.
    dense = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, LAYERS)
    experts = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for path, row in TENSORS.items():
        if path.endswith("out_norm"):  # of an architecture that is not read from GGUF
            continue
        names = experts if "expert" in path or "router" in path else dense
        assert names.get_name(row.hf.format(1), try_suffixes=(".weight", ".bias")) == row.gguf.format(1)


@pytest.mark.parametrize("tied", [False, True])
def test_the_tensors_are_the_original_bit_by_bit(tmp_path, tied):
    expected = hf_tensors(tied)
    c = open_checkpoint(str(write_gguf(tmp_path / "x.gguf", expected)))
    assert c.cfg.tie_word_embeddings == tied
    assert c.shape_of == {name: x.shape for name, x in expected.items()}
    for name, x in expected.items():
        found = c.read(name)
        assert (found.dtype, found.shape, found.tobytes()) == (x.dtype, x.shape, x.tobytes())


def test_a_file_in_hugging_faces_own_order_would_come_out_wrong(tmp_path):
    expected = hf_tensors()
    c = open_checkpoint(str(write_gguf(tmp_path / "x.gguf", expected, permute=False)))
    differ = {name for name, x in expected.items() if not np.array_equal(c.read(name), x)}
    assert differ == {name for name in expected if "q_proj" in name or "k_proj" in name}


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_as_many_kv_heads_as_heads_need_not_be_said(tmp_path, arch):
    expected = state_dict(random_model(CONFIGS[arch](num_key_value_heads=4)))
    permuted = ("q_proj", "k_proj") if arch == "llama" else ()
    tensors = {k: llama_cpp_order(x, 4) if any(p in k for p in permuted) else x for k, x in expected.items()}
    keys = {f"{arch}__attention__head_count_kv": None}
    c = open_checkpoint(str(write_gguf(tmp_path / "x.gguf", tensors, permute=False, arch=arch, **keys)))
    assert c.hf_config["num_key_value_heads"] == 4  # a config may mean another number by leaving it out
    for name, x in expected.items():
        np.testing.assert_array_equal(c.read(name), x)


def test_the_config_is_the_originals(whole):
    c = open_checkpoint(str(whole))
    assert c.cfg == model_config(hf_model(num_hidden_layers=LAYERS).config.to_dict(), "")
    assert c.cfg.rms_norm_eps == 1e-5  # the file's float32 reads 9.999999747e-06
    assert c.dtype == "float32"
    assert eos_id(c) == 2


def random_model(config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """A model whose norms and biases are random too, which start as ones and zeros."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
    return model


SMALL = TINY | {"num_hidden_layers": LAYERS}
CONFIGS = {
    "llama": lambda **changes: transformers.LlamaConfig(**SMALL | changes),
    "qwen2": lambda **changes: transformers.Qwen2Config(**SMALL | {"hidden_size": 96} | changes),  # 4 heads of 24
    "qwen3": lambda **changes: transformers.Qwen3Config(**SMALL | changes),
}


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True}),
        ("qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    ],
)
def test_every_architecture_is_the_original_and_what_transformers_reads(tmp_path, arch, changes):
    model = random_model(CONFIGS[arch](**changes))
    expected = state_dict(model)
    keys = {
        f"{arch}__embedding_length": model.config.hidden_size,
        f"{arch}__rope__freq_base": float(model.config.rope_parameters["rope_theta"]),
        "tokenizer__ggml__tokens": [str(i) for i in range(TINY["vocab_size"])],  # which transformers counts
        "tokenizer__ggml__token_type": [1] * TINY["vocab_size"],
        "tokenizer__ggml__merges": ["1 0"],
        f"{arch}__vocab_size": None if arch == "qwen2" else TINY["vocab_size"],  # the converter leaves it out
        f"{arch}__attention__key_length": None if arch == "qwen2" else TINY["head_dim"],
    }
    file = write_gguf(tmp_path / "x.gguf", expected, arch=arch, **keys)
    c = open_checkpoint(str(file))
    assert c.cfg == model_config(model.config.to_dict(), "")
    assert set(c.shape_of) == set(expected)
    for name, x in expected.items():
        np.testing.assert_array_equal(c.read(name), x)
    if "attention_bias" in changes:  # transformers' reader has no places for them
        return
    read = transformers.AutoModelForCausalLM.from_pretrained  # with the config, since it leaves out a head's size
    theirs = read(tmp_path, gguf_file="x.gguf", config=model.config, dtype=torch.float32)
    for name, x in state_dict(theirs).items():
        np.testing.assert_array_equal(c.read(name), x)


def test_transformers_makes_the_same_of_the_config(tmp_path):
    for arch, make in CONFIGS.items():
        model = random_model(make())
        keys = {f"{arch}__embedding_length": model.config.hidden_size, f"{arch}__rope__scaling__factor": 4.0}
        c = open_checkpoint(str(write_gguf(tmp_path / f"{arch}.gguf", state_dict(model), arch=arch, **keys)))
        config = type(model.config)(**c.hf_config)
        assert config.rope_parameters == {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
        config.rope_parameters = model.config.rope_parameters
        ours, theirs = config.to_dict(), model.config.to_dict()
        shape = {*TINY, "attention_bias", "tie_word_embeddings", "hidden_act", "layer_types", "rope_parameters"}
        shape -= {"pad_token_id", "initializer_range", "attn_implementation"}
        assert {k: ours.get(k) for k in shape} == {k: theirs.get(k) for k in shape}


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({}, 0.0),
        ({"llama__rope__scaling__type": "none", "llama__rope__scaling__factor": 4.0}, 0.0),
        ({"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0}, 4.0),
        ({"llama__rope__scaling__factor": 2.5}, 2.5),  # as llama.cpp takes it
        ({"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 1.0}, 0.0),
        ({"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 0.0}, 0.0),
        ({"llama__rope__scaling__type": "linear"}, 0.0),
    ],
)
def test_linear_rope_scaling_is_read(tmp_path, keys, factor):
    c = open_checkpoint(str(write_gguf(tmp_path / "x.gguf", hf_tensors(), **keys)))
    assert (c.cfg.rope_scaling, c.cfg.rope_factor) == (("linear", factor) if factor else ("", c.cfg.rope_factor))


def llama3_factors(factor: float, low: float = 1.0, high: float = 4.0) -> tuple[np.ndarray, dict]:
    """Factors that llama.cpp's converter stores: the plain frequencies over transformers' scaled ones."""
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": low}
    rope |= {"high_freq_factor": high, "original_max_position_embeddings": 8192}
    config = CONFIGS["llama"](rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, TINY["head_dim"], 2, dtype=torch.int64).float() / TINY["head_dim"])
    return (plain / scaled).numpy(), rope


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_rope_scaling_is_found_in_its_factors(tmp_path, factor):
    factors, rope = llama3_factors(factor)
    assert 1 < np.sort(np.unique(factors))[1] < factor  # one that is neither long nor short
    tensors = hf_tensors() | {"rope_freqs.weight": factors}
    c = open_checkpoint(str(write_gguf(tmp_path / "x.gguf", tensors, llama__rope__freq_base=500000.0)))
    assert c.cfg == model_config(CONFIGS["llama"](rope_parameters=rope).to_dict(), "")
    assert transformers.LlamaConfig(**c.hf_config).rope_parameters == rope


@pytest.mark.parametrize(
    ("factors", "keys"),
    [
        (llama3_factors(8.0)[0] * np.float32(1.001), {}),
        (llama3_factors(8.0, low=2.0)[0], {}),
        (llama3_factors(8.0)[0], {"llama__rope__freq_base": 10000.0}),
        (llama3_factors(8.0)[0], {"llama__rope__scaling__factor": 2.0}),
        (llama3_factors(8.0)[0][:-1], {}),
        (np.linspace(1, 8, 12, dtype=np.float32), {}),
        (np.full(12, np.nan, np.float32), {}),
        (np.zeros(12, np.float32), {}),
    ],
)
def test_rope_factors_of_another_kind_are_refused(tmp_path, factors, keys):
    keys = {"llama__rope__freq_base": 500000.0} | keys
    file = write_gguf(tmp_path / "x.gguf", hf_tensors() | {"rope_freqs.weight": factors}, **keys)
    assert "rope_freqs.weight" in refusal(file)


def test_rope_factors_of_one_change_nothing(tmp_path):
    tensors = hf_tensors() | {"rope_freqs.weight": np.ones(12, np.float32)}
    assert not open_checkpoint(str(write_gguf(tmp_path / "x.gguf", tensors))).cfg.rope_scaling


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("general__architecture", "gemma", "'gemma'"),
        ("general__type", "adapter", "'adapter'"),
        ("split__count", 3, "3 parts"),
        ("llama__rope__scaling__type", "yarn", "'yarn'"),
        ("llama__rope__scaling__type", 3, "found 3"),
        ("llama__rope__scaling__factor", "4", "'4'"),
        ("llama__rope__scaling__factor", float("nan"), "nan"),
        ("llama__rope__freq_base", "big", "llama.rope.freq_base"),
        ("llama__rope__freq_base", -1.0, "rope_theta"),
        ("llama__rope__dimension_count", 12, "llama.rope.dimension_count must be 24, found 12"),
        ("llama__attention__value_length", 32, "llama.attention.value_length must be 24, found 32"),
        ("llama__attention__causal", False, "llama.attention.causal must be True"),
        ("llama__attention__sliding_window", 4096, "llama.attention.sliding_window"),
        ("llama__expert_count", 8, "llama.expert_count"),
        ("llama__logit_scale", 0.5, "llama.logit_scale"),
        ("llama__block_count", 1 << 31, "llama.block_count"),
        ("llama__block_count", [2, 2], "llama.block_count must be a number, found array"),
        ("llama__vocab_size", 321, "model.embed_tokens.weight"),
        ("llama__attention__head_count", None, "llama.attention.head_count"),
        ("llama__attention__head_count", 0, "llama.attention.head_count must be a positive integer, found 0"),
        ("llama__attention__head_count", 7, "does not hold 7 heads"),
        ("llama__attention__head_count_kv", [2, 2], "llama.attention.head_count_kv"),
        ("llama__attention__layer_norm_rms_epsilon", None, "llama.attention.layer_norm_rms_epsilon"),
        ("llama__context_length", None, "llama.context_length"),
        ("general__alignment", 31, "general.alignment"),
    ],
)
def test_metadata_that_cannot_be_used_is_named(tmp_path, key, value, said):
    assert said in refusal(write_gguf(tmp_path / "x.gguf", hf_tensors(), **{key: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("general__type", "model"),
        ("split__count", 1),
        ("llama__expert_count", 0),
        ("llama__attention__sliding_window", 0),
        ("llama__rope__dimension_count", 24),
        ("llama__attention__causal", True),
        ("llama__vocab_size", None),
        ("gemma__logit_scale", 0.5),  # of no concern to this architecture
    ],
)
def test_metadata_that_change_nothing_are_no_reason_to_refuse(tmp_path, whole, key, value):
    c = open_checkpoint(str(write_gguf(tmp_path / "x.gguf", hf_tensors(), **{key: value})))
    assert c.cfg == open_checkpoint(str(whole)).cfg


@pytest.mark.parametrize("name", ["blk.0.attn_rot_embd.weight", "blk.0.attn_sub_norm.weight", "output.bias", "x"])
def test_a_tensor_that_the_model_has_no_place_for_is_named(tmp_path, name):
    tensors = hf_tensors() | {name: np.ones(96, np.float32)}
    assert name in refusal(write_gguf(tmp_path / "x.gguf", tensors))


def test_a_bias_without_the_others_is_refused(tmp_path):
    tensors = hf_tensors() | {"model.layers.0.self_attn.q_proj.bias": np.ones(96, np.float32)}
    assert "model.layers.0.self_attn.k_proj.bias" in refusal(write_gguf(tmp_path / "x.gguf", tensors))


def test_a_layer_more_than_the_file_says_is_named(tmp_path):
    assert "model.layers.1." in refusal(write_gguf(tmp_path / "x.gguf", hf_tensors(), llama__block_count=1))


def test_a_missing_tensor_is_named(tmp_path):
    tensors = hf_tensors()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    assert "model.layers.1.mlp.up_proj.weight" in refusal(write_gguf(tmp_path / "x.gguf", tensors))


def test_a_tensor_of_another_shape_is_named(tmp_path):
    tensors = hf_tensors()
    tensors["model.norm.weight"] = np.ones(63, np.float32)
    text = refusal(write_gguf(tmp_path / "x.gguf", tensors))
    assert "model.norm.weight" in text
    assert "(64,)" in text
    assert "(63,)" in text


@pytest.mark.slow
def test_smollm2s_config_is_the_one_that_its_authors_published(smollm2):
    hf = smollm2.hf_config
    expected = {
        "model_type": "llama",
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert {key: hf.get(key) for key in expected} == expected
    assert smollm2.cfg.head_dim == 64
    assert eos_id(smollm2) == 2

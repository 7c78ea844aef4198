"""config.json of each family as transformers writes it, and the keys that must be refused."""

import json

import pytest
import transformers

from solar_jax.config import ModelConfig
from solar_jax.errors import UserError
from solar_jax.hf.families import grown_hf_config, model_config
from tests.conftest import TINY

CLASSES = {"llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig}
SIZES = {key: TINY[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}


def written(folder, kind: str, **changes) -> dict:
    """The content of the config.json that transformers writes."""
    CLASSES[kind](**TINY | changes).save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("older", [False, True], ids=["rope_parameters", "rope_theta at the top"])
@pytest.mark.parametrize(("kind", "window"), [("llama", None), ("mistral", 100), ("mistral", None)])
def test_every_key_that_transformers_writes_is_read(tmp_path, kind, window, older):
    window_key = {"sliding_window": window} if kind == "mistral" else {}
    rope = {"rope_type": "default", "rope_theta": 5e5}
    hf = written(tmp_path, kind, rope_parameters=rope, tie_word_embeddings=True, **window_key)
    assert hf["rope_parameters"] == rope
    if older:
        hf["rope_theta"] = hf.pop("rope_parameters")["rope_theta"]
    assert model_config(hf, "config.json") == ModelConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=1024,
        rope_theta=5e5,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        sliding_window=window or 0,
    )


def test_a_llama_has_no_sliding_window_even_if_its_config_names_one(tmp_path):
    assert model_config(written(tmp_path, "llama") | {"sliding_window": 8}, "config.json").sliding_window == 0


@pytest.mark.parametrize("kind", CLASSES)
def test_an_absent_key_takes_transformers_default(kind):
    # 16 heads: neither 8 nor 32, the classes' own default numbers of kv heads, so a fixed default shows.
    hf = {"model_type": kind, "num_attention_heads": 16} | SIZES
    expected = CLASSES[kind](num_attention_heads=16, **SIZES)
    found = model_config(hf, "config.json")
    keys = ["num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"]
    if kind == "llama":  # there the class's default is of its default size; the documented rule is "as many as heads"
        assert found.num_key_value_heads == 16
        keys.remove("num_key_value_heads")
    assert {key: getattr(found, key) for key in keys} == {key: getattr(expected, key) for key in keys}
    assert found.rope_theta == expected.rope_parameters["rope_theta"]
    assert found.sliding_window == (getattr(expected, "sliding_window", None) or 0)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "key", "found"),
    [
        ({"rope_parameters": None, "rope_scaling": LLAMA3}, "rope_scaling", "llama3"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling", "linear"),
        ({"rope_parameters": LLAMA3}, "rope_parameters", "llama3"),
        # transformers takes rope_scaling where a file has both
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling", "linear"),
        ({"rope_parameters": "default"}, "rope_parameters", "default"),
        ({"attention_bias": True}, "attention_bias", "True"),
        ({"mlp_bias": True}, "mlp_bias", "True"),
        ({"hidden_act": "gelu"}, "hidden_act", "gelu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config", "bits"),
        ({"model_type": "qwen2"}, "model_type", "qwen2"),
        ({"model_type": None}, "model_type", "None"),
        *(({key: None}, key, "None") for key in (*SIZES, "num_attention_heads")),
        ({"hidden_size": 0}, "hidden_size", "0"),
        ({"hidden_size": "64"}, "hidden_size", "'64'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads", "3"),
        ({"num_key_value_heads": -2}, "num_key_value_heads", "-2"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads", "'2'"),
        ({"head_dim": 5}, "head_dim", "5"),
        ({"head_dim": -2}, "head_dim", "-2"),
        ({"head_dim": "24"}, "head_dim", "'24'"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps", "'small'"),
        ({"max_position_embeddings": "many"}, "max_position_embeddings", "'many'"),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta", "'big'"),
        ({"rope_parameters": None, "rope_theta": "big"}, "rope_theta", "'big'"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_key_that_the_model_does_not_compute_is_refused_by_name_and_value(tmp_path, changes, key, found):
    hf = written(tmp_path, "llama")
    model_config(hf, "config.json")  # without the change it is accepted
    changed = {k: v for k, v in (hf | changes).items() if v is not None}  # None stands for a key left out
    with pytest.raises(UserError) as e:
        model_config(changed, "some/config.json")
    text = str(e.value)
    assert text.startswith("some/config.json: ")
    assert key in text
    assert found in text.removeprefix("some/config.json: ").replace(key, "")
    assert "\n" not in text


def test_a_window_that_is_no_number_is_refused(tmp_path):
    hf = written(tmp_path, "mistral") | {"sliding_window": "wide"}
    with pytest.raises(UserError, match=r"^c: sliding_window .*'wide'"):
        model_config(hf, "c")


@pytest.mark.parametrize("dtype_keys", [["dtype"], ["torch_dtype"], ["dtype", "torch_dtype"]])
def test_growing_a_config_changes_the_depth_and_dtype_and_nothing_else(tmp_path, dtype_keys):
    hf = written(tmp_path, "llama") | {"num_hidden_layers": 6, "own_key": {"a": [1, None]}}
    hf.pop("dtype", None)
    hf |= dict.fromkeys(dtype_keys, "float32")
    before = json.dumps(hf)
    grown = grown_hf_config(hf, 9, "bfloat16")
    assert grown == hf | {"num_hidden_layers": 9} | dict.fromkeys(dtype_keys, "bfloat16")
    assert json.dumps(hf) == before


def test_a_grown_config_without_a_dtype_gets_one(tmp_path):
    hf = written(tmp_path, "llama")
    hf.pop("dtype", None)
    assert grown_hf_config(hf, 9, "float16") == hf | {"num_hidden_layers": 9, "dtype": "float16"}

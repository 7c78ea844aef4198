"""config.json of each family as transformers writes it and as hubs have it, and the keys that must be refused."""

import dataclasses
import json

import pytest
import transformers

from solar_jax.checkpoints.hf_config import grown_hf_config, model_config, with_dtype
from solar_jax.checkpoints.hf_families import FAMILIES, FIXED, HARMLESS
from solar_jax.checkpoints.hf_families import SIZES as SIZE_KEYS
from solar_jax.config import ModelConfig
from solar_jax.errors import UserError
from solar_jax.model.shapes import parameter_count
from tests.conftest import TINY

KINDS = ("llama", "mistral", "qwen2", "qwen3")
SIZES = {key: TINY[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
L = TINY["num_hidden_layers"]
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip


def written(folder, kind: str, **changes) -> dict:
    """The content of the config.json that transformers writes."""
    transformers.AutoConfig.for_model(kind, **TINY | changes).save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


TINY_CONFIG = ModelConfig(
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
)


def refusal(hf: dict) -> str:
    with pytest.raises(UserError) as e:
        model_config(hf, "some/config.json")
    text = str(e.value)
    assert text.startswith("some/config.json: ")
    assert "\n" not in text
    return text.removeprefix("some/config.json: ")


# ---- What is read ---------------------------------------------------------------------------------------------------

# (kind, what transformers is told, what we must find)
READ = [
    ("llama", {}, {}),
    ("llama", {"attention_bias": True}, {"attention_bias": "qkvo"}),
    ("mistral", {"sliding_window": 100}, {"sliding_window": 100}),
    ("mistral", {"sliding_window": None}, {}),
    ("qwen2", {}, {"attention_bias": "qkv"}),
    ("qwen2", {"sliding_window": 100}, {"attention_bias": "qkv"}),
    (
        "qwen2",
        {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 0},
        {"attention_bias": "qkv", "sliding_window": 100},
    ),
    ("qwen3", {}, {"qk_norm": True}),
    ("qwen3", {"attention_bias": True}, {"qk_norm": True, "attention_bias": "qkvo"}),
    (
        "qwen3",
        {"sliding_window": 100, "use_sliding_window": True, "layer_types": ["sliding_attention"] * L},
        {"qk_norm": True, "sliding_window": 100},
    ),
]


@pytest.mark.parametrize("older", [False, True], ids=["rope_parameters", "rope_theta at the top"])
@pytest.mark.parametrize(("kind", "changes", "expected"), READ)
def test_every_key_that_transformers_writes_is_read(tmp_path, kind, changes, expected, older):
    rope = {"rope_type": "default", "rope_theta": 5e5}
    hf = written(tmp_path, kind, rope_parameters=rope, tie_word_embeddings=True, **changes)
    assert hf["rope_parameters"] == rope
    if older:
        hf["rope_theta"] = hf.pop("rope_parameters")["rope_theta"]
    assert model_config(hf, "config.json") == dataclasses.replace(TINY_CONFIG, **expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (LINEAR, {"rope_scaling": "linear", "rope_factor": 4.0}),
        (
            LLAMA3,
            {
                "rope_scaling": "llama3", "rope_factor": 8.0, "rope_low_freq_factor": 1.0,
                "rope_high_freq_factor": 4.0, "rope_original_positions": 256,
            },
        ),
    ],
    ids=["linear", "llama3"],
)  # fmt: skip
def test_rope_scaling_is_read_in_the_style_of_every_age(tmp_path, kind, rope, expected):
    newest = written(tmp_path, kind, rope_parameters=rope | {"rope_theta": 5e5}, tie_word_embeddings=True)
    older = {k: v for k, v in newest.items() if k != "rope_parameters"} | {"rope_theta": 5e5, "rope_scaling": rope}
    oldest_rope = {"type": rope["rope_type"]} | {k: v for k, v in rope.items() if k != "rope_type"}
    oldest = older | {"rope_scaling": oldest_rope}
    both = newest | {"rope_theta": 5e5, "rope_scaling": rope}
    for hf in (newest, older, oldest, both):
        found = model_config(hf, "config.json")
        assert {key: getattr(found, key) for key in expected} == expected
        assert found.rope_theta == 5e5


def test_llama3_scaling_without_its_original_length_takes_the_models(tmp_path):
    rope = {k: v for k, v in LLAMA3.items() if not k.startswith("original")}
    hf = written(tmp_path, "llama") | {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": rope}
    expected = transformers.LlamaConfig(**TINY | {"rope_scaling": dict(rope)}).rope_parameters
    found = model_config(hf, "config.json").rope_original_positions
    assert found == expected["original_max_position_embeddings"] == 1024


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_key_of_transformers_config_class_is_known(kind):
    config = transformers.AutoConfig.for_model(kind).to_dict()
    known = {*SIZE_KEYS, *FAMILIES[kind].defaults, *FAMILIES[kind].fixed, *FAMILIES[kind].ignored, *FIXED, *HARMLESS}
    assert set(config) - known == set()
    model_config(config, "config.json")


@pytest.mark.parametrize("kind", FAMILIES)
def test_old_generation_keys_and_training_notes_are_let_through(kind):
    generation = transformers.GenerationConfig._get_default_generation_params()
    hf = {"model_type": kind, "num_attention_heads": 64, "hidden_size": 128, "head_dim": 8} | {
        "vocab_size": 32, "intermediate_size": 8, "num_hidden_layers": 2,
    }  # fmt: skip
    notes = {"unsloth_version": "2024.9", "_name_or_path": "a/b", "auto_map": {"AutoConfig": "x.y"}, "num_labels": 3}
    assert model_config(hf | dict.fromkeys(generation, 7) | notes, "c") == model_config(hf, "c")


@pytest.mark.parametrize("empty", [None, False, {}, []], ids=repr)
def test_an_unknown_key_that_says_nothing_is_let_through(tmp_path, empty):
    hf = written(tmp_path, "llama")
    assert model_config(hf | {"scale_embeddings_by": empty}, "c") == model_config(hf, "c")


def test_a_llama_has_no_sliding_window_even_if_its_config_names_one(tmp_path):
    names = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3}
    assert model_config(written(tmp_path, "llama") | names, "config.json").sliding_window == 0


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_absent_key_takes_transformers_default(kind):
    # 16 heads: neither 8 nor 32, the classes' own default numbers of kv heads, so a fixed default shows.
    heads = 64 if kind.startswith("qwen") else 16
    hf = {"model_type": kind, "num_attention_heads": heads} | SIZES | {"hidden_size": 128}
    expected = transformers.AutoConfig.for_model(**hf)
    found = model_config(hf, "config.json")
    keys = ["num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"]
    if kind in (
        "llama",
        "granite",
        "hyperclovax",
    ):  # there the class's default is of its default size; the documented rule is "as many as heads"
        assert found.num_key_value_heads == 16
        keys.remove("num_key_value_heads")
    if kind in ("qwen2", "granite", "smollm3", "phi3"):  # the class has no such key, the model divides
        assert found.head_dim == 128 // heads
        keys.remove("head_dim")
    if kind in ("ministral", "mixtral"):  # the class says None, the model divides
        assert found.head_dim == 8
        keys.remove("head_dim")
    assert {key: getattr(found, key) for key in keys} == {key: getattr(expected, key) for key in keys}
    assert found.rope_theta == expected.rope_parameters["rope_theta"]
    assert found.sliding_window == (getattr(expected, "sliding_window", None) or 0)


# name -> (model_type, V, D, F, L, N, K, what else its config.json says, the parameters that its hub page counts)
PUBLISHED = {
    "Llama 2 7B": ("llama", 32000, 4096, 11008, 32, 32, 32, {}, 6_738_415_616),
    "Llama 3.1 8B": (
        "llama", 128256, 4096, 14336, 32, 32, 8,
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192}, "rope_theta": 5e5}, 8_030_261_248,
    ),
    "SOLAR 10.7B": ("llama", 32000, 4096, 14336, 48, 32, 8, {}, 10_731_524_096),
    "TinyLlama 1.1B": ("llama", 32000, 2048, 5632, 22, 32, 4, {}, 1_100_048_384),
    "Yi 6B": ("llama", 64000, 4096, 11008, 32, 32, 4, {}, 6_061_035_520),
    "SmolLM2 135M": (
        "llama", 49152, 576, 1536, 30, 9, 3,
        {"tie_word_embeddings": True, "is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 1,
         "transformers.js_config": {"dtype": "q4"}}, 134_515_008,
    ),
    "Mistral 7B v0.1": ("mistral", 32000, 4096, 14336, 32, 32, 8, {"sliding_window": 4096}, 7_241_732_096),
    "Mistral 7B v0.3": ("mistral", 32768, 4096, 14336, 32, 32, 8, {"sliding_window": None}, 7_248_023_552),
    "Mistral Nemo 12B": (
        "mistral", 131072, 5120, 14336, 40, 32, 8, {"sliding_window": None, "head_dim": 128}, 12_247_782_400,
    ),
    "Qwen2.5 0.5B": (
        "qwen2", 151936, 896, 4864, 24, 14, 2,
        {"tie_word_embeddings": True, "sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 24},
        494_032_768,
    ),
    "Qwen2.5 7B": ("qwen2", 152064, 3584, 18944, 28, 28, 4, {"use_mrope": False}, 7_615_616_512),
    "Qwen3 0.6B": (
        "qwen3", 151936, 1024, 3072, 28, 16, 8,
        {"tie_word_embeddings": True, "head_dim": 128, "attention_bias": False, "max_window_layers": 28}, 596_049_920,
    ),
    "Qwen3 8B": ("qwen3", 151936, 4096, 12288, 36, 32, 8, {"head_dim": 128, "rope_scaling": None}, 8_190_735_360),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_as_many_parameters_as_its_page_says(name):
    kind, *sizes, heads, kv_heads, others, parameters = PUBLISHED[name]
    hf = dict(zip(SIZES, sizes, strict=True)) | {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    hf |= {"model_type": kind, "architectures": [FAMILIES[kind].architecture], "torch_dtype": "bfloat16"} | others
    assert parameter_count(model_config(hf, "config.json")) == parameters


# ---- What is refused ------------------------------------------------------------------------------------------------

WINDOW = {"sliding_window": 100, "use_sliding_window": True}
MIXED = ["full_attention"] * 2 + ["sliding_attention"] * (L - 2)

# (kind, changes of the config that transformers writes, None being a key left out; the key; the value in the message)
REFUSED = [
    *(
        ("llama", {"rope_parameters": None, "rope_scaling": {style: kind}}, f"rope_scaling.{style}", kind)
        for kind in ("longrope", "su", "mrope", "proportional")
        for style in ("type", "rope_type")
    ),
    ("qwen3", {"rope_parameters": YARN | {"factor": None}}, "rope_parameters.factor", "None"),
    ("qwen3", {"rope_parameters": YARN | {"beta_fast": "32"}}, "rope_parameters.beta_fast", "'32'"),
    ("qwen3", {"rope_parameters": YARN | {"truncate": 1}}, "rope_parameters.truncate", "1"),
    ("qwen3", {"rope_parameters": YARN | {"long_factor": [1.0]}}, "rope_parameters.long_factor", "[1.0]"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "alpha": 1000.0}}, "rope_parameters.alpha", "1000.0"),
    ("llama", {"rope_parameters": LINEAR | {"type": "yarn"}}, "rope_parameters.type", "yarn"),
    ("llama", {"rope_parameters": LINEAR | {"type": "llama3"}}, "rope_parameters.type", "llama3"),
    ("llama", {"rope_parameters": LINEAR | {"rope_theta": 1e4}, "rope_theta": 5e5}, "rope_parameters.rope_theta", "50"),
    ("llama", {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": LINEAR | {"rope_theta": 1e4}},
     "rope_scaling.rope_theta", "10000.0"),
    ("llama", {"rope_scaling": LINEAR}, "rope_scaling", "linear"),  # where rope_parameters says default
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor", "None"),
    ("llama", {"rope_parameters": LINEAR | {"factor": "2"}}, "rope_parameters.factor", "'2'"),
    ("llama", {"rope_parameters": LINEAR | {"factor": 0}}, "rope_parameters.factor", "0"),
    ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": None}}, "rope_parameters.low_freq_factor", "None"),
    ("llama", {"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, "rope_parameters.high_freq_factor", "1.0"),
    ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 8e3}},
     "rope_parameters.original_max_position_embeddings", "8000.0"),
    ("llama", {"rope_parameters": LLAMA3 | {"attention_factor": 0.5}}, "rope_parameters.attention_factor", "0.5"),
    ("llama", {"rope_parameters": {"mrope_section": [4, 4, 4]}}, "rope_parameters.mrope_section", "[4, 4, 4]"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor", "0.5"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters.full_attention", "1"),
    ("llama", {"rope_parameters": "default"}, "rope_parameters", "'default'"),
    ("llama", {"rope_parameters": {"rope_theta": "big"}}, "rope_theta", "'big'"),
    ("llama", {"rope_parameters": None, "rope_theta": "big"}, "rope_theta", "'big'"),
    ("llama", {"rope_parameters": None, "rope_theta": float("inf")}, "rope_theta", "inf"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor", "0.5"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved", "True"),
    ("llama", {"original_max_position_embeddings": 256}, "original_max_position_embeddings", "256"),
    ("llama", {"mlp_bias": "yes"}, "mlp_bias", "'yes'"),
    ("mistral", {"mlp_bias": True}, "mlp_bias", "True"),
    ("qwen3", {"mlp_bias": True}, "mlp_bias", "True"),
    ("llama", {"attention_bias": "qkv"}, "attention_bias", "'qkv'"),
    ("llama", {"attention_bias": 1}, "attention_bias", "1"),
    ("mistral", {"attention_bias": True}, "attention_bias", "True"),
    ("qwen2", {"attention_bias": False}, "attention_bias", "False"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act", "'gelu'"),
    ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings", "'no'"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config", "bits"),
    ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder", "True"),
    ("llama", {"per_layer_config": {"0": {"mlp_bias": True}}}, "per_layer_config", "mlp_bias"),
    ("llama", {"embedding_multiplier": 12.0}, "embedding_multiplier", "12.0"),
    ("llama", {"logit_scale": 0}, "logit_scale", "0"),
    ("llama", {"pruned_heads": {"1": [0]}}, "pruned_heads", "{'1': [0]}"),
    ("llama", {"qk_norm": True}, "qk_norm", "True"),
    ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 262144}}, "dual_chunk_attention_config", "262144"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures", "LlamaForSequenceClassification"),
    ("mistral", {"architectures": ["LlamaForCausalLM"]}, "architectures", "LlamaForCausalLM"),
    ("qwen2", {"architectures": ["Qwen2Model"]}, "architectures", "Qwen2Model"),
    ("llama", {"model_type": "qwen2_moe"}, "model_type", "'qwen2_moe'"),
    ("llama", {"model_type": None}, "model_type", "None"),
    ("llama", {"model_type": ["llama"]}, "model_type", "['llama']"),
    # windows
    ("mistral", {"sliding_window": "wide"}, "sliding_window", "'wide'"),
    ("mistral", {"sliding_window": 0}, "sliding_window", "0"),
    ("mistral", {"use_sliding_window": False}, "use_sliding_window", "False"),
    ("mistral", {"max_window_layers": 3}, "max_window_layers", "3"),
    ("mistral", {"sliding_window": 100, "layer_types": ["full_attention"] * L}, "layer_types", "'full_attention'"),
    *(
        (kind, change, key, value)
        for kind in ("qwen2", "qwen3")
        for change, key, value in (
            (WINDOW | {"layer_types": None, "max_window_layers": 2}, "max_window_layers", "2"),
            (WINDOW | {"layer_types": None}, "max_window_layers", "28"),
            (WINDOW | {"layer_types": MIXED}, "layer_types", "'full_attention' for layer 0"),
            (WINDOW | {"layer_types": ["full_attention"] * L}, "layer_types", "'full_attention'"),
            ({"layer_types": ["sliding_attention"] * L}, "layer_types", "'sliding_attention'"),
            ({"layer_types": MIXED}, "layer_types", "'sliding_attention' for layer 2"),
            ({"layer_types": ["full_attention"] * 5 + ["chunked_attention"]}, "layer_types", "'chunked_attention'"),
            ({"layer_types": ["full_attention"] * 5}, "layer_types", "5 entries"),
            ({"layer_types": "full_attention"}, "layer_types", "'full_attention'"),
            ({"use_sliding_window": "yes"}, "use_sliding_window", "'yes'"),
        )
    ),
    # sizes
    *(("llama", {key: None}, key, "None") for key in (*SIZES, "num_attention_heads")),
    ("llama", {"hidden_size": 0}, "hidden_size", "0"),
    ("llama", {"hidden_size": "64"}, "hidden_size", "'64'"),
    ("llama", {"hidden_size": 66, "head_dim": None}, "hidden_size", "66"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads", "3"),
    ("llama", {"num_key_value_heads": -2}, "num_key_value_heads", "-2"),
    ("llama", {"num_key_value_heads": "2"}, "num_key_value_heads", "'2'"),
    ("llama", {"num_key_value_heads": True}, "num_key_value_heads", "True"),
    ("llama", {"head_dim": 5}, "head_dim", "5"),
    ("llama", {"head_dim": -2}, "head_dim", "-2"),
    ("llama", {"head_dim": "24"}, "head_dim", "'24'"),
    ("llama", {"rms_norm_eps": "small"}, "rms_norm_eps", "'small'"),
    ("llama", {"max_position_embeddings": "many"}, "max_position_embeddings", "'many'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changes", "key", "found"), REFUSED, ids=[f"{r[0]}-{r[2]}-{i}" for i, r in enumerate(REFUSED)]
)
def test_what_the_model_does_not_compute_is_refused_by_key_and_value(tmp_path, kind, changes, key, found):
    hf = written(tmp_path, kind)
    model_config(hf, "config.json")  # without the change it is accepted
    text = refusal({k: v for k, v in (hf | changes).items() if v is not None})
    assert key in text
    assert found in text.replace(key, "")


def test_a_null_head_dim_of_a_qwen3_is_refused_as_its_meaning_is_open(tmp_path):
    assert "head_dim must be a positive integer, found None" in refusal(written(tmp_path, "qwen3") | {"head_dim": None})


@pytest.mark.parametrize("key", ["use_sliding_window", "max_window_layers"])
def test_a_null_does_not_take_the_window_off_a_mistral(tmp_path, key):
    hf = written(tmp_path, "mistral", sliding_window=100) | {key: None}
    assert model_config(hf, "c").sliding_window == 100


def test_a_long_value_is_shown_in_part(tmp_path):
    text = refusal(written(tmp_path, "llama") | {"short_factor": [1.0] * 1000})
    assert "short_factor" in text
    assert len(text) < 200


@pytest.mark.parametrize(("key", "value"), [("attention_bias", "qv"), ("rope_scaling", "longrope")])
def test_a_run_that_expects_an_unknown_architecture_is_refused(key, value):
    with pytest.raises(UserError, match=f"config.model.{key} .* found '{value}'"):
        ModelConfig(**{key: value})


# ---- What is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype_keys", [["dtype"], ["torch_dtype"], ["dtype", "torch_dtype"]])
def test_growing_a_config_changes_the_depth_and_dtype_and_nothing_else(tmp_path, dtype_keys):
    hf = written(tmp_path, "llama") | {"num_hidden_layers": 6, "own_key": {"a": [1, None]}}
    hf.pop("dtype", None)
    hf |= dict.fromkeys(dtype_keys, "float32")
    before = json.dumps(hf)
    source = (0, 1, 2, 3, 2, 3, 4, 5, 5)
    grown = with_dtype(grown_hf_config(hf, source), "bfloat16")
    assert grown == hf | {"num_hidden_layers": 9} | dict.fromkeys(dtype_keys, "bfloat16")
    assert with_dtype(grown_hf_config(hf, source), None) == hf | {"num_hidden_layers": 9}
    assert json.dumps(hf) == before


def test_a_grown_config_without_a_dtype_gets_one_where_one_is_known(tmp_path):
    hf = written(tmp_path, "llama")
    hf.pop("dtype", None)
    assert with_dtype(grown_hf_config(hf, range(9)), "float16") == hf | {"num_hidden_layers": 9, "dtype": "float16"}
    assert grown_hf_config(hf, range(9)) == hf | {"num_hidden_layers": 9}


def test_a_list_with_an_entry_for_each_layer_goes_through_the_map():
    hf = {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"], "eos_token_id": [1, 2, 3]}
    grown = grown_hf_config(hf, (0, 1, 1, 2, 0))
    assert grown == hf | {"num_hidden_layers": 5, "layer_types": ["a", "b", "b", "c", "a"]}


def test_which_layers_rotate_goes_through_the_map_even_where_a_config_leaves_it_to_a_default():
    hf = {"model_type": "smollm3", "num_hidden_layers": 4}
    grown = grown_hf_config(hf, (0, 1, 2, 3, 2, 3))
    assert grown == hf | {"num_hidden_layers": 6, "no_rope_layers": [1, 1, 1, 0, 1, 0]}
    given = hf | {"no_rope_layers": [0, 1, 1, 1]}
    assert grown_hf_config(given, (0, 0, 3))["no_rope_layers"] == [0, 0, 1]


def test_a_family_s_own_name_of_the_depth_is_grown_and_read():
    hf = {"model_type": "exaone", "num_layers": 3, "layer_norm_epsilon": 1e-6, "activation_function": "silu"}
    hf |= {key: value for key, value in SIZES.items() if key != "num_hidden_layers"} | {"num_attention_heads": 8}
    grown = grown_hf_config(hf, (0, 1, 1, 2))
    assert grown == hf | {"num_layers": 4}
    assert model_config(grown, "c").num_hidden_layers == 4
    assert model_config(grown, "c").rms_norm_eps == 1e-6
    assert "num_layers=4 contradicts num_hidden_layers=3" in refusal(grown | {"num_hidden_layers": 3})


@pytest.mark.parametrize("window", [{}, WINDOW | {"max_window_layers": 0}, WINDOW | {"layer_types": [MIXED[-1]] * L}])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_a_grown_config_is_read_again_with_the_same_window(tmp_path, kind, window):
    hf = written(tmp_path, kind, **window)
    grown = with_dtype(grown_hf_config(hf, (*range(5), *range(1, 6))), "float32")
    expected = dataclasses.replace(model_config(hf, "c"), num_hidden_layers=10)
    assert model_config(grown, "c") == expected
    assert transformers.AutoConfig.for_model(**grown).layer_types == grown["layer_types"]

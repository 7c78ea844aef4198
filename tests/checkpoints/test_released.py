"""Folders as they are released: what is in one we write, next to the same model's own folder and to what loaders read.

The tables hold the files and config keys of models on the Hub, the sizes aside, and what vLLM and llama.cpp's converter
look for in a folder by their documentation. Neither is run here.
"""

import json
import pathlib

import pytest
import safetensors
import torch
import transformers

from solar_jax import upscale
from solar_jax.checkpoints.convert import Target
from solar_jax.checkpoints.hf_folder import INDEX
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.config import GrowthConfig
from tests.checkpoints.test_gguf import write_gguf
from tests.conftest import hf_model

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 32,
}  # fmt: skip
OLD = {
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.34.0", "use_cache": True,
}  # fmt: skip
LLAMA = OLD | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "pretraining_tp": 1, "rope_scaling": None}
MISTRAL = OLD | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
QWEN = OLD | {"attention_dropout": 0.0, "use_sliding_window": False, "rope_theta": 1e6, "rms_norm_eps": 1e-06}
TOKENIZER = ["tokenizer.json", "tokenizer_config.json"]
SENTENCEPIECE = [*TOKENIZER, "tokenizer.model", "special_tokens_map.json"]
BPE = [*TOKENIZER, "vocab.json", "merges.txt"]
BIN = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"]

# model -> (keys of its config.json apart from SIZES; files that belong to the grown model; files that do not)
RELEASED = {
    "Llama-2-7b-hf": (
        LLAMA | {
            "_name_or_path": "meta-llama/Llama-2-7b-hf", "max_position_embeddings": 4096, "torch_dtype": "float16",
        },
        ["generation_config.json", *SENTENCEPIECE, "LICENSE.txt", "USE_POLICY.md", "Responsible-Use-Guide.pdf"],
        ["README.md", ".gitattributes", *BIN],
    ),
    "Llama-3.1-8B-Instruct": (
        LLAMA | {
            "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": [1, 8, 9],
            "max_position_embeddings": 131072, "mlp_bias": False, "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
        },
        ["generation_config.json", *TOKENIZER, "special_tokens_map.json", "LICENSE", "USE_POLICY.md"],
        ["README.md", ".gitattributes", "original/consolidated.00.pth", "original/params.json",
         "original/tokenizer.model"],
    ),
    "Mistral-7B-v0.1": (
        MISTRAL | {"max_position_embeddings": 32768, "rope_theta": 10000.0, "sliding_window": 4096},
        ["generation_config.json", *SENTENCEPIECE],
        ["README.md", ".gitattributes", *BIN],
    ),
    "Mistral-7B-Instruct-v0.3": (
        MISTRAL | {
            "attention_dropout": 0.0, "max_position_embeddings": 32768, "rope_theta": 1e6, "sliding_window": None,
        },
        ["generation_config.json", *SENTENCEPIECE, "tokenizer.model.v3"],
        ["README.md", ".gitattributes", "consolidated.safetensors", "params.json"],
    ),
    "SOLAR-10.7B-v1.0": (
        LLAMA | {
            "attention_bias": False, "max_position_embeddings": 4096, "rope_theta": 10000.0, "torch_dtype": "float16",
            "use_cache": False,
        },
        ["generation_config.json", *SENTENCEPIECE],
        ["README.md", ".gitattributes"],
    ),
    "TinyLlama-1.1B-Chat-v1.0": (
        LLAMA | {"attention_bias": False, "max_position_embeddings": 2048, "rope_theta": 10000.0},
        ["generation_config.json", *SENTENCEPIECE],
        ["README.md", ".gitattributes", "eval_results.json"],
    ),
    "SmolLM2-135M-Instruct": (
        LLAMA | {
            "attention_bias": False, "attention_dropout": 0.0, "is_llama_config": True, "mlp_bias": False,
            "max_position_embeddings": 8192, "pad_token_id": 2, "rope_interleaved": False, "rope_theta": 100000,
            "tie_word_embeddings": True, "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
        },
        ["generation_config.json", *BPE, "special_tokens_map.json"],
        ["README.md", ".gitattributes", "all_results.json", "eval_results.json", "train_results.json",
         "trainer_state.json", "training_args.bin", "onnx/model.onnx", "runs/May01/events.out.tfevents"],
    ),
    "Yi-6B": (
        LLAMA | {"max_position_embeddings": 4096, "pad_token_id": 0, "rope_theta": 5000000.0},
        ["generation_config.json", *TOKENIZER, "tokenizer.model", "LICENSE"],
        ["README.md", ".gitattributes", *BIN],
    ),
    "Qwen2.5-7B-Instruct": (
        QWEN | {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "max_position_embeddings": 32768,
            "max_window_layers": 28, "sliding_window": 131072,
        },
        ["generation_config.json", *BPE, "LICENSE"],
        ["README.md", ".gitattributes"],
    ),
    "Qwen3-8B": (
        QWEN | {
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 8,
            "max_position_embeddings": 40960, "max_window_layers": 36, "rope_scaling": None, "sliding_window": None,
        },
        ["generation_config.json", *BPE, "LICENSE"],
        ["README.md", ".gitattributes"],
    ),
    "saved by transformers 5": (
        {k: v for k, v in QWEN.items() if k not in ("torch_dtype", "rope_theta")} | {
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 8,
            "dtype": "bfloat16", "layer_types": ["full_attention"] * 3, "max_position_embeddings": 40960,
            "max_window_layers": 28, "sliding_window": None,
            "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        },
        ["generation_config.json", *TOKENIZER, "chat_template.jinja", "added_tokens.json",
         "additional_chat_templates/tool_use.jinja", "LICENSE"],
        ["README.md", ".gitattributes"],
    ),
}  # fmt: skip

# What loaders read of a folder: any one of the names on each line, of files and of config keys.
FILES_READ = {
    "vLLM": ["config.json", f"{INDEX} model.safetensors", "tokenizer.json tokenizer.model", "tokenizer_config.json"],
    "llama.cpp": [
        "config.json", f"{INDEX} model.safetensors", "tokenizer.json tokenizer.model", "tokenizer_config.json",
    ],
}  # fmt: skip
KEYS_READ = {
    "vLLM": [
        "architectures", "model_type", "torch_dtype dtype", "vocab_size", "hidden_size", "intermediate_size",
        "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act", "rms_norm_eps",
        "max_position_embeddings", "tie_word_embeddings", "eos_token_id",
    ],
    "llama.cpp": [
        "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "max_position_embeddings",
    ],
}  # fmt: skip


def released(name: str, folder: pathlib.Path) -> dict:
    """A small model in a folder like the released one, in several shards; returns its config."""
    changes, belongs, stays = RELEASED[name]
    config = SIZES | changes
    torch.manual_seed(0)
    of_class = transformers.AutoConfig.for_model(**{k: v for k, v in config.items() if k != "architectures"})
    model = transformers.AutoModelForCausalLM.from_config(of_class, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4KB")
    for file in [*belongs, *stays]:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(f"{file} of {name}, \xff".encode("latin-1"))
    (folder / "config.json").write_text(json.dumps(config))
    return config


def grow(source: pathlib.Path, out: pathlib.Path, **kwargs) -> None:
    upscale.upscale(str(source), GrowthConfig("dus", m=1), Target(out, **kwargs))


def files(folder: pathlib.Path) -> set[str]:
    return {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}


def assert_loaders_find_what_they_read(folder: pathlib.Path) -> None:
    config, there = json.loads((folder / "config.json").read_text()), files(folder)
    for loader in FILES_READ:
        for names in FILES_READ[loader]:
            assert there.intersection(names.split()), (loader, names)
        for keys in KEYS_READ[loader]:
            assert config.keys() & set(keys.split()), (loader, keys)
    # Both take every model*.safetensors, say which tensors the index misses, and open files through `safetensors`.
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    shards = {name for name in there if name.endswith(".safetensors")}
    assert shards == set(weight_map.values())
    held = {}
    for name in shards:
        assert name.startswith("model-")
        with safetensors.safe_open(folder / name, "pt") as f:
            assert f.metadata() == {"format": "pt"}
            held |= dict.fromkeys(f.keys(), name)
    assert held == weight_map


@pytest.mark.parametrize("name", RELEASED)
def test_a_grown_folder_has_the_files_and_keys_of_the_released_one(tmp_path, name):
    source, out = tmp_path / "source", tmp_path / "out"
    config = released(name, source)
    grow(source, out, max_shard_size="4KB")
    belongs = RELEASED[name][1]
    shards = {f for f in files(out) if f.startswith("model-")}
    cards = {"README.md", *(["README.base.md"] if (source / "README.md").exists() else [])}
    assert files(out) == {"config.json", INDEX, "lineage.json", *shards, *belongs, *cards}
    for file in belongs:
        assert (out / file).read_bytes() == (source / file).read_bytes()
    grown = json.loads((out / "config.json").read_text())
    assert list(grown) == list(config)
    changed = {key for key in config if grown[key] != config[key]}
    assert changed - {"torch_dtype"} == {"num_hidden_layers", *(["layer_types"] if "layer_types" in config else [])}
    assert grown.get("torch_dtype", grown.get("dtype")) == "bfloat16"  # as the weights above are
    assert_loaders_find_what_they_read(out)


def test_transformers_opens_it_by_its_index(tmp_path):
    released("Mistral-7B-Instruct-v0.3", tmp_path / "source")
    grow(tmp_path / "source", tmp_path / "out", max_shard_size="4KB")
    for name in ("generation_config.json", "tokenizer_config.json"):  # which held no JSON
        (tmp_path / "out" / name).write_text("{}")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert len(model.model.layers) == 4


def test_mistral_s_own_copy_of_the_weights_is_not_taken_for_a_second_file_of_ours(tmp_path):
    source = tmp_path / "source"
    hf_model("mistral", num_hidden_layers=2).save_pretrained(source)
    (source / "consolidated.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    assert open_checkpoint(str(source)).cfg.num_hidden_layers == 2


def test_what_is_made_of_a_gguf_file_has_what_loaders_read(tmp_path):
    state = {name: x.float().numpy() for name, x in hf_model(num_hidden_layers=3, vocab_size=261).state_dict().items()}
    write_gguf(tmp_path / "m.gguf", state, llama__block_count=3, llama__vocab_size=261)
    grow(tmp_path / "m.gguf", tmp_path / "out", max_shard_size="100KB")
    assert_loaders_find_what_they_read(tmp_path / "out")

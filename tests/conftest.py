"""Shared by tests: eight CPU devices, small models of real architecture, and the embedded real one."""

import os
import tempfile

os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"  # transformers must not look for models elsewhere
# The same few programs again and again, in all workers and in the commands that tests start: compile each once.
os.environ["JAX_COMPILATION_CACHE_DIR"] = (
    os.environ["JAX_COMPILATION_CACHE_DIR"]
    if "PYTEST_XDIST_WORKER" in os.environ
    else tempfile.mkdtemp(prefix="solar_jax_compiled_")
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
# Nor is every package's source compiled again in each of hundreds of processes, whatever the machine is set to.
os.environ["PYTHONPYCACHEPREFIX"] = os.path.join(os.environ["JAX_COMPILATION_CACHE_DIR"], "bytecode")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import gc
import json
import pathlib
import shutil
import socket

import jax
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers

from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.config import Config, TrainConfig
from solar_jax.errors import UserError
from solar_jax.model.precision import precision
from solar_jax.training.optimizer import make_optimizer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no worker is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_unconfigure() -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def _few_programs():
    """Forgets compiled programs before a process has as many memory mappings as Linux allows (65,530).

    Each program has about twenty, and a compilation that gets none ends the process with a segmentation fault.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


TINY = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,  # apart from hidden / heads
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,  # logits of a few units, which a wrong layout changes visibly
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def hf_model(kind: str = "llama", seed: int = 0, **changes) -> transformers.PreTrainedModel:
    """A randomly initialised transformers model, float32, eager attention."""
    torch.manual_seed(seed)
    keys = TINY | {"attn_implementation": "eager"} | changes
    rope_theta = keys.pop("rope_theta", 10000.0)
    keys["rope_parameters"] = {"rope_type": "default", "rope_theta": rope_theta}
    config = transformers.AutoConfig.for_model(kind, **keys)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():  # norms start at one, where a swapped or forgotten one would not show
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(0.3 * torch.randn_like(p))
    return model


def moved(model: transformers.PreTrainedModel, seed: int, by: float = 1e-3) -> transformers.PreTrainedModel:
    """The model with noise added: near its start, as after fine-tuning."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by * torch.randn_like(p))
    return model


def byte_tokenizer() -> tokenizers.Tokenizer:
    """256 bytes and three special tokens; every text encodes to as many tokens as it has bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def save_hf(model: transformers.PreTrainedModel, folder: pathlib.Path, **kwargs) -> pathlib.Path:
    """The model and a byte tokenizer as a Hugging Face folder."""
    model.save_pretrained(folder, **kwargs)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def step_args(config: Config) -> tuple[TrainConfig, int]:
    """The part of a run's config that a step, its memory and its time take."""
    return config.train, config.data.sequence_length


def weights_of(config: Config) -> str:
    """The dtype of a run's matrices."""
    return precision(config.train).weights


def optimizer_of(config: Config, mesh=None):
    """The optimiser of a run's config."""
    policy = precision(config.train)
    return make_optimizer(config.optimizer, config.train.steps, policy, seed=config.seed, mesh=mesh)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> pathlib.Path:
    """A tiny untied Llama as an HF folder."""
    return save_hf(hf_model(), tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def smollm2() -> Checkpoint:
    """SmolLM2-135M-Instruct, the real model that a package carries."""
    return open_checkpoint("smollm2")


def refusal(source) -> str:
    """The one line that opening `source` ends with, without its name."""
    with pytest.raises(UserError) as e:
        open_checkpoint(str(source))
    text = str(e.value)
    assert text.startswith(str(source))
    assert len(text.splitlines()) == 1
    return text.removeprefix(str(source))


def free_port() -> int:
    """A free port of the loopback interface, for a coordinator."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def save_model_and_text(folder: pathlib.Path, words: int) -> pathlib.Path:
    """All that a small run needs: a model of four layers in `model`, and text in `corpus.txt`."""
    save_hf(hf_model(num_hidden_layers=4), folder / "model")
    rng = np.random.default_rng(0)
    (folder / "corpus.txt").write_text(" ".join(rng.choice(["depth", "up", "scaling", "grows", "a", "model"], words)))
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> pathlib.Path:
    """A small text with something to learn in it."""
    file = tmp_path_factory.mktemp("text") / "corpus.txt"
    file.write_text(" ".join(np.random.default_rng(0).choice(["depth", "up", "scaling", "grows", "a"], 3000)))
    return file


@pytest.fixture(scope="module")
def emulated():
    """A new bucket's URL, and what its emulator does wrong."""
    from tests.bucket import serving

    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def bucket(emulated) -> str:
    """A new bucket's URL."""
    return emulated[0]

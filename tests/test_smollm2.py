"""The real model, SmolLM2-135M, through every stage, with transformers as the oracle. All of it is slow."""

import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from solar_jax.checkpoints.convert import Target
from solar_jax.checkpoints.load import load_params
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.tokenizer import eos_id, load_tokenizer
from solar_jax.config import DataConfig, GrowthConfig, MeshConfig
from solar_jax.convert import convert
from solar_jax.data.corpus import heldout_rows, load_corpus
from solar_jax.growth.operators import make_layer_map
from solar_jax.model import llama
from solar_jax.parallel.mesh import make_mesh
from solar_jax.searching.cache import make_scorer
from solar_jax.searching.candidates import Repeat, slices_text, source_layers
from solar_jax.training.objectives import next_token_loss
from solar_jax.upscale import upscale

pytestmark = pytest.mark.slow

REPO = pathlib.Path(__file__).parents[1]
WINDOWS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> pathlib.Path:
    """The embedded GGUF file as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("base") / "hf"
    convert("smollm2", Target(folder))
    return folder


@pytest.fixture(scope="module")
def rows(smollm2) -> list[dict[str, np.ndarray]]:
    """The demo's first held-out rows of 256 tokens."""
    cfg = DataConfig(sequence_length=256, holdout="position", packing="concat", mask_documents=False)
    corpus = load_corpus(cfg, load_tokenizer(smollm2), eos_id(smollm2))
    return heldout_rows(corpus, WINDOWS)


def load(folder: pathlib.Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def torch_loss(model: transformers.PreTrainedModel, rows: list[dict[str, np.ndarray]]) -> float:
    """Mean cross-entropy of the rows' targets."""
    tokens, targets = (torch.tensor(np.stack([r[k] for r in rows])).long() for k in ("tokens", "targets"))
    with torch.no_grad():
        logits = model(tokens).logits
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))


def our_loss(folder: pathlib.Path, rows: list[dict[str, np.ndarray]]) -> float:
    """The same by our model, read back from the folder."""
    checkpoint = open_checkpoint(str(folder))
    tokens, targets = (jnp.array(np.stack([r[k] for r in rows])) for k in ("tokens", "targets"))
    logits = llama.logits(checkpoint.cfg, load_params(checkpoint), tokens)
    loss, count = next_token_loss(logits, targets, jnp.ones(targets.shape))
    return float(loss / count)


def test_the_exported_base_is_bitwise_what_transformers_dequantises(smollm2, base):
    file = pathlib.Path(smollm2.where)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).state_dict()
    ours = safetensors.numpy.load_file(base / "model.safetensors")
    assert set(theirs) - set(ours) <= {"lm_head.weight"}  # tied
    for name, x in ours.items():
        assert np.array_equal(x, theirs[name].numpy()), name


@pytest.mark.parametrize(
    "growth",
    [
        GrowthConfig("identity"),
        GrowthConfig("dus", m=6),
        GrowthConfig("naive"),
        GrowthConfig("llama_pro", every=5),
    ],
    ids=lambda g: g.operator,
)
def test_zero_token_losses_are_those_of_transformers(base, rows, tmp_path, growth):
    upscale(str(base), growth, Target(tmp_path / "grown"))
    model = load(tmp_path / "grown")
    assert model.config.num_hidden_layers == make_layer_map(30, growth).layers
    ours = our_loss(tmp_path / "grown", rows)
    assert ours == pytest.approx(torch_loss(model, rows), abs=1e-4)
    if growth.operator == "llama_pro":
        assert ours == pytest.approx(torch_loss(load(base), rows), abs=1e-4)


def test_cached_losses_of_cuts_are_those_of_the_whole_deeper_model(base, rows, tmp_path):
    """Cached and full losses agree, also for the block that the search's page compares with dus."""
    scorer = make_scorer(
        open_checkpoint(str(base)), make_mesh(MeshConfig()), dtype="float32", rows=WINDOWS, length=256, add=18
    )
    cuts = [(), (Repeat(2, 20),)]
    cached = scorer.losses(rows, cuts).mean(axis=(1, 2))
    upscale(str(base), GrowthConfig("slices", slices=slices_text(source_layers(cuts[1], 30))), Target(tmp_path / "cut"))
    for loss, folder in zip(cached, (base, tmp_path / "cut"), strict=True):
        assert loss == pytest.approx(our_loss(folder, rows), abs=1e-5)


def test_the_readmes_command_heals_the_model_and_transformers_agrees_with_the_result(tmp_path, rows):
    """The main command, with fewer steps and windows."""
    folder = tmp_path / "run"
    short = {"train.steps": 3, "optimizer.warmup_steps": 1, "evaluation.windows": WINDOWS, "train.control": "false"}
    done = subprocess.run(
        [sys.executable, "-m", "solar_jax.train", "--config=configs/dus_48l.py:smollm2", f"--workdir={folder}"]
        + [f"--config.{key}={value}" for key, value in short.items()],
        cwd=REPO,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for promised in ("30 -> 48 layers", "seam 23|24", "chosen    fsdp 2, remat matmuls", "GiB", "left"):
        assert promised in done.stdout
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["layers"] == 48
    assert summary["params"] == 198_236_736
    assert summary["source_layers"] == [*range(24), *range(6, 30)]
    assert summary["base_loss"] < summary["final_loss"] < summary["zero_token_loss"]
    # The run's own evaluation of the model that it wrote, against transformers' on what it reads.
    assert summary["final_loss"] == pytest.approx(torch_loss(load(folder / "hf"), rows), abs=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    assert tokenizer("In 2024, x = 10")["input_ids"] == load_tokenizer_ids(folder, "In 2024, x = 10")
    assert transformers.GenerationConfig.from_pretrained(folder / "hf").eos_token_id == 2


def load_tokenizer_ids(folder: pathlib.Path, text: str) -> list[int]:
    return load_tokenizer(open_checkpoint(str(folder))).encode(text, add_special_tokens=False).ids

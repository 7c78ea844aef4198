"""Trains a small model from scratch: grown in the middle, next to its small and its target depth at equal FLOPs.

    uv run --extra demo python scripts/bench/scratch_growth.py --out DIR [--seeds 5] [--steps 150]

A Llama of about 2 M parameters with a tokenizer of 2,048 entries, both made here, on the sources of Python's standard
library. `--steps` are those of the target depth; the other arms take as many as cost the same FLOPs. Arms of one seed
share weights at the start and the order of the data. Arms that are complete are not run again.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
from typing import Any

import jax
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from solar_jax import train
from solar_jax.checkpoints.checkpoint import from_params
from solar_jax.checkpoints.convert import Target, convert_checkpoint
from solar_jax.config import Config, ModelConfig, defaults, resolve
from solar_jax.data.embedded import stdlib
from solar_jax.model.flops import flops_per_token
from solar_jax.model.shapes import param_shapes, parameter_count

VOCABULARY, LENGTH, BATCH, SMALL, TARGET = 2048, 128, 16, 4, 8
RATE = 3e-3
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # Student's t by seeds
GROWN = {"grown, stacked": {"operator": "naive"}, "grown, interleaved": {"operator": "interleave"}}


def make_donor(folder: pathlib.Path) -> None:
    """Writes a checkpoint that carries the tokenizer; its weights are not used."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator((text for _, text in list(stdlib())[::4]), trainer)
    cfg = ModelConfig(VOCABULARY, 16, 16, 1, 2, 2, 8, 2048, 1e4, 1e-5, True)
    hf_config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 16,
        "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "head_dim": 8, "max_position_embeddings": 2048, "rope_theta": 1e4, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True, "eos_token_id": 0, "bos_token_id": 0, "hidden_act": "silu",
    }  # fmt: skip
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    companions = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(names).encode(),
    }
    params = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), param_shapes(cfg))
    convert_checkpoint(from_params(params, cfg, hf_config, companions), Target(folder), "convert")


def arm_config(donor: pathlib.Path, layers: int, steps: int, seed: int, growth: dict[str, Any]) -> Config:
    """The run of an arm."""
    config = defaults()
    config.name, config.source, config.seed = "scratch_growth", f"scratch:{donor}", seed
    shape = {
        "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 32, "num_hidden_layers": layers, "tie_word_embeddings": True,
    }  # fmt: skip
    config.model.update(shape)
    config.growth.update({"operator": "identity"} | growth)
    config.data.sources, config.data.sequence_length = ("python-stdlib?limit=3000000",), LENGTH
    config.data.packing, config.data.mask_documents = "concat", False
    config.data.holdout_every = 16
    config.train.steps, config.train.batch_size, config.train.precision = steps, BATCH, "float32"
    config.train.remat = "none"
    config.optimizer.learning_rate, config.optimizer.schedule = RATE, "cosine"
    config.optimizer.warmup_fraction = 0.1
    config.evaluation.windows, config.evaluation.batch_size = 256, 32
    config.evaluation.every = max(1, steps // 5)
    config.checkpoint.every, config.checkpoint.keep, config.export.dtype = 10_000, 1, "float32"
    return resolve(config)


def flops(layers: int, donor: pathlib.Path) -> float:
    """Training FLOPs of a token at a depth."""
    shape = dataclasses.replace(arm_config(donor, layers, 1, 0, {}).model, vocab_size=VOCABULARY)
    return flops_per_token(shape.architecture, LENGTH)


def arms(donor: pathlib.Path, steps: int) -> dict[str, tuple[int, int, dict[str, Any]]]:
    """Arm -> (layers at the start, steps, growth), all of the same FLOPs."""
    small, target = flops(SMALL, donor), flops(TARGET, donor)
    whole = steps * target
    before = round(whole / 2 / small)
    found: dict[str, tuple[int, int, dict[str, Any]]] = {
        f"{SMALL} layers": (SMALL, round(whole / small), {}),
        f"{TARGET} layers": (TARGET, steps, {}),
    }
    for name, growth in GROWN.items():
        found[name] = (SMALL, before + round(whole / 2 / target), growth | {"at_step": before, "rewarm_steps": 10})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    args = parser.parse_args()
    donor = args.out / "tokenizer"
    if not donor.exists():
        args.out.mkdir(parents=True, exist_ok=True)
        make_donor(donor)
    losses: dict[str, list[float]] = {}
    plan = arms(donor, args.steps)
    for seed in range(args.seeds):
        for name, (layers, steps, growth) in plan.items():
            config = arm_config(donor, layers, steps, seed, growth)
            folder = args.out / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"
            losses.setdefault(name, []).append(train.run(config, folder)["final_loss"])
    shape = dataclasses.replace(arm_config(donor, TARGET, 1, 0, {}).model, vocab_size=VOCABULARY).architecture
    print(f"\n{parameter_count(shape):,} parameters at {TARGET} layers; {args.seeds} seeds; peak rate {RATE}")
    print(f"| arm | steps | tokens | held-out loss | minus {TARGET} layers, 95 % |\n|---|---|---|---|---|")
    for name, values in losses.items():
        gaps = [a - b for a, b in zip(values, losses[f"{TARGET} layers"], strict=True)]
        steps = plan[name][1]
        error = T_95[len(gaps)] * statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) in T_95 else float("nan")
        print(
            f"| {name} | {steps} | {steps * BATCH * LENGTH:,} | {statistics.mean(values):.4f} | "
            f"{statistics.mean(gaps):+.4f} +- {error:.4f} |"
        )
    (args.out / "losses.json").write_text(json.dumps(losses))
    sys.stdout.flush()


if __name__ == "__main__":
    main()

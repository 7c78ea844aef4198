"""Compares every precision policy and every optimiser on the SmolLM2 run with float32 and AdamW.

    uv run --extra demo python scripts/bench/precision.py [--steps 12] [--slices 0:30] [--length 256] [--seeds 3]

Each option trains the recipe `configs/dus_48l.py:smollm2` from the same weights on the same batches, without the
control. It prints the loss of the last batch, the final held-out loss in float32, its difference from the first line's,
state bytes per parameter, and seconds per step on this machine (which say nothing about a TPU). With several seeds,
which order the rows, it prints means, and the standard deviation of the difference. 8-bit operands are multiplied in
float32, which is exact for sums below 2^24 and many times as fast on a CPU.
"""

import argparse
import dataclasses
import importlib.util
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.checkpoints.load import load_params
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.tokenizer import eos_id, load_tokenizer
from solar_jax.checkpoints.views import grown
from solar_jax.config import Config, resolve
from solar_jax.data.corpus import heldout_rows, load_corpus
from solar_jax.data.pipeline import Batch, heldout_batches, training_batch, training_rows
from solar_jax.growth.apply import grown_config
from solar_jax.growth.operators import LayerMap, make_layer_map
from solar_jax.model import quantised
from solar_jax.model.precision import PRECISIONS, precision
from solar_jax.model.shapes import parameter_count
from solar_jax.parallel import rules
from solar_jax.parallel.mesh import make_mesh
from solar_jax.training.optimizer import DIRECTIONS, make_optimizer
from solar_jax.training.state import abstract_state, state_shardings
from solar_jax.training.step import make_eval_step, make_train_step, mean_loss

RECIPE = pathlib.Path(__file__).parents[2] / "configs" / "dus_48l.py"
RATES = {"lion": 0.3}  # fraction of AdamW's rate: a sign update takes larger steps

# what is printed -> (config.train.precision, config.optimizer.name)
OPTIONS = {
    "float32, adamw": ("float32", "adamw"),
    **{f"{name}, adamw": (name, "adamw") for name in PRECISIONS if name != "float32"},
    **{f"float32, {name}": ("float32", name) for name in DIRECTIONS if name != "adamw"},
}


def multiply(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Stands for `quantised._multiply`."""
    return jnp.einsum(subscripts, x.astype(jnp.float32), y.astype(jnp.float32))


def recipe(steps: int, slices: str, length: int) -> Config:
    spec = importlib.util.spec_from_file_location("recipe", RECIPE)
    assert spec
    assert spec.loader
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("smollm2")
    config.train.steps = steps
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, steps)
    config.data.sequence_length = length
    if slices:
        config.growth.operator, config.growth.slices = "slices", slices
    return resolve(config)


def trained(
    base: Checkpoint, layer_map: LayerMap, config: Config, batches: list[Batch], heldout: list[Batch]
) -> tuple[float, float, float, float]:
    """Returns the last batch's loss, the final held-out loss, state bytes per parameter and median step seconds."""
    cfg, mesh = grown_config(base.cfg, layer_map), make_mesh(config.mesh)
    optimizer = make_optimizer(
        config.optimizer, config.train.steps, precision(config.train), seed=config.seed, mesh=mesh
    )
    abstract = abstract_state(cfg, precision(config.train).weights, optimizer, state_shardings(cfg, optimizer, mesh))
    rest = jax.tree.map(lambda s: s.sharding, abstract)
    params = load_params(grown(base, layer_map), rest["params"], jax.tree.map(lambda s: s.dtype, abstract["params"]))
    state = {"params": params, "opt_state": jax.jit(optimizer.init, out_shardings=rest["opt_state"])(params)}
    del params
    step = (
        make_train_step(cfg, config.train, config.data.sequence_length, optimizer, mesh)
        .lower(state, batches[0])
        .compile()
    )
    loss, seconds = float("nan"), []
    for batch in batches:
        begin = time.perf_counter()
        state, measured = step(state, batch)
        loss = float(measured["loss"])
        seconds.append(time.perf_counter() - begin)
    size = sum(x.nbytes for x in jax.tree.leaves(state)) / parameter_count(cfg)
    exact = dataclasses.replace(config, train=dataclasses.replace(config.train, precision="float32"))
    return (
        loss,
        mean_loss(make_eval_step(cfg, exact.train, exact.data.sequence_length, mesh), state["params"], heldout),
        size,
        float(np.median(seconds)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument(
        "--slices", default="", help="layers, as config.growth.slices; the recipe's growth if not given"
    )
    parser.add_argument("--length", type=int, default=256, help="tokens a row")
    parser.add_argument("--windows", type=int, default=40, help="held-out rows")
    parser.add_argument("--only", action="append", choices=OPTIONS, help="these options, the first as the measure")
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    quantised._multiply = multiply
    config = recipe(args.steps, args.slices, args.length)
    base = open_checkpoint(config.source)
    layer_map = make_layer_map(base.cfg.num_hidden_layers, config.growth)
    corpus = load_corpus(config.data, load_tokenizer(base), eos_id(base))
    mesh = make_mesh(config.mesh)
    sharding, size = rules.batch_sharding(mesh), config.train.batch_size
    padded, batches = rules.padded_rows(size, mesh), []
    for seed in range(args.seeds):
        rows = training_rows(corpus, config.seed + seed)
        batches.append([training_batch(rows, i * size, size, padded, sharding) for i in range(args.steps)])
    heldout = heldout_batches(
        heldout_rows(corpus, args.windows), rules.padded_rows(config.evaluation.batch_size, mesh), sharding
    )
    cfg = grown_config(base.cfg, layer_map)
    untrained = mean_loss(
        make_eval_step(cfg, config.train, config.data.sequence_length, mesh),
        load_params(grown(base, layer_map), rules.parameter_shardings(cfg, mesh)),
        heldout,
    )
    print(
        f"SmolLM2, {layer_map.operator}, {layer_map.layers} layers, {args.steps} steps of {size} x {args.length} "
        f"tokens; held-out loss before training {untrained:.4f}\n"
        f"{'option':<22}{'last batch':>11}{'held out':>10}{'difference':>12}{'deviation':>11}{'bytes':>7}{'s/step':>8}",
        flush=True,
    )
    first = None
    for option in args.only or OPTIONS:
        policy, name = OPTIONS[option]
        optimizer = dataclasses.replace(
            config.optimizer, name=name, learning_rate=config.optimizer.learning_rate * RATES.get(name, 1.0)
        )
        train = dataclasses.replace(config.train, precision=policy)
        run = dataclasses.replace(config, optimizer=optimizer, train=train)
        found = np.array([trained(base, layer_map, run, of_seed, heldout) for of_seed in batches])
        first = found[:, 1] if first is None else first
        difference = found[:, 1] - first
        loss, after, width, seconds = found.mean(axis=0)
        spread = f"{difference.std(ddof=1):>11.4f}" if args.seeds > 1 else f"{'':>11}"
        each = " ".join(f"{d:+.4f}" for d in difference) if args.seeds > 1 else ""
        print(
            f"{option:<22}{loss:>11.4f}{after:>10.4f}{difference.mean():>+12.4f}{spread}{width:>7.1f}{seconds:>8.1f}  "
            f"{each}",
            flush=True,
        )


if __name__ == "__main__":
    main()

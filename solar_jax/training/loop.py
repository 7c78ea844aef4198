"""One arm of a run: a model initialised, trained step by step, evaluated, checkpointed, and resumable."""

import dataclasses
import pathlib
import time
from typing import Any

import grain
import jax
import jax.numpy as jnp

from solar_jax.config import Config, ModelConfig
from solar_jax.data.pipeline import Batch, training_batch
from solar_jax.growth.apply import grown_config
from solar_jax.growth.plan import GrowthPlan
from solar_jax.hf.reader import Checkpoint, load_params
from solar_jax.model import llama
from solar_jax.model.llama import Params
from solar_jax.parallel import chips, rules
from solar_jax.training import metrics
from solar_jax.training.checkpoint import CheckpointStore
from solar_jax.training.optimizer import learning_rate, make_optimizer, trainable_layers, trainable_mask
from solar_jax.training.step import abstract_state, make_eval_step, make_train_step, mean_loss, state_shardings


@dataclasses.dataclass(frozen=True)
class Run:
    """What all arms of a run share."""

    config: Config
    workdir: pathlib.Path
    checkpoint: Checkpoint  # the base
    mesh: jax.sharding.Mesh
    rows: grain.MapDataset  # training
    heldout: list[Batch]
    evals: metrics.JsonLines  # {"arm", "step", "loss"} of every held-out evaluation


@dataclasses.dataclass(frozen=True)
class Arm:
    """A model and where its training is recorded."""

    name: str
    plan: GrowthPlan
    folder: pathlib.Path
    trainable: str

    def cfg(self, base: ModelConfig) -> ModelConfig:
        return grown_config(base, self.plan)


def say(text: str = "") -> None:
    """Prints on the first process."""
    if jax.process_index() == 0:
        print(text, flush=True)


def initial_params(run: Run, plan: GrowthPlan) -> Params:
    """The base's weights, grown by the plan while they are read, each device's shard on its own."""
    cfg = grown_config(run.checkpoint.cfg, plan)
    return load_params(run.checkpoint, rules.parameter_shardings(cfg, run.mesh), plan=plan)


def evaluate(run: Run, arm: str, step: int, cfg: ModelConfig, params: Params) -> float:
    """Held-out loss, recorded once; a resumed run reads it instead of computing it again."""
    for record in run.evals.read():
        if record["arm"] == arm and record["step"] == step:
            return record["loss"]
    loss = mean_loss(make_eval_step(cfg, run.config, run.mesh), params, run.heldout)
    run.evals.append({"arm": arm, "step": step, "loss": loss})
    return loss


def arm_mask(run: Run, arm: Arm) -> Params | None:
    """Where an arm's parameters move; None: everywhere."""
    if arm.trainable == "all":
        return None
    layers, others = trainable_layers(arm.trainable, arm.plan)
    return trainable_mask(llama.shapes(arm.cfg(run.checkpoint.cfg)), layers, others)


def train(run: Run, arm: Arm) -> Params:
    """Trains an arm from where its last checkpoint left it, or from the base, to the last step.

    Returns:
      The trained parameters.
    """
    config, cfg = run.config, arm.cfg(run.checkpoint.cfg)
    optimizer = make_optimizer(config.optimizer, config.train.steps, arm_mask(run, arm))
    shardings = state_shardings(cfg, optimizer, run.mesh)
    lines = metrics.JsonLines(arm.folder / "metrics.jsonl")
    with CheckpointStore(arm.folder, config.checkpoint.keep) as store:
        done = store.latest_step or 0
        lines.keep_if(lambda r: r["step"] <= done)
        run.evals.keep_if(lambda r: r["arm"] != arm.name or r["step"] <= done)
        if done:
            abstract = abstract_state(cfg, optimizer, shardings)
            if done == config.train.steps:
                return store.restore_params(done, abstract["params"])
            params, opt_state, _ = store.restore(done, abstract["params"], abstract["opt_state"])
            say(f"{arm.name}: going on from the checkpoint of step {done}")
        else:
            params = initial_params(run, arm.plan)
            loss = evaluate(run, arm.name, 0, cfg, params)
            say(f"{arm.name}: held-out loss {loss:.4f} before training")
            opt_state = jax.jit(optimizer.init, out_shardings=shardings["opt_state"])(params)
        state = {"params": params, "opt_state": opt_state}
        del params, opt_state  # the step takes their memory
        return _steps(run, arm, cfg, optimizer, state, done, store, lines)


def _steps(
    run: Run, arm: Arm, cfg: ModelConfig, optimizer: Any, state: Any, done: int, store: CheckpointStore,
    lines: metrics.JsonLines,
) -> Params:  # fmt: skip
    """The loop: batch, step, one line; held-out loss and checkpoint when due."""
    config, steps = run.config, run.config.train.steps
    batch_sharding = rules.batch_sharding(run.mesh)
    rate = learning_rate(config.optimizer, steps)
    tokens_a_step = config.train.batch_size * config.data.sequence_length
    flops = metrics.flops_per_token(cfg, config.data.sequence_length)
    peak, devices = chips.peak_flops(jax.devices()[0]), jax.device_count()

    step_fn = make_train_step(cfg, config, optimizer, run.mesh, arm_mask(run, arm))
    begin = time.perf_counter()
    size = config.train.batch_size
    padded = rules.padded_rows(size, run.mesh, config.train.accumulation)
    batch = training_batch(run.rows, done, size, padded, batch_sharding)
    compiled = step_fn.lower(state, batch).compile(chips.compiler_options(jax.devices()[0]) or None)
    m = compiled.memory_analysis()
    if m is not None:
        say(
            f"{arm.name}: step compiled in {time.perf_counter() - begin:.0f} s; by the compiler it takes "
            f"{(m.argument_size_in_bytes + m.temp_size_in_bytes) / 2**30:.1f} GiB a device"
        )
    clock = metrics.Clock(steps - done)
    for step in range(done + 1, steps + 1):
        clock.start()
        batch = training_batch(run.rows, step - 1, size, padded, batch_sharding)
        state, measured = compiled(state, batch)
        loss, grad_norm = float(measured["loss"]), float(measured["grad_norm"])
        seconds = clock.stop()
        record = {
            "step": step,
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": float(jnp.asarray(rate(step - 1))),
            "tokens": step * tokens_a_step,
            "tokens_per_second": tokens_a_step / seconds,
            "mfu": metrics.mfu(tokens_a_step / seconds, flops, peak, devices),
        }
        lines.append(record)
        say(_line(arm.name, steps, record, clock))
        if step == steps or (config.evaluation.every and step % config.evaluation.every == 0):
            say(
                f"{arm.name}: held-out loss {evaluate(run, arm.name, step, cfg, state['params']):.4f} after step {step}"
            )
        if step == steps or step % config.checkpoint.every == 0:
            store.save(step, **state, host={"step": step, "tokens": record["tokens"]})
    return state["params"]


def _line(name: str, steps: int, r: dict[str, Any], clock: metrics.Clock) -> str:
    """One step for a person."""
    used = "" if r["mfu"] is None else f"  mfu {100 * r['mfu']:.1f} %"
    return (
        f"{name} step {r['step']:>{len(str(steps))}}/{steps}  loss {r['loss']:.4f}  lr {r['learning_rate']:.2e}  "
        f"grad {r['grad_norm']:.2f}  {r['tokens_per_second']:,.0f} tok/s{used}  {metrics.duration(clock.eta())} left"
    )

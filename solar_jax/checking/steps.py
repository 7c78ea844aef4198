"""The training step of a model: compiled, timed, and compared with the planner's time and memory."""

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp

from solar_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from solar_jax.errors import UserError
from solar_jax.growth.operators import identity
from solar_jax.hardware import chips
from solar_jax.hardware.slices import Slice
from solar_jax.model.llama import initial_params
from solar_jax.model.precision import precision
from solar_jax.model.shapes import Params, param_shapes, parameter_count
from solar_jax.parallel import rules
from solar_jax.parallel.attention import attention_choice
from solar_jax.parallel.mesh import make_mesh
from solar_jax.planning import search
from solar_jax.planning.aot import BATCH_TYPES, compile_step, lower_step
from solar_jax.planning.search import Devices, Option
from solar_jax.training.optimizer import make_optimizer
from solar_jax.training.partition import Partition, make_partition
from solar_jax.training.state import State, first_opt_state, state_shardings

STEPS = 3  # timed, after one that is not
LETTERS = "VDFLNKH"  # of a model's sizes, in the order of `ModelConfig`
# (model, T, rows a device): of a few seconds on one chip, and of a few seconds on a CPU
SMALL = ("L12,D1024,F4096,N8,K4,H128,V32000", 2048, 4)
SMALLEST = ("L2,D128,F256,N4,K2,H32,V1024", 256, 2)


@dataclasses.dataclass(frozen=True)
class StepCheck:
    """A step as planned and as compiled or run; bytes and seconds of one device."""

    model: str  # its size
    option: str  # mesh, remat policy and microbatches
    attention: str  # a name of parallel.attention.ATTENTION
    rows: int  # B, over all devices
    length: int  # T
    planned_bytes: float
    planned_seconds: float | None  # None if the planner's table has no row
    compile_seconds: float = 0.0
    compiled_bytes: float | None = None  # None if it does not compile
    compiled_seconds: float | None = None  # by the compiler's cycles
    measured_seconds: tuple[float, ...] = ()
    problem: str = ""


def parse_shape(text: str, length: int) -> ModelConfig:
    """Reads a model's sizes by their axis letters.

    Args:
      text: every letter of `LETTERS` once, each with a number above 0.
      length: T.

    Raises:
      UserError: a letter is unknown, missing or repeated, or a size is 0.
    """
    pairs = [(part[:1], int(part[1:])) for part in text.split(",")]
    if sorted(letter for letter, _ in pairs) != sorted(LETTERS) or not all(size for _, size in pairs):
        raise UserError(f"--model={text}: expected a size above 0 for each of {', '.join(LETTERS)}, as in {SMALL[0]}.")
    size = dict(pairs)
    if size["N"] % size["K"] or size["H"] % 2:
        raise UserError(f"--model={text}: K must divide N, and H must be even.")
    order = (size[letter] for letter in LETTERS)
    return ModelConfig(*order, max_position_embeddings=length, rope_theta=1e4, rms_norm_eps=1e-5)


def step_config(devices: Devices, rows: int, length: int) -> Config:
    """Returns a run whose mesh, remat policy and microbatches are the planner's; `rows` are those of one device."""
    train = TrainConfig(steps=10, batch_size=rows * devices.count, accumulation=0)
    return Config(name="check", data=DataConfig(sequence_length=length), train=train)


def planned_step(cfg: ModelConfig, config: Config, devices: Devices) -> tuple[StepCheck, Option, Partition]:
    """Plans the step of a model.

    Raises:
      UserError: no way to run it fits.
    """
    partition = make_partition("all", identity(cfg.num_hidden_layers))
    option, need = search.choose(cfg, config, devices, partition)
    length = config.data.sequence_length
    planned = StepCheck(
        model=f"{cfg.num_hidden_layers} layers, {parameter_count(cfg):,} parameters",
        option=str(option),
        attention=attention_choice(cfg, option.config.train, length, option.mesh),
        rows=config.train.batch_size,
        length=length,
        planned_bytes=need.total,
        planned_seconds=option.time.total if option.time else None,
    )
    return planned, option, partition


def compile_for(
    planned: StepCheck, cfg: ModelConfig, option: Option, wanted: Slice, partition: Partition
) -> StepCheck:  # fmt: skip
    """Compiles a planned step for a slice that need not exist."""
    try:
        compiled = compile_step(cfg, option.config, wanted, partition=partition)
    except jax.errors.JaxRuntimeError as e:
        return dataclasses.replace(planned, problem=f"does not compile: {str(e).splitlines()[0]}"[:200])
    return dataclasses.replace(
        planned, compile_seconds=compiled.compiled_seconds, compiled_bytes=compiled.total,
        compiled_seconds=compiled.program.scheduled_seconds(),
    )  # fmt: skip


def run_here(planned: StepCheck, cfg: ModelConfig, option: Option, partition: Partition) -> StepCheck:
    """Compiles a planned step for this machine's devices and times it, from random weights on random tokens."""
    config, mesh = option.config, make_mesh(option.config.mesh)
    begin = time.perf_counter()
    lowered = lower_step(cfg, config, mesh, partition)
    options = chips.compiler_options(jax.local_devices()[0], config.train.offload_collectives)
    step = lowered.compile(options or None)
    spent, memory = time.perf_counter() - begin, step.memory_analysis()
    state, batch = _first_state(cfg, config, mesh, partition), _random_batch(cfg, config, mesh)
    seconds, loss = [], math.nan
    for _ in range(1 + STEPS):
        begin = time.perf_counter()
        state, measured = step(state, batch)
        loss = float(jax.block_until_ready(measured["loss"]))
        seconds.append(time.perf_counter() - begin)
    problem = "" if math.isfinite(loss) else f"the loss is {loss}"
    return dataclasses.replace(
        planned, compile_seconds=spent, compiled_bytes=memory.total_allocation_bytes if memory else None,
        measured_seconds=tuple(seconds[1:]), problem=problem,
    )  # fmt: skip


def _first_state(cfg: ModelConfig, config: Config, mesh: jax.sharding.Mesh, partition: Partition) -> State:
    policy = precision(config.train)
    optimizer = make_optimizer(config.optimizer, config.train.steps, policy, seed=0, mesh=mesh)
    shardings, shapes = state_shardings(cfg, optimizer, mesh, partition), param_shapes(cfg, policy.weights)

    def draw() -> Params:
        return jax.tree.map(lambda x, s: x.astype(s.dtype), initial_params(cfg, seed=0), shapes)

    params = jax.jit(draw, out_shardings=shardings["params"])()
    return {"params": params, "opt_state": first_opt_state(optimizer, partition, params, shardings["opt_state"])}


def _random_batch(cfg: ModelConfig, config: Config, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Draws rows of one document each; arrays of `BATCH_TYPES`."""
    rows = rules.padded_rows(config.train.batch_size, mesh, config.train.accumulation)
    shape = rows, config.data.sequence_length

    def draw() -> dict[str, jax.Array]:
        tokens = jax.random.randint(jax.random.key(1), shape, 0, cfg.vocab_size, jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
        values = {"tokens": tokens, "targets": jnp.roll(tokens, -1, 1), "positions": positions}
        values |= {"segment_ids": jnp.zeros(shape, jnp.int32), "weights": jnp.ones(shape, jnp.float32)}
        return {name: values[name].astype(dtype) for name, dtype in BATCH_TYPES.items()}

    return jax.jit(draw, out_shardings=rules.batch_sharding(mesh))()

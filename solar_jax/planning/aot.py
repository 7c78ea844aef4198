"""Compiles the training step for a TPU slice without having one: exact memory, and time by the compiler's figures."""

import dataclasses
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from solar_jax.config import Config, ModelConfig
from solar_jax.data.chat.formats import kind_of
from solar_jax.hardware import chips
from solar_jax.hardware.slices import Slice, described_devices
from solar_jax.model.precision import precision
from solar_jax.parallel import rules
from solar_jax.parallel.mesh import make_mesh
from solar_jax.planning import hlo_cost
from solar_jax.planning.hlo_cost import read_program
from solar_jax.training.objectives import next_token
from solar_jax.training.optimizer import Rewarm, make_optimizer
from solar_jax.training.partition import Partition
from solar_jax.training.preferences import make_loss, preference_objective
from solar_jax.training.state import abstract_state, state_shardings
from solar_jax.training.step import make_train_step

BATCH_TYPES = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), jnp.int32) | {"weights": jnp.float32}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Compiled step of one device of the slice; sizes in bytes."""

    arguments: int
    temporaries: int
    total: int  # all that the compiler allocates, which it checks against the chip's HBM
    traced_seconds: float
    compiled_seconds: float
    text: str  # optimised HLO
    program: hlo_cost.Program  # as read by the roofline model
    lowered: jax.stages.Lowered
    executable: jax.stages.Compiled
    mesh: jax.sharding.Mesh


def lower_step(
    cfg: ModelConfig, config: Config, mesh: jax.sharding.Mesh, partition: Partition | None = None
) -> jax.stages.Lowered:
    """Lowers the step of a run on a mesh of any devices, allocating nothing.

    Args:
      cfg: the grown model.
      config: the run.
      mesh: of devices of one kind, real or described.
    """
    steps = max(1, config.train.steps)  # not known yet where the config counts epochs
    rewarm = Rewarm(config.growth.steps, config.growth.rewarm_steps)
    optimizer = make_optimizer(
        config.optimizer, steps, precision(config.train), seed=config.seed, mesh=mesh, rewarm=rewarm
    )
    policy = precision(config.train)
    state = abstract_state(
        cfg, policy.weights, optimizer, state_shardings(cfg, optimizer, mesh, partition), partition,
        partition.base_dtype(policy) if partition else "",
    )  # fmt: skip
    rows = rules.padded_rows(config.train.batch_size, mesh, config.train.accumulation)
    shape, sharding = (rows, config.data.sequence_length), rules.batch_sharding(mesh)
    pairs, objective, types = kind_of(config.data.format) == "pairs", next_token, BATCH_TYPES
    if pairs:
        objective = preference_objective(make_loss(config.preferences), config.data.sequence_length)
        types = BATCH_TYPES | {"reference": jnp.float32}
    batch = {k: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for k, dtype in types.items()}
    platform = mesh.devices.flat[0].platform
    step = make_train_step(cfg, config.train, config.data.sequence_length, optimizer, mesh, partition, objective)
    return step.trace(state, batch).lower(lowering_platforms=(platform,))


def compile_step(
    cfg: ModelConfig, config: Config, wanted: Slice, options: Mapping[str, str] | None = None,
    partition: Partition | None = None,
) -> Compiled:  # fmt: skip
    """Compiles the step of a run for all devices of a slice, as the run itself would.

    Args:
      cfg: the grown model.
      config: the run; its mesh must fit the slice.
      wanted: the slice.
      options: compiler options that replace the chip's own.
      partition: which parameters train; all if None.

    Raises:
      UserError: no TPU compiler is installed, or the mesh or the config does not fit.
      jax.errors.JaxRuntimeError: compilation failed; "RESOURCE_EXHAUSTED" if memory is too small.
    """
    devices = described_devices(wanted)
    begin = time.perf_counter()
    mesh = make_mesh(config.mesh, devices)
    lowered = lower_step(cfg, config, mesh, partition)
    traced = time.perf_counter() - begin
    begin = time.perf_counter()
    if options is None:
        options = chips.compiler_options(devices[0], config.train.offload_collectives)
    compiled = lowered.compile(dict(options) or None)
    seconds = time.perf_counter() - begin
    m, text = compiled.memory_analysis(), compiled.as_text()
    assert m is not None
    assert text is not None
    return Compiled(
        arguments=m.argument_size_in_bytes,
        temporaries=m.temp_size_in_bytes,
        total=m.total_allocation_bytes,
        traced_seconds=traced,
        compiled_seconds=seconds,
        text=text,
        program=read_program(text, wanted.facts),
        lowered=lowered,
        executable=compiled,
        mesh=mesh,
    )

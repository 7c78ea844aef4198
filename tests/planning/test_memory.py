"""Memory that a step is said to need: exact where it can be, near what the compiler says elsewhere."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from solar_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from solar_jax.parallel import rules
from solar_jax.parallel.mesh import AXES
from solar_jax.planning.memory import GIB, Need, estimate, shard_bytes
from solar_jax.training.state import abstract_state, state_shardings
from solar_jax.training.step import make_train_step
from tests.conftest import optimizer_of, step_args, weights_of
from tests.parallel.test_mesh import mesh_of
from tests.parallel.test_rules import SMALL

SOLAR = ModelConfig(32000, 4096, 14336, 48, 32, 8, 128)
OPTIMIZER = optimizer_of(Config())
FAST_COMPILE = {"xla_backend_optimization_level": 0}  # leaves out LLVM's work on the code, not XLA's on the buffers
COUNTS = 8  # the step counts of Adam and of the schedule, int32 each, on every device


def config(batch_size: int = 8, length: int = 64, accumulation: int = 1, remat: str = "full") -> Config:
    train = TrainConfig(10, batch_size, accumulation, remat=remat, precision="float32")
    return Config(data=DataConfig(sequence_length=length), train=train)


def state(cfg: ModelConfig, mesh):
    return abstract_state(cfg, weights_of(config()), OPTIMIZER, state_shardings(cfg, OPTIMIZER, mesh))


def pod(data: int, fsdp: int, tensor: int, device: AbstractDevice | None = None) -> AbstractMesh:
    """A mesh of devices that are not here."""
    auto = (AxisType.Auto,) * len(AXES)
    return AbstractMesh((1, data, fsdp, 1, 1, tensor), AXES, axis_types=auto, abstract_device=device)


@pytest.mark.parametrize(("data", "fsdp"), [(1, 64), (2, 64)])
def test_solars_state_over_64_shards_by_hand(data, fsdp):
    # Every array has an axis of 4096, which 64 divides: 10,731,524,096 parameters x 4 bytes / 64.
    mesh = pod(data, fsdp, 1)
    need = estimate(SOLAR, *step_args(config(batch_size=256, length=4096)), state(SOLAR, mesh), mesh)
    assert need.parameters == need.gradients == 670_720_256
    assert need.optimizer == 2 * 670_720_256 + COUNTS


def test_norm_scales_are_not_split_over_tensor():
    # (48 x 2 + 1) scales of 4096, over 8 of 16 devices; every other parameter over all 16.
    mesh = pod(1, 8, 2)
    scales = 97 * 4096
    expected = (10_731_524_096 - scales) * 4 // 16 + scales * 4 // 8
    assert shard_bytes(state(SOLAR, mesh)["params"]) == expected


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 4, 2), (2, 2, 2), (1, 1, 1)])
def test_the_state_takes_the_bytes_it_was_said_to(shape):
    mesh = mesh_of(*shape)
    abstract = state(SMALL, mesh)
    need = estimate(SMALL, *step_args(config()), abstract, mesh)
    real = jax.tree.map(lambda s: jax.device_put(jnp.zeros(s.shape, s.dtype), s.sharding), abstract)
    for said, part in ((need.parameters, "params"), (need.optimizer, "opt_state")):
        assert said == sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(real[part]))


def test_accumulation_needs_a_second_copy_of_the_gradients():
    mesh = pod(1, 64, 1)
    abstract = state(SOLAR, mesh)
    once, twice = (estimate(SOLAR, *step_args(config(256, 4096, k)), abstract, mesh) for k in (1, 2))
    assert twice.gradients == 2 * once.gradients
    assert twice.activations == pytest.approx(once.activations / 2, rel=1e-6)


def test_need_is_the_sum_of_its_parts_and_reads_in_gib():
    need = Need(1 * GIB, 2 * GIB, 3 * GIB, GIB // 2, 4 * GIB)
    assert need.total == 10.5 * GIB
    assert str(need) == "10.5 GiB a device (parameters 1.0, optimizer 2.0, gradients 3.0, activations 0.5, working 4.0)"


@pytest.mark.parametrize(("shape", "remat"), [((1, 1, 1), "none"), ((1, 1, 1), "full"), ((1, 4, 2), "full")])
def test_activations_are_within_a_factor_of_two_of_the_compilers(shape, remat):
    # Rows long enough that activations outweigh the state; the compiler's temporaries hold the gradients too.
    cfg, mesh = dataclasses.replace(SMALL, num_hidden_layers=6), mesh_of(*shape)
    run, abstract = config(length=64, remat=remat), state(cfg, mesh)
    kinds = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), jnp.int32) | {"weights": jnp.float32}
    batch = {k: jax.ShapeDtypeStruct((8, 64), d, sharding=rules.batch_sharding(mesh)) for k, d in kinds.items()}
    step = make_train_step(cfg, run.train, run.data.sequence_length, OPTIMIZER, mesh).lower(abstract, batch)
    temporary = step.compile(FAST_COMPILE).memory_analysis().temp_size_in_bytes
    need = estimate(cfg, run.train, run.data.sequence_length, abstract, mesh)
    assert need.activations + need.working > 2 * need.gradients
    assert temporary / 2 < need.activations + need.working + need.gradients < temporary * 2


def test_what_a_policy_saves_by_hand():
    # Of each layer and token, in bfloat16: the input, 4096; and by name q, attention and mid 4096, k and v 1024, gate
    # and up 14336; the kernel's sums are a float32 a head.
    mesh, tokens = pod(1, 64, 1, AbstractDevice("TPU v5", None, "tpu")), 4 * 4096
    saved = {
        "full": 4096,
        "attention": 2 * 4096,
        "mid": 4 * 4096 + 2 * 1024,
        "matmuls": 4 * 4096 + 2 * 1024 + 2 * 14336,
    }
    for remat, values in saved.items():
        run = dataclasses.replace(config(256, 4096), train=TrainConfig(10, 256, remat=remat))
        need = estimate(SOLAR, run.train, run.data.sequence_length, state(SOLAR, mesh), mesh)
        assert need.activations == 48 * tokens * (2 * values + (0 if remat == "full" else 4 * 32))
        assert need.gradients == 2 * 2 * 10_731_524_096 // 64  # bfloat16, and the parameters' copy

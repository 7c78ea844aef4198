"""Experts on a mesh: the loss of one device, whatever shards experts, rows and widths."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from solar_jax.config import Config, DataConfig, LoraConfig, ModelConfig, OptimizerConfig, TrainConfig
from solar_jax.errors import UserError
from solar_jax.growth.operators import identity
from solar_jax.model.shapes import param_shapes
from solar_jax.orbax_store.store import CheckpointStore
from solar_jax.parallel import rules
from solar_jax.parallel.experts import LETTERS, expert_dispatch
from solar_jax.parallel.rules import EXPERTS
from solar_jax.training.partition import Partition, everything, make_partition
from solar_jax.training.state import abstract_state, state_shardings
from solar_jax.training.step import make_train_step
from tests.conftest import optimizer_of
from tests.parallel.test_mesh import mesh_of
from tests.parallel.test_rules import SMALL

CFG = dataclasses.replace(SMALL, num_local_experts=4, num_experts_per_tok=2, sliding_window=0)
ROWS, LENGTH, STEPS = 8, 16, 20
# data, fsdp, tensor, context, slice, expert
MESHES = [(1, 1, 1, 1, 1, 4), (1, 2, 1, 1, 1, 2), (1, 1, 2, 1, 1, 2), (1, 1, 1, 2, 1, 2), (1, 1, 1, 1, 2, 2)]


def batch(step: int) -> dict[str, np.ndarray]:
    """Rows that repeat, so that there is something to learn, with a tail of padding."""
    rng = np.random.default_rng(step % 4)
    tokens = rng.integers(0, CFG.vocab_size, (ROWS, LENGTH + 1), dtype=np.int32)
    places = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
    return {
        "tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": places,
        "segment_ids": np.zeros((ROWS, LENGTH), np.int32), "weights": (places < LENGTH - 3).astype(np.float32),
    }  # fmt: skip


@functools.cache
def history(shape: tuple[int, ...], steps: int, trainable: str = "all", accumulation: int = 1):
    """(metrics by step, parameters before, parameters after) of training on a mesh."""
    mesh, partition = mesh_of(*shape), partition_of(trainable)
    config = Config(
        data=DataConfig(sequence_length=LENGTH),
        train=TrainConfig(steps, ROWS, accumulation, remat="full", precision="float32"),
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant", eps=1e-3),
    )
    rng = np.random.default_rng(0)
    before = jax.tree.map_with_path(
        lambda path, s: (0.2 * rng.standard_normal(s.shape) + path[-1].key.endswith("norm")).astype(np.float32),
        param_shapes(CFG),
    )
    optimizer = optimizer_of(config)
    shardings = state_shardings(CFG, optimizer, mesh, partition)
    params = jax.device_put(before, shardings["params"])
    opt_state = jax.jit(lambda p: optimizer.init(partition.trained(p)), out_shardings=shardings["opt_state"])(params)
    state, found = {"params": params, "opt_state": opt_state}, []
    step = make_train_step(CFG, config.train, LENGTH, optimizer, mesh, partition)
    for i in range(steps):
        state, measured = step(state, jax.device_put(batch(i), rules.batch_sharding(mesh)))
        found.append({name: float(value) for name, value in measured.items()})
    return found, before, jax.device_get(state["params"])


def partition_of(trainable: str) -> Partition:
    return everything(CFG) if trainable == "all" else make_partition(trainable, identity(CFG.num_hidden_layers))


@pytest.mark.parametrize("shape", MESHES)
def test_training_is_that_of_one_device_over_twenty_steps(shape):
    steps = STEPS if shape == MESHES[0] else 3
    for one, many in zip(history((1, 1, 1), STEPS)[0], history(shape, steps)[0], strict=False):
        # f times p is of all tokens together; each TPU slice has its own.
        for name, limit in (("loss", 1e-5), ("grad_norm", 1e-5), ("router_balance", 1e-5)):
            assert abs(one[name] - many[name]) < (limit if shape[4] == 1 else 5e-2) * max(1.0, one[name]), (shape, name)
    assert abs(history((1, 1, 1), STEPS)[0][0]["loss"] - history(shape, steps)[0][0]["loss"]) < 1e-5
    assert history((1, 1, 1), STEPS)[0][-1]["loss"] < history((1, 1, 1), STEPS)[0][0]["loss"] - 0.1


def test_microbatches_give_the_gradient_of_the_whole_batch_but_for_the_balance_of_each():
    whole, parts = history((1, 1, 1), 3)[0], history((1, 1, 1), 3, accumulation=2)[0]
    assert abs(whole[0]["loss"] - parts[0]["loss"]) < 1e-5
    assert abs(whole[0]["grad_norm"] - parts[0]["grad_norm"]) < 0.05


def test_a_checkpoint_comes_back_bit_by_bit_with_its_experts_on_other_devices(tmp_path):
    optimizer = optimizer_of(Config())

    def abstract(shape: tuple[int, ...]):
        return abstract_state(CFG, "float32", optimizer, state_shardings(CFG, optimizer, mesh_of(*shape)))

    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda s: jax.device_put(rng.standard_normal(s.shape).astype(s.dtype), s.sharding), abstract(MESHES[0])
    )
    with CheckpointStore(tmp_path) as store:
        store.save(4, **state, host={"step": 4})
        for shape in ((1, 2, 1, 1, 1, 2), (1, 1, 2), (1, 1, 1, 1, 1, 2)):
            wanted = abstract(shape)
            params, opt_state, _ = store.restore(4, wanted["params"], wanted["opt_state"])
            found = {"params": params, "opt_state": opt_state}
            for a, b, s in zip(*map(jax.tree.leaves, (found, state, wanted)), strict=True):
                assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
                assert a.sharding.is_equivalent_to(s.sharding, a.ndim)


@pytest.mark.parametrize("trainable", ["router", "experts"])
def test_only_the_named_part_moves(trainable):
    found, before, after = history((1, 1, 1, 1, 1, 2), 2, trainable)
    moving = {"router": {"router"}, "experts": {"router", "experts_gate", "experts_up", "experts_down"}}[trainable]
    for name, x in before["layers"].items():
        assert np.array_equal(x, after["layers"][name]) != (name in moving), name
    assert np.array_equal(before["embed"], after["embed"])
    assert found[0]["grad_norm"] > 0


def test_experts_lie_on_their_devices_and_dense_arrays_are_sharded_over_all():
    mesh = mesh_of(1, 2, 1, 1, 1, 4)
    found = rules.parameter_shardings(CFG, mesh)["layers"]
    assert found["experts_gate"].spec == PartitionSpec(None, "expert", ("fsdp", "context"), "tensor")
    assert found["experts_down"].spec == PartitionSpec(None, "expert", "tensor", ("fsdp", "context"))
    assert found["q_proj"] == NamedSharding(mesh, PartitionSpec(None, rules.FSDP, "tensor", None))
    with pytest.raises(UserError, match=r"config\.mesh\.expert=8 does not divide the model's num_local_experts=4"):
        rules.parameter_shardings(CFG, mesh_of(1, 1, 1, 1, 1, 8))


def test_experts_weights_are_gathered_and_their_gradients_scattered_never_all_reduced_in_full():
    mesh, E, D, F, k = mesh_of(1, 4, 1, 1, 1, 2), 4, 32, 64, 2
    dispatch = expert_dispatch(mesh)

    def on(letters: str, table: dict[str, rules.MeshAxes]) -> NamedSharding:
        return NamedSharding(mesh, rules.spec(letters, table))

    matrices = [
        jax.ShapeDtypeStruct([{"E": E, "D": D, "F": F}[x] for x in letters], np.float32, sharding=on(letters, EXPERTS))
        for letters in LETTERS
    ]
    h = jax.ShapeDtypeStruct((8, 16, D), np.float32, sharding=on("BTD", rules.ACTIVATIONS))
    shares, chosen = (
        jax.ShapeDtypeStruct((8, 16, k), t, sharding=on("BT.", rules.ACTIVATIONS)) for t in (np.float32, np.int32)
    )
    gradients = jax.grad(lambda *operands: dispatch(*operands).sum(), argnums=(3, 4, 5))
    at_rest = tuple(x.sharding for x in matrices)
    text = jax.jit(gradients, out_shardings=at_rest).lower(h, shares, chosen, *matrices).compile().as_text()
    assert text.count(" reduce-scatter(") >= 3
    full = E // 2 * D * F  # elements of a device's experts
    for line in text.splitlines():
        if found := re.search(r"= \w+\[([\d,]+)\]\S* all-reduce\(", line):
            assert np.prod([int(n) for n in found[1].split(",")]) < full, line


def test_a_dense_model_has_no_router_to_train_and_experts_no_adapters_of_an_mlp():
    dense: ModelConfig = dataclasses.replace(SMALL)
    with pytest.raises(UserError, match="router and experts need a model of experts"):
        partition_of("router").shapes(dense)
    with pytest.raises(UserError, match=r"config\.lora\.targets must be among q, k, v, o"):
        Partition((True,) * CFG.num_hidden_layers, (), LoraConfig(rank=2)).shapes(CFG)

"""The policies of precision in a sharded training step: what is kept in what, what is multiplied in what."""

import collections
import re

import jax
import jax.numpy as jnp
import pytest

from solar_jax.config import TrainConfig
from solar_jax.errors import UserError
from solar_jax.model.precision import PRECISIONS, precision
from solar_jax.parallel import rules
from solar_jax.training.state import abstract_state, state_shardings
from solar_jax.training.step import make_eval_step, make_train_step, mean_loss
from tests.conftest import optimizer_of, step_args
from tests.parallel.test_mesh import mesh_of
from tests.parallel.test_rules import SMALL
from tests.training.small_run import FAST_COMPILE, config, initial, make_batch

# policy -> weights, moments
KEPT = {
    "float32": ("float32", "float32"),
    "mixed": ("float32", "float32"),
    "bf16_moments": ("float32", "bfloat16"),
    "bf16": ("bfloat16", "bfloat16"),
    "int8_weights": ("float32", "float32"),
    "int8": ("float32", "float32"),
    "int8_wgrad": ("float32", "float32"),
    "fp8": ("float32", "float32"),
}
# policy -> its products in the program by the type of the first operand. Of seven projections there are seven forward,
# six once more before the backward pass (what the last gives is not needed there), and seven of gradients with weights.
# int8_wgrad: two of the weights' gradients as well. int8_weights: none.
NARROW = {
    "mixed": {},
    "bf16": {},
    "int8_weights": {},
    "int8": {"i8": 20},
    "int8_wgrad": {"i8": 22},
    "fp8": {"f8E4M3FN": 13, "f8E5M2": 7},
}


def test_every_policy_is_tried_here():
    assert set(KEPT) == set(PRECISIONS)


@pytest.mark.parametrize("name", sorted(PRECISIONS))
def test_what_is_kept_is_of_the_policys_dtypes_and_vectors_are_float32(name):
    weights, moments = KEPT[name]
    mesh, run = mesh_of(1, 4, 2), config(precision=name)
    optimizer = optimizer_of(run, mesh=mesh)
    abstract = abstract_state(SMALL, precision(run.train).weights, optimizer, state_shardings(SMALL, optimizer, mesh))
    for path, s in jax.tree.leaves_with_path(abstract["params"]):
        assert s.dtype == ("float32" if path[-1].key.endswith("norm") else weights), path
    for path, s in jax.tree.leaves_with_path(abstract["opt_state"]):
        if jnp.issubdtype(s.dtype, jnp.floating):
            assert s.dtype == ("float32" if path[-1].key.endswith("norm") else moments), path


@pytest.mark.parametrize("name", sorted(NARROW))  # bf16 is bf16_moments and more
def test_a_policy_trains_within_a_scan_with_recomputation_on_a_mesh(name):
    mesh = mesh_of(1, 8, 1) if name == "int8_weights" else mesh_of(1, 4, 2)  # gathers attention's weights as one
    run = config(precision=name)
    optimizer = optimizer_of(run, mesh=mesh)
    abstract = abstract_state(SMALL, precision(run.train).weights, optimizer, state_shardings(SMALL, optimizer, mesh))
    rest = jax.tree.map(lambda s: s.sharding, abstract)
    params = jax.tree.map(
        lambda x, s: jax.device_put(jnp.asarray(x, s.dtype), s.sharding), initial(False), abstract["params"]
    )
    state = {"params": params, "opt_state": jax.jit(optimizer.init, out_shardings=rest["opt_state"])(params)}
    batch = jax.device_put(make_batch(0), rules.batch_sharding(mesh))
    eval_step = make_eval_step(SMALL, *step_args(config(precision="float32")), mesh)
    before = mean_loss(eval_step, state["params"], [batch])

    lowered = make_train_step(SMALL, run.train, run.data.sequence_length, optimizer, mesh).lower(state, batch)
    products = collections.Counter(re.findall(r"dot_general .*: \(tensor<[0-9x]*x(\w+)>", lowered.as_text()))
    assert {kind: n for kind, n in products.items() if kind not in ("f32", "bf16")} == NARROW[name]
    assert products["bf16"] >= 7  # gradients of weights; scores and their product with the values; the head
    step = lowered.compile(FAST_COMPILE)
    for _ in range(4):
        state, measured = step(state, batch)
    assert jax.tree.map(lambda x: (x.dtype, x.sharding.spec), state) == jax.tree.map(
        lambda s: (s.dtype, s.sharding.spec), abstract
    )
    # Four steps on one batch, next to those of float32 (which reach 2.63 from 4.50).
    after = mean_loss(eval_step, state["params"], [batch])
    assert float(measured["loss"]) < before - 0.5
    assert after < before - 0.5


def test_the_held_out_loss_is_of_the_model_that_is_kept():
    # Not of its projections in 8 bits, which no one who loads the model will have.
    mesh = mesh_of(1, 1, 1)
    batch = jax.device_put(make_batch(0), rules.batch_sharding(mesh))
    params = jax.device_put(initial(False), rules.parameter_shardings(SMALL, mesh))
    mixed, int8 = (
        mean_loss(make_eval_step(SMALL, *step_args(config(precision=p)), mesh), params, [batch])
        for p in ("mixed", "int8")
    )
    assert mixed == int8


def test_an_unknown_policy_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"config\.train\.precision must be one of float32, mixed, .*fp8, found 'fp4'"):
        precision(TrainConfig(precision="fp4"))

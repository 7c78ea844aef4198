"""What the training loop records: the gradient norm that clipping sees."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

from solar_jax.config import GrowthConfig
from solar_jax.growth.plan import make_plan
from solar_jax.model import llama
from solar_jax.training.objectives import next_token_loss
from solar_jax.training.optimizer import make_optimizer, trainable_layers, trainable_mask
from solar_jax.training.step import make_train_step
from tests.parallel.test_mesh import mesh_of
from tests.parallel.test_rules import SMALL
from tests.training.test_step import FAST_COMPILE, config, initial, make_batch


@pytest.mark.parametrize(("name", "layers"), [("new", [2]), ("seam", [1, 2])])
def test_the_norm_that_is_recorded_is_of_what_trains_as_clipping_takes_it(name, layers):
    plan = make_plan(2, GrowthConfig("slices", slices="0:2,1:2"))
    run, mesh, batch = config(remat="none"), mesh_of(1, 1, 1), jax.tree.map(jnp.array, make_batch(0))
    assert SMALL.num_hidden_layers == plan.layers
    trained, others = trainable_layers(name, plan)
    mask = trainable_mask(llama.shapes(SMALL), trained, others)
    optimizer = make_optimizer(run.optimizer, 3, mask)

    def loss(params):
        logits = llama.logits(SMALL, params, batch["tokens"], batch["positions"], batch["segment_ids"])
        total, targets = next_token_loss(logits, batch["targets"], batch["weights"])
        return total / targets

    grads = jax.jit(jax.grad(loss))(initial(False))
    expected = optax.global_norm(jax.tree.map(lambda g: g[jnp.array(layers)], grads["layers"]))
    assert float(expected) < 0.98 * float(optax.global_norm(grads))  # so that the wrong one is told apart

    state = {"params": initial(False), "opt_state": optimizer.init(initial(False))}
    step = functools.partial(make_train_step, SMALL, run, optimizer, mesh)
    _, measured = step(mask).lower(state, batch).compile(FAST_COMPILE)(state, batch)
    assert float(measured["grad_norm"]) == pytest.approx(float(expected), rel=1e-5)

"""Trained and frozen parts: what trains gets the gradient it had, what is frozen costs nothing and keeps every bit."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from solar_jax.config import Config, GrowthConfig, OptimizerConfig, TrainConfig
from solar_jax.errors import UserError
from solar_jax.growth.apply import grown_config
from solar_jax.growth.operators import identity, make_layer_map
from solar_jax.model import llama
from solar_jax.model.shapes import param_shapes
from solar_jax.training.objectives import next_token_loss
from solar_jax.training.optimizer import DIRECTIONS
from solar_jax.training.partition import ARRAYS, OTHERS, TRAINABLE, Partition, everything, make_partition
from solar_jax.training.state import abstract_state, state_shardings, stored_form
from solar_jax.training.step import make_train_step
from tests.conftest import optimizer_of, weights_of
from tests.parallel.test_mesh import mesh_of
from tests.parallel.test_rules import SMALL
from tests.training.small_run import config, make_batch

SMALL_TOKENS = make_batch(0)["tokens"].size
LAYER_MAP = make_layer_map(4, GrowthConfig("dus", m=1))  # 0 1 2 | 1 2 3: layers 3 and 4 are new
CFG = grown_config(SMALL, LAYER_MAP)
MOVES = {  # which layers, which other arrays
    "all": ([0, 1, 2, 3, 4, 5], OTHERS),
    "new": ([3, 4], ()),
    "seam": ([2, 3], ()),
    "no_embed": ([0, 1, 2, 3, 4, 5], ("final_norm",)),
    "router": ([0, 1, 2, 3, 4, 5], ()),
    "experts": ([0, 1, 2, 3, 4, 5], ()),
}
EXPERTS = dataclasses.replace(CFG, num_local_experts=4, num_experts_per_tok=2)


def random_params(cfg=CFG):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.array(0.05 * rng.standard_normal(s.shape), jnp.float32), param_shapes(cfg))


def test_every_choice_of_what_trains_is_tried_here():
    assert set(MOVES) == set(TRAINABLE)


def optimiser_config(optimiser: str) -> OptimizerConfig:
    # With decay and momentum, either of which could move a frozen weight.
    return OptimizerConfig(name=optimiser, learning_rate=1e-2, schedule="constant", weight_decay=0.5)


@pytest.mark.parametrize(
    ("optimiser", "name"),
    [*(("adamw", name) for name in sorted(TRAINABLE)), *((o, "new") for o in sorted(DIRECTIONS) if o != "adamw")],
)
def test_what_is_frozen_keeps_every_bit_and_the_rest_moves(optimiser, name):
    run = Config(optimizer=optimiser_config(optimiser), train=TrainConfig(steps=3, precision="float32"))
    partition, optimizer, params = (
        make_partition(name, LAYER_MAP),
        optimizer_of(run),
        random_params(EXPERTS if name in ARRAYS else CFG),
    )
    rng = np.random.default_rng(1)

    @jax.jit
    def step(params, state, grads):
        trained = partition.trained(params)
        updates, state = optimizer.update(partition.trained(grads), state, trained)
        return partition.replaced(params, optax.apply_updates(trained, updates)), state

    found, state = params, optimizer.init(partition.trained(params))
    for _ in range(3):
        grads = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), params)
        found, state = step(found, state, grads)
    layers, others = MOVES[name]
    for other in params.keys() - {"layers"}:
        assert_moved(found[other], params[other], other in others, other)
    for array, before in params["layers"].items():
        for i in range(LAYER_MAP.layers):
            moves = i in layers and array in ARRAYS.get(name, (array,))
            assert_moved(found["layers"][array][i], before[i], moves, f"{array} of layer {i}")


def assert_moved(found, before, moves: bool, what: str):
    found, before = np.asarray(found), np.asarray(before)
    if moves:  # all but the odd weight whose three steps happen to cancel
        assert (found != before).mean() > 0.99, what
    else:
        assert found.tobytes() == before.tobytes(), what


GROWTHS = {  # the two last have more runs of trained and frozen layers than are written one after another
    "dus": (GrowthConfig("dus", m=1), "new"),
    "seam": (GrowthConfig("dus", m=1), "seam"),
    "no_embed": (GrowthConfig("dus", m=1), "no_embed"),
    "llama_pro": (GrowthConfig("llama_pro", every=1), "new"),
    "average": (GrowthConfig("average", every=1), "new"),
}


@pytest.mark.parametrize("name", GROWTHS)
def test_the_trained_part_has_the_gradient_that_it_has_where_everything_trains(name):
    growth, trainable = GROWTHS[name]
    layer_map = make_layer_map(4, growth)
    cfg, partition = grown_config(SMALL, layer_map), make_partition(trainable, layer_map)
    params, batch = random_params(cfg), jax.tree.map(jnp.array, make_batch(0))

    def loss(params):
        logits = llama.logits(cfg, params, batch["tokens"], batch["positions"], batch["segment_ids"])
        return next_token_loss(logits, batch["targets"], batch["weights"])[0]

    def of_trained(trained):
        return loss(partition.merged(params, trained))

    plain, expected = jax.jit(jax.value_and_grad(loss))(params)
    value, found = jax.jit(jax.value_and_grad(of_trained))(partition.trained(params))
    assert float(value) == pytest.approx(float(plain), rel=1e-6)
    expected = partition.trained(expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5 * np.abs(b).max(), err_msg=str(path))


def matmul_flops(jaxpr) -> int:
    """FLOPs of all products in a program, those in scans as often as they run."""
    total = 0
    for e in jaxpr.eqns:
        if e.primitive.name == "dot_general":
            (contracted, _), _ = e.params["dimension_numbers"]
            total += 2 * e.outvars[0].aval.size * math.prod(e.invars[0].aval.shape[i] for i in contracted)
        inner = [p for v in e.params.values() for p in (v if isinstance(v, tuple | list) else [v])]
        inner = [getattr(p, "jaxpr", p) for p in inner if hasattr(getattr(p, "jaxpr", p), "eqns")]
        total += e.params.get("length", 1) * sum(map(matmul_flops, inner))
    return total


def traced_step(partition: Partition):
    run, mesh = config(remat="full"), mesh_of(1, 1, 1)
    optimizer = optimizer_of(run)
    state = abstract_state(CFG, weights_of(run), optimizer, state_shardings(CFG, optimizer, mesh, partition), partition)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_batch(0))
    return state, make_train_step(CFG, run.train, run.data.sequence_length, optimizer, mesh, partition).trace(
        state, batch
    )


def test_frozen_layers_have_no_optimiser_state_and_no_gradient():
    def size(tree) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    part = make_partition("new", LAYER_MAP)
    (all_state, whole), (new_state, partial) = traced_step(everything(CFG)), traced_step(part)
    layer = sum(s.size // CFG.num_hidden_layers for s in jax.tree.leaves(param_shapes(CFG)["layers"]))
    counts = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(new_state["opt_state"]) if x.ndim == 0)
    assert size(new_state["opt_state"]) == 2 * 4 * 2 * layer + counts  # two float32 moments of two layers
    assert size(all_state["opt_state"]) == 2 * 4 * sum(s.size for s in jax.tree.leaves(param_shapes(CFG))) + counts
    # A product of every weight: forward, recomputed, two backward. In the part: forward in 6 layers; recomputed, and
    # the gradient of activations, in layers 3 to 5; the gradient of weights in layers 3 and 4; not that of the head.
    matrices = [s for s in jax.tree.leaves(param_shapes(CFG)["layers"]) if s.ndim > 2]
    weights = 2 * SMALL_TOKENS * sum(math.prod(s.shape[1:]) for s in matrices)  # of one layer
    head = 2 * SMALL_TOKENS * CFG.vocab_size * CFG.hidden_size
    saved = matmul_flops(whole.jaxpr) - matmul_flops(partial.jaxpr)
    assert saved >= (3 * 2 + 4) * weights + head


def test_a_state_of_a_version_that_masked_gradients_is_cut_to_the_trained_layers():
    run, mesh, part = config(), mesh_of(1, 1, 1), make_partition("new", LAYER_MAP)
    optimizer = optimizer_of(run)
    form = functools.partial(
        stored_form, cfg=CFG, weights=weights_of(run), optimizer=optimizer, mesh=mesh, partition=part
    )
    wanted = abstract_state(CFG, weights_of(run), optimizer, state_shardings(CFG, optimizer, mesh, part), part)[
        "opt_state"
    ]
    params = random_params()
    before = jax.tree.map(lambda x: x + 1.0 if x.ndim else x, optimizer.init(params))
    paths = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree.leaves_with_path(before)]
    stored = dict(zip(paths, (x.shape for x in jax.tree.leaves(before)), strict=True))
    abstract, finish = form(wanted, stored=stored)
    assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, before)
    moments = np.arange(6, dtype=np.float32)
    numbered = jax.tree.map_with_path(
        lambda p, x: (
            x if "layers" not in str(p) else jnp.broadcast_to(moments.reshape(6, *[1] * (x.ndim - 1)), x.shape)
        ),
        before,
    )
    found = finish(numbered, 5)
    mu = optax.tree_utils.tree_get(found, "mu")
    assert set(mu) == {"layers"}
    assert [float(x) for x in mu["layers"]["attn_norm"][:, 0]] == [3.0, 4.0]
    now, same = form(
        wanted, stored={k: (2, *v[1:]) if "layers" in k else v for k, v in stored.items() if "embed" not in k}
    )
    assert jax.tree.map(jnp.shape, now) == jax.tree.map(jnp.shape, wanted)
    assert same(found, 5) is found


@pytest.mark.parametrize("name", ["new", "seam"])
def test_a_choice_that_leaves_nothing_to_train_is_refused(name):
    with pytest.raises(UserError, match=rf"config\.train\.trainable='{name}' leaves nothing .* identity"):
        make_partition(name, identity(4))


def test_an_unknown_choice_of_what_trains_is_refused_with_the_known_ones():
    with pytest.raises(
        UserError, match=r"config\.train\.trainable must be one of all, .*no_embed, router, experts, found 'old'"
    ):
        make_partition("old", LAYER_MAP)


@pytest.mark.parametrize("growth", [GrowthConfig("llama_pro", every=2), GrowthConfig("average", every=2)])
def test_new_trains_the_added_layers_of_every_operator(growth):
    layer_map = make_layer_map(4, growth)
    assert make_partition("new", layer_map).layers == layer_map.new

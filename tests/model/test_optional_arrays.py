"""Biases and the norms of queries and keys everywhere that arrays are treated by what they are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from solar_jax.config import Config, GrowthConfig, ModelConfig, OptimizerConfig
from solar_jax.growth.apply import grow
from solar_jax.growth.operators import make_layer_map
from solar_jax.model import llama
from solar_jax.model.shapes import LAYER_AXES, Params, param_shapes, parameter_count
from solar_jax.parallel import rules
from solar_jax.parallel.collectives import constrain_on
from tests.conftest import optimizer_of
from tests.parallel.test_mesh import mesh_of

PLAIN = ModelConfig(64, 32, 48, 3, 4, 2, 8, 1024, 10000.0, 1e-5)
FULL = dataclasses.replace(PLAIN, attention_bias="qkvo", qk_norm=True, mlp_bias=True)
ADDED = {"q_bias": (3, 4, 8), "k_bias": (3, 2, 8), "v_bias": (3, 2, 8), "o_bias": (3, 32), "q_norm": (3, 8),
         "k_norm": (3, 8), "gate_bias": (3, 48), "up_bias": (3, 48), "down_bias": (3, 32)}  # fmt: skip


def random_params(cfg: ModelConfig) -> Params:
    """Every array random, norms' scales around one."""
    rng = np.random.default_rng(0)
    return jax.tree.map_with_path(
        lambda path, s: jnp.array(0.3 * rng.standard_normal(s.shape) + path[-1].key.endswith("norm"), s.dtype),
        param_shapes(cfg),
    )


def logits(cfg: ModelConfig, params: Params, **kwargs) -> np.ndarray:
    tokens = jnp.array(np.random.default_rng(1).integers(0, cfg.vocab_size, (8, 24)))
    return np.asarray(jax.jit(lambda p: llama.logits(cfg, p, tokens, **kwargs))(params))


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ""),
        ({"attention_bias": "qkv"}, "q_bias k_bias v_bias"),
        ({"attention_bias": "qkvo"}, "q_bias k_bias v_bias o_bias"),
        ({"qk_norm": True}, "q_norm k_norm"),
        ({"mlp_bias": True}, "gate_bias up_bias down_bias"),
        ({"attention_bias": "qkvo", "qk_norm": True, "mlp_bias": True}, " ".join(ADDED)),
    ],
)
def test_an_architecture_has_the_arrays_that_its_config_says_and_no_others(changes, names):
    plain, found = (param_shapes(dataclasses.replace(PLAIN, **c))["layers"] for c in ({}, changes))
    assert {name: x.shape for name, x in found.items() if name not in plain} == {n: ADDED[n] for n in names.split()}
    assert set(plain) <= set(found)


def test_initial_biases_are_zero_and_norms_one_and_the_matrices_those_of_a_model_without_them():
    plain, full = llama.initial_params(PLAIN, 0)["layers"], llama.initial_params(FULL, 0)["layers"]
    for name in ADDED:
        assert full[name].shape == ADDED[name]
        assert np.all(np.asarray(full[name]) == name.endswith("norm"))
    for name, x in plain.items():
        np.testing.assert_array_equal(x, full[name])


def test_parameters_are_counted_with_them():
    added = sum(int(np.prod(shape)) for shape in ADDED.values())
    assert parameter_count(FULL) == parameter_count(PLAIN) + added


def test_the_copy_for_bfloat16_matmuls_leaves_them_float32():
    copy = llama.compute_copy(random_params(FULL), jnp.bfloat16)["layers"]
    narrow = {name for name, x in copy.items() if x.dtype == jnp.bfloat16}
    assert narrow == {name for name in LAYER_AXES if name.endswith("proj")}


def test_bfloat16_logits_stay_near_float32_ones_with_them():
    params = jax.tree.map(lambda x: x / 4 if x.ndim > 2 else x, random_params(FULL))
    wide, narrow = logits(FULL, params), logits(FULL, params, compute_dtype=jnp.bfloat16)
    assert np.abs(wide - narrow).max() < 0.05 * np.abs(wide).max()


def test_weight_decay_leaves_them_alone():
    params = random_params(FULL)
    optimizer = optimizer_of(
        Config(optimizer=OptimizerConfig(learning_rate=0.1, schedule="constant", weight_decay=0.5))
    )
    zero = jax.tree.map(jnp.zeros_like, params)  # no gradient, so that only the decay moves anything
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    moved = {name for name, x in updates["layers"].items() if np.any(np.asarray(x))}
    assert moved == {name for name in LAYER_AXES if name.endswith("proj")}


def test_they_rest_where_what_they_are_added_to_does():
    shardings = rules.parameter_shardings(FULL, mesh_of(1, 4, 2))["layers"]
    assert {name: shardings[name].spec for name in ADDED} == {
        "q_bias": PartitionSpec(None, "tensor", None),
        "k_bias": PartitionSpec(None, "tensor", None),
        "v_bias": PartitionSpec(None, "tensor", None),
        "o_bias": PartitionSpec(None, rules.FSDP),
        "q_norm": PartitionSpec(None, None),
        "k_norm": PartitionSpec(None, None),
        "gate_bias": PartitionSpec(None, "tensor"),
        "up_bias": PartitionSpec(None, "tensor"),
        "down_bias": PartitionSpec(None, rules.FSDP),
    }


def test_every_moment_of_theirs_lies_as_they_do():
    mesh = mesh_of(1, 4, 2)
    opt_state = jax.eval_shape(optimizer_of(Config()).init, param_shapes(FULL))
    found = rules.like_parameters(opt_state, FULL, mesh)
    expected = rules.parameter_shardings(FULL, mesh)
    moments = [x for x in jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, dict)) if isinstance(x, dict)]
    assert len(moments) == 2
    assert all(x == expected for x in moments)


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 4, 2)])
def test_the_logits_of_a_mesh_are_those_of_one_device(shape):
    # Under tensor parallelism o_proj's product is a sum over devices: a bias added before the sum would count twice.
    mesh, params = mesh_of(*shape), random_params(FULL)
    sharded = jax.device_put(params, rules.parameter_shardings(FULL, mesh))
    expected = logits(FULL, params)
    found = logits(FULL, sharded, constrain=constrain_on(mesh))
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("operator", ["llama_pro", "average", "dus"])
def test_growth_treats_them_as_it_treats_their_layer(operator):
    params = random_params(FULL)
    layer_map = make_layer_map(3, GrowthConfig(operator, m=1, every=1))
    grown = grow(params, layer_map)["layers"]
    for name in ADDED:
        x = np.asarray(params["layers"][name])
        for i, (a, b) in enumerate(zip(layer_map.source, layer_map.partner, strict=True)):
            expected = (x[a] + x[b]) / 2 * (layer_map.scale[i] if name in ("o_bias", "down_bias") else 1.0)
            np.testing.assert_array_equal(np.asarray(grown[name])[i], expected)
    assert operator != "llama_pro" or set(layer_map.scale) == {0.0, 1.0}

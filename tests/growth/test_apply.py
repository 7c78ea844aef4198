"""Growth of the weights: the gather against a loop over layers, and what it does to the model's output."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solar_jax.config import GrowthConfig, ModelConfig
from solar_jax.growth.apply import grow, grown_config
from solar_jax.growth.operators import OPERATORS, LayerMap, identity, make_layer_map
from solar_jax.model import llama
from solar_jax.model.shapes import Params, param_shapes
from solar_jax.parallel import rules
from tests.parallel.test_mesh import mesh_of

SCALED = ("o_proj", "down_proj")  # what adds to the residual stream
CFG = ModelConfig(64, 32, 48, 6, 4, 2, 8, 1024, 10000.0, 1e-5)
GROWTHS = [
    GrowthConfig("dus", m=2),
    GrowthConfig("naive"),
    GrowthConfig("interleave"),
    GrowthConfig("block_repeat", a=1, b=4),
    GrowthConfig("llama_pro", every=2),
    GrowthConfig("zeroed", m=2),
    GrowthConfig("average", every=2),
    GrowthConfig("identity"),
    GrowthConfig("slices", slices="4:6,0:3"),
    GrowthConfig("blocks", blocks="0:2x3,3:5"),
    GrowthConfig("midas", b=2),
    GrowthConfig("lidas", b=3),
    GrowthConfig("stack_last", b=2),
    GrowthConfig("split", a=1, b=4, alpha=0.25),
    GrowthConfig("split_sqrt", a=1, b=4),
    GrowthConfig("linear_lesa", every=2),
    GrowthConfig("gated", of="dus", m=2, beta=0.25),
    GrowthConfig("tied", of="dus", m=2),
]
IDS = [g.operator for g in GROWTHS]


def random_params(dtype=jnp.float32) -> Params:
    """Every array random, norm scales too, and large enough that a layer matters."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.array(0.3 * rng.standard_normal(s.shape), dtype), param_shapes(CFG))


def bits(x) -> np.ndarray:
    """The bytes of an array, which tell -0 from 0."""
    x = np.ascontiguousarray(x)
    return x.view(f"u{x.dtype.itemsize}")


def assert_same_bits(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(bits(a), bits(b))


@functools.cache
def forward(layers: int):
    """The compiled model of a depth, shared by the tests."""
    cfg = dataclasses.replace(CFG, num_hidden_layers=layers)
    tokens = jnp.array(np.random.default_rng(1).integers(0, cfg.vocab_size, (2, 12)))
    return jax.jit(lambda params: llama.logits(cfg, params, tokens))


def fit_by_hand(stacked: np.ndarray) -> np.ndarray:
    """(a, b) of W_i = a W_{i-1} + b W_{i+1}, by a least-squares solver on the elements."""
    x = stacked.astype(np.float64).reshape(len(stacked), -1)
    before, here, after = x[:-2].reshape(-1), x[1:-1].reshape(-1), x[2:].reshape(-1)
    return np.linalg.lstsq(np.stack((before, after), axis=1), here)[0].astype(np.float32)


def output(params: Params) -> np.ndarray:
    return np.asarray(forward(len(params["layers"]["q_proj"]))(params))


def test_every_operator_is_tried_here():
    assert set(IDS) == set(OPERATORS)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("growth", GROWTHS, ids=IDS)
def test_the_gather_is_a_loop_over_layers_bit_by_bit(growth, dtype):
    params = random_params(dtype)
    layer_map = make_layer_map(6, growth)
    found = grow(params, layer_map)
    shapes = jax.tree.map(lambda s: s.shape, param_shapes(grown_config(CFG, layer_map)))
    assert jax.tree.map(lambda x: x.shape, found) == shapes
    for name, stacked in params["layers"].items():
        stacked = np.asarray(stacked)
        for i in range(layer_map.layers):
            layer = stacked[layer_map.source[i]]
            if layer_map.partner[i] != layer_map.source[i]:
                wide, other = layer.astype(np.float32), stacked[layer_map.partner[i]].astype(np.float32)
                a, b = fit_by_hand(stacked) if layer_map.mix == "fit" else (np.float32(0.5), np.float32(0.5))
                layer = (a * wide + b * other).astype(layer.dtype)
            if name in SCALED and layer_map.scale[i] != 1:
                layer = layer * np.asarray(layer_map.scale[i], layer.dtype)
            grown = np.asarray(found["layers"][name][i])
            if layer_map.scale[i] == 0 and name in SCALED:
                assert not grown.any(), (name, i)
            else:
                np.testing.assert_array_equal(bits(grown), bits(layer), err_msg=f"{name} of layer {i}")
    for name in ("embed", "final_norm", "lm_head"):
        assert_same_bits(found[name], params[name])


def test_the_identity_gives_the_bases_logits_bitwise():
    params = random_params()
    np.testing.assert_array_equal(bits(output(grow(params, identity(6)))), bits(output(params)))


PRESERVING = [
    GrowthConfig("llama_pro", every=2),
    GrowthConfig("llama_pro", every=1),
    GrowthConfig("zeroed", m=2, inner="mean"),
    GrowthConfig("gated", of="dus", m=2, beta=0.0),
    GrowthConfig("gated", of="blocks", blocks="0:2x3,3:5", beta=0.0),
    GrowthConfig("split", a=1, b=5, alpha=1.0),
]


@pytest.mark.parametrize("growth", PRESERVING, ids=str)
def test_growth_that_keeps_the_bases_outputs_changes_no_logit(growth):
    # Bitwise: a zeroed layer adds exactly 0 to the residual stream, and the scan runs the same code for each layer.
    params, layer_map = random_params(), make_layer_map(6, growth)
    np.testing.assert_array_equal(output(grow(params, layer_map)), output(params))


@pytest.mark.parametrize("of", ["dus", "blocks"])
def test_a_gate_of_1_is_the_operator_itself_bit_by_bit_and_one_of_a_half_is_not(of):
    params, keys = random_params(), {"m": 2, "blocks": "0:2x3,3:5"}
    plain = grow(params, make_layer_map(6, GrowthConfig(of, **keys)))
    assert_same_bits(grow(params, make_layer_map(6, GrowthConfig("gated", of=of, beta=1.0, **keys))), plain)
    half = grow(params, make_layer_map(6, GrowthConfig("gated", of=of, beta=0.5, **keys)))
    assert np.abs(output(half) - output(plain)).max() > 1e-2


def test_a_layer_map_with_noise_is_refused_where_names_are_unknown():
    with pytest.raises(ValueError, match=r"inner=normal.* views\.grown"):
        grow(random_params(), make_layer_map(6, GrowthConfig("zeroed", m=2, inner="normal")))


def test_llama_pro_without_the_zeros_changes_the_logits():
    # The control of the test above: the copies must matter where they are not zeroed.
    params, layer_map = random_params(), make_layer_map(6, GrowthConfig("llama_pro", every=2))
    copies = dataclasses.replace(layer_map, scale=(1.0,) * layer_map.layers)
    found = output(grow(params, copies))
    assert np.abs(found - output(params)).max() > 1e-2


@pytest.mark.parametrize("forgotten", SCALED)
def test_llama_pro_needs_both_zeros(forgotten):
    params, layer_map = random_params(), make_layer_map(6, GrowthConfig("llama_pro", every=2))
    copies = grow(params, dataclasses.replace(layer_map, scale=(1.0,) * layer_map.layers))
    damaged = grow(params, layer_map)
    damaged["layers"][forgotten] = copies["layers"][forgotten]
    assert np.abs(output(damaged) - output(params)).max() > 1e-2


def test_a_plan_for_another_depth_raises_with_both_numbers():
    with pytest.raises(ValueError, match=r"layers/\w+ has 6 layers, the plan is for 8"):
        grow(random_params(), make_layer_map(8, GrowthConfig("dus", m=2)))


def test_the_grown_config_differs_in_depth_alone():
    layer_map = LayerMap("slices", 6, (0, 1, 2, 1, 2, 3, 4))
    assert grown_config(CFG, layer_map) == dataclasses.replace(CFG, num_hidden_layers=7)


@pytest.mark.parametrize("growth", [g for g in GROWTHS if g.operator in ("dus", "zeroed", "average")])
def test_growing_a_sharded_base_gives_the_same_bits_sharded_by_the_rules(growth):
    mesh, params, layer_map = mesh_of(2, 2, 2), random_params(), make_layer_map(6, growth)
    shardings = rules.parameter_shardings(grown_config(CFG, layer_map), mesh)
    base = jax.device_put(params, rules.parameter_shardings(CFG, mesh))
    found = jax.jit(lambda p: grow(p, layer_map), out_shardings=shardings)(base)
    for x, sharding in zip(jax.tree.leaves(found), jax.tree.leaves(shardings), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)
    assert_same_bits(found, grow(params, layer_map))


def test_growth_moves_no_weight_between_devices():
    # The gather runs along the one axis that is never split; a collective in it would be a wrong layout.
    mesh, layer_map = mesh_of(2, 2, 2), make_layer_map(6, GrowthConfig("dus", m=2))
    shardings = rules.parameter_shardings(CFG, mesh)
    abstract = jax.tree.map(
        lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), param_shapes(CFG), shardings
    )
    out = rules.parameter_shardings(grown_config(CFG, layer_map), mesh)
    text = jax.jit(lambda p: grow(p, layer_map), out_shardings=out).lower(abstract).compile().as_text()
    assert "gather(" in text or "dynamic-slice" in text  # the text is the program's
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in text

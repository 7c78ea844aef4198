"""Stochastic rounding: exact over all noise, unbiased, and what it is for, updates that rounding to nearest loses."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from solar_jax.config import Config, OptimizerConfig, TrainConfig
from solar_jax.model.precision import PRECISIONS
from solar_jax.model.shapes import param_shapes
from solar_jax.orbax_store.store import CheckpointStore
from solar_jax.training import stochastic_rounding
from solar_jax.training.optimizer import DIRECTIONS
from solar_jax.training.state import abstract_state, state_shardings
from solar_jax.training.stochastic_rounding import narrow, stochastic_round
from tests.conftest import optimizer_of, weights_of
from tests.parallel.test_mesh import mesh_of
from tests.parallel.test_rules import SMALL
from tests.training.small_run import FAST_COMPILE

# Both signs, a mantissa full of ones (which carries into the exponent), the smallest normal and a subnormal number.
AWKWARD = [1.0, 1.003, -1.003, 1.9999, -0.3333, 3.1415927, 1e-38, 1e-40, -2.5e30, 255.99]


def neighbours(x: float) -> tuple[float, float]:
    """The bfloat16 numbers around a float32, by cutting its last 16 bits and adding one to what is left."""
    bits = int(np.float32(x).view(np.uint32))
    around = np.array([bits & 0xFFFF0000, (bits & 0xFFFF0000) + 0x10000], np.uint32).view(np.float32)
    return float(around[0]), float(around[1])


@pytest.mark.parametrize("x", AWKWARD)
def test_over_all_noise_there_is_the_mean_is_the_number_itself(monkeypatch, x):
    x = float(np.float32(x))
    every = jnp.arange(2**16, dtype=jnp.uint16)
    monkeypatch.setattr(jax.random, "bits", lambda key, shape, dtype: every)
    found = np.asarray(stochastic_round(jnp.full(2**16, x, jnp.float32), jax.random.key(0))).astype(np.float64)
    toward, away = neighbours(x)
    assert set(np.unique(found)) <= {toward, away}
    assert found.mean() == pytest.approx(x, rel=1e-12, abs=0)
    nearest = float(np.float32(x).astype(ml_dtypes.bfloat16))  # what would not do
    assert nearest == x or abs(nearest - x) > abs(found.mean() - x)


def test_with_real_noise_the_mean_is_unbiased():
    n, x = 1 << 18, 1.0 + 2.0**-7 * 0.3  # three tenths of the way to the next bfloat16
    found = np.asarray(stochastic_round(jnp.full(n, x, jnp.float32), jax.random.key(1))).astype(np.float64)
    error = 2.0**-7 * (0.3 * 0.7 / n) ** 0.5
    assert abs(found.mean() - float(np.float32(x))) < 4 * error
    assert abs(1.0 - x) > 100 * error  # to which rounding to nearest would take all of them


@pytest.mark.parametrize("x", [0.0, -0.0, 1.5, -3.0e38, np.inf, -np.inf, np.nan, 1e-39])
def test_what_bfloat16_holds_stays_as_it_is_whatever_the_noise(x):
    x = np.float32(x).astype(ml_dtypes.bfloat16)
    found = np.asarray(stochastic_round(jnp.full(1000, x, jnp.float32), jax.random.key(2)))
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found.astype(np.float32), np.full(1000, x, np.float32))
    assert (np.signbit(found.astype(np.float32)) == np.signbit(np.float32(x))).all()


def decayed(b2: float) -> optax.GradientTransformation:
    return optax.scale_by_adam(0.9, b2)


def walk(tx: optax.GradientTransformation, params, gradient, steps: int):
    state = tx.init(params)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda: jax.lax.scan(step, (params, state), length=steps)[0])()


def test_a_bfloat16_weight_goes_where_many_small_updates_take_it():
    # 100 steps of a 1/1000: each an eighth of what lies between 1 and the next bfloat16 below it, or a quarter.
    params, gradient = {"embed": jnp.ones((64, 64), jnp.bfloat16)}, {"embed": jnp.ones((64, 64), jnp.bfloat16)}
    found, _ = walk(narrow(optax.sgd(1e-3), PRECISIONS["bf16"], 0), params, gradient, 100)
    assert found["embed"].dtype == jnp.bfloat16
    assert float(jnp.mean(found["embed"].astype(jnp.float32))) == pytest.approx(0.9, abs=1e-3)
    stuck, _ = walk(optax.sgd(1e-3), params, gradient, 100)
    assert (stuck["embed"] == 1).all()


def test_a_bfloat16_second_moment_follows_a_slow_average():
    # After 1000 steps of gradient 1 it is 1 - 0.999 ** 1000, 0.632; rounded to nearest it stays at 0.25, from where a
    # step of 0.00075 is less than half of what lies before the next bfloat16.
    params, gradient = {"embed": jnp.zeros((64, 64))}, {"embed": jnp.ones((64, 64))}
    _, state = walk(narrow(decayed(0.999), PRECISIONS["bf16_moments"], 0), params, gradient, 1000)
    nu = state.inner.nu["embed"]
    assert nu.dtype == jnp.bfloat16
    assert float(jnp.mean(nu.astype(jnp.float32))) == pytest.approx(1 - 0.999**1000, rel=1e-2)

    def to_nearest(state):
        return state._replace(nu=jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), state.nu))

    tx = decayed(0.999)
    nearest = optax.GradientTransformation(
        tx.init, lambda u, s, p=None: (lambda out: (out[0], to_nearest(out[1])))(tx.update(u, s, p))
    )
    _, state = walk(nearest, params, gradient, 1000)
    assert float(jnp.mean(state.nu["embed"])) == 0.25


def test_float32_policies_are_left_as_they_are():
    tx = decayed(0.9)
    assert narrow(tx, PRECISIONS["mixed"], 0) is tx
    assert narrow(tx, PRECISIONS["float32"], 0) is tx


def run(precision: str, name: str = "adamw", seed: int = 0) -> Config:
    optimizer = OptimizerConfig(name=name, learning_rate=1e-2, schedule="constant", clip_norm=0.0)
    return Config(seed=seed, optimizer=optimizer, train=TrainConfig(steps=8, precision=precision))


def initial(precision: str):
    rng = np.random.default_rng(0)
    shapes = param_shapes(SMALL, PRECISIONS[precision].weights)
    return jax.tree.map(lambda s: jnp.array(0.1 * rng.standard_normal(s.shape), s.dtype), shapes)


def gradient(step: int):
    rng = np.random.default_rng(100 + step)
    return jax.tree.map(lambda s: jnp.array(rng.standard_normal(s.shape), jnp.float32), param_shapes(SMALL))


def taken(config: Config, mesh, state, steps) -> dict:
    """The state after some steps, each laid out as it rests."""
    optimizer = optimizer_of(config, mesh=mesh)
    rest = jax.tree.map(lambda x: x.sharding, state)

    def one(state, g):
        updates, opt_state = optimizer.update(g, state["opt_state"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}

    step = jax.jit(one, out_shardings=rest)
    step = step.lower(state, jax.device_put(gradient(0), rest["params"])).compile(FAST_COMPILE)
    for i in steps:
        state = step(state, jax.device_put(gradient(i), rest["params"]))
    return state


def begin(config: Config, mesh) -> dict:
    optimizer = optimizer_of(config, mesh=mesh)
    abstract = abstract_state(SMALL, weights_of(config), optimizer, state_shardings(SMALL, optimizer, mesh))
    rest = jax.tree.map(lambda s: s.sharding, abstract)
    params = jax.device_put(initial(config.train.precision), rest["params"])
    state = {"params": params, "opt_state": jax.jit(optimizer.init, out_shardings=rest["opt_state"])(params)}
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    return state


def assert_same_bits(found, expected):
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype, path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)


def test_a_run_goes_on_from_a_checkpoint_with_the_same_noise(tmp_path):
    config, mesh = run("bf16"), mesh_of(1, 4, 2)
    expected = taken(config, mesh, begin(config, mesh), range(4))
    half = taken(config, mesh, begin(config, mesh), range(2))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), half)
    with CheckpointStore(tmp_path) as store:
        store.save(2, **half, host={"step": 2})
        params, opt_state, _ = store.restore(2, abstract["params"], abstract["opt_state"])
    assert_same_bits(taken(config, mesh, {"params": params, "opt_state": opt_state}, range(2, 4)), expected)
    other = run("bf16", seed=1)
    with pytest.raises(AssertionError):  # another seed, other noise
        assert_same_bits(taken(other, mesh, begin(other, mesh), range(4)), expected)


def test_no_two_updates_and_no_two_arrays_share_their_noise(monkeypatch):
    keys = []

    def record(x, key):
        jax.debug.callback(lambda k: keys.append(tuple(k.tolist())), jax.random.key_data(key))
        return x.astype(jnp.bfloat16)

    monkeypatch.setattr(stochastic_rounding, "stochastic_round", record)
    config, mesh = run("bf16"), mesh_of(1, 1, 1)
    taken(config, mesh, begin(config, mesh), range(3))
    jax.effects_barrier()
    matrices = 9  # embed, head and seven of the layers
    assert len(set(keys)) == len(keys) == 3 * 3 * matrices  # weights, mu and nu, in three updates


@pytest.mark.parametrize("precision", ["bf16_moments", "bf16"])
def test_the_noise_is_the_same_on_every_mesh(precision):
    config = run(precision)
    one, many = (taken(config, mesh, begin(config, mesh), range(3)) for mesh in (mesh_of(1, 1, 1), mesh_of(1, 4, 2)))
    assert_same_bits(many, one)


@pytest.mark.parametrize("name", sorted(DIRECTIONS))
def test_every_optimiser_keeps_its_moments_of_matrices_narrow_and_steps_as_in_float32(name):
    wide, thin = run("mixed", name), run("bf16_moments", name)
    mesh = mesh_of(1, 1, 1)
    expected, found = (taken(config, mesh, begin(config, mesh), range(3)) for config in (wide, thin))
    for path, x in jax.tree.leaves_with_path(found["opt_state"]):
        floats, matrix = jnp.issubdtype(x.dtype, jnp.floating), getattr(path[-1], "key", "norm").endswith("norm")
        if floats:
            assert x.dtype == (jnp.float32 if matrix else jnp.bfloat16), jax.tree_util.keystr(path)
    begun = initial("mixed")
    for (path, a), b, c in zip(
        jax.tree.leaves_with_path(found["params"]), jax.tree.leaves(expected["params"]), jax.tree.leaves(begun),
        strict=True,
    ):  # fmt: skip
        moved = float(jnp.linalg.norm(b - c))
        # Lion's step is a sign, which a rounded moment may turn where it is near 0.
        assert float(jnp.linalg.norm(a - b)) < (0.15 if name == "lion" else 0.02) * moved, jax.tree_util.keystr(path)

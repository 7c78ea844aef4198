"""Schedules by hand, AdamW against PyTorch's, and that what is frozen does not move by a bit."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
import torch

from solar_jax.config import Config, ModelConfig, OptimizerConfig, TrainConfig
from solar_jax.errors import UserError
from solar_jax.model.shapes import param_shapes
from solar_jax.training.optimizer import (
    DIRECTIONS,
    SCHEDULES,
    learning_rate,
)
from solar_jax.training.state import state_shardings
from tests.conftest import optimizer_of
from tests.parallel.test_mesh import mesh_of
from tests.training.small_run import FAST_COMPILE

PEAK, LAST = 1e-3, 1e-4  # final_fraction 0.1


def run(cfg: OptimizerConfig, steps: int, precision: str = "float32") -> Config:
    return Config(optimizer=cfg, train=TrainConfig(steps=steps, precision=precision))


def rates(schedule: str, steps: int, warmup: int, **changes) -> list[float]:
    cfg = OptimizerConfig(
        learning_rate=PEAK, schedule=schedule, warmup_steps=warmup, **({"final_fraction": 0.1} | changes)
    )
    rate = learning_rate(cfg, steps)
    return [float(rate(step)) for step in range(steps)]


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_warmup_rises_evenly_to_the_peak(schedule):
    assert rates(schedule, 21, 4)[:4] == pytest.approx([PEAK / 4, PEAK / 2, 3 * PEAK / 4, PEAK])


@pytest.mark.parametrize(("schedule", "last"), [("constant", PEAK), ("linear", LAST), ("cosine", LAST), ("wsd", LAST)])
@pytest.mark.parametrize(("steps", "warmup"), [(21, 4), (21, 0), (21, 1), (2, 0), (500, 20)])
def test_the_first_and_last_rates_are_those_of_the_config(schedule, last, steps, warmup):
    found = rates(schedule, steps, warmup)
    assert found[0] == pytest.approx(PEAK / max(warmup, 1))
    assert found[-1] == pytest.approx(last)
    assert max(found) == pytest.approx(PEAK)


def test_every_schedule_has_its_values_by_hand():
    assert set(SCHEDULES) == {"constant", "linear", "cosine", "wsd"}


def test_linear_falls_evenly():
    # 4 of warmup, then 16 equal steps down from the peak.
    expected = [PEAK + (LAST - PEAK) * i / 16 for i in range(17)]
    assert rates("linear", 21, 4)[4:] == pytest.approx(expected)


def test_cosine_falls_along_half_a_wave():
    expected = [LAST + (PEAK - LAST) * (1 + math.cos(math.pi * i / 16)) / 2 for i in range(17)]
    assert rates("cosine", 21, 4)[4:] == pytest.approx(expected)


def test_wsd_stays_at_the_peak_until_the_final_decay():
    # The decay takes a quarter of the 16 steps after warmup.
    expected = [PEAK] * 13 + [PEAK + (LAST - PEAK) * i / 4 for i in range(1, 5)]
    assert rates("wsd", 21, 4, decay_fraction=0.25)[4:] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_a_run_that_is_all_warmup_ends_at_the_peak(schedule):
    assert rates(schedule, 4, 4) == pytest.approx([PEAK / 4, PEAK / 2, 3 * PEAK / 4, PEAK])


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_a_rate_of_zero_stays_zero(schedule):
    cfg = OptimizerConfig(learning_rate=0.0, schedule=schedule, warmup_steps=2)
    rate = learning_rate(cfg, 8)
    assert [float(rate(step)) for step in range(8)] == [0.0] * 8


def test_an_unknown_schedule_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"config\.optimizer\.schedule must be one of .*wsd, found 'step'"):
        learning_rate(OptimizerConfig(schedule="step"), 10)


@pytest.mark.parametrize("clip_norm", [0.5, 0.0, 1e6], ids=["clipped", "off", "never reached"])
def test_five_steps_are_those_of_torch_adamw(clip_norm):
    rng = np.random.default_rng(0)
    shapes = {"embed": (6, 4), "final_norm": (4,), "layers": {"q_proj": (2, 4, 3), "attn_norm": (2, 4)}}
    params = jax.tree.map(lambda s: rng.standard_normal(s).astype(np.float32), shapes, is_leaf=_is_shape)
    gradients = [jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(np.float32), params) for _ in range(5)]
    cfg = OptimizerConfig(
        learning_rate=1e-2, schedule="linear", warmup_steps=2, b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.3,
        clip_norm=clip_norm,
    )  # fmt: skip

    optimizer = optimizer_of(run(cfg, 5))
    ours, state = params, optimizer.init(params)
    update = jax.jit(optimizer.update)
    for g in gradients:
        updates, state = update(g, state, ours)
        ours = optax.apply_updates(ours, updates)

    theirs = {jax.tree_util.keystr(k): torch.tensor(p) for k, p in jax.tree.leaves_with_path(params)}
    groups = [  # decay on matrices, none on norm scales
        {"params": [p for k, p in theirs.items() if "norm" not in k], "weight_decay": 0.3},
        {"params": [p for k, p in theirs.items() if "norm" in k], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(0.8, 0.9), eps=1e-6)
    rate = learning_rate(cfg, 5)
    for step, g in enumerate(gradients):
        for key, grad in jax.tree.leaves_with_path(g):
            theirs[jax.tree_util.keystr(key)].grad = torch.tensor(grad)
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(theirs.values(), clip_norm)
        for group in adamw.param_groups:
            group["lr"] = float(rate(step))
        adamw.step()

    for key, p in jax.tree.leaves_with_path(ours):
        expected = theirs[jax.tree_util.keystr(key)].numpy()
        # torch divides by norm + 1e-6 when it clips, which moves the gradient by about one part in a million
        np.testing.assert_allclose(p, expected, rtol=1e-5, atol=1e-6, err_msg=jax.tree_util.keystr(key))


def _is_shape(x) -> bool:
    return isinstance(x, tuple)


@pytest.mark.parametrize("name", ["final_norm", "attn_norm"])
def test_weight_decay_leaves_norm_scales_alone(name):
    params = {name: jnp.ones(3), "layers": {name: jnp.ones((2, 3)), "o_proj": jnp.ones((2, 3))}}
    optimizer = optimizer_of(run(OptimizerConfig(learning_rate=0.1, weight_decay=0.5), 1))
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert not updates[name].any()
    assert not updates["layers"][name].any()
    np.testing.assert_allclose(updates["layers"]["o_proj"], -0.05, rtol=1e-6)


# Two axes of 128 and more in some matrices, which Adafactor then factors, and no two axes of one size.
WIDE = ModelConfig(256, 128, 160, 3, 4, 2, 24, 1024, 10000.0, 1e-5)
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2, schedule="linear", warmup_steps=2, b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.3, clip_norm=0.0
)


def random_like(shapes, seed: int):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: 0.1 * rng.standard_normal(s.shape).astype(np.float32), shapes)


def taken(optimizer: optax.GradientTransformation, params, gradients):
    """The parameters after a step with each of the gradients."""
    state = jax.jit(optimizer.init)(params)
    update = jax.jit(optimizer.update).lower(gradients[0], state, params).compile(FAST_COMPILE)
    for g in gradients:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params


def unstacked(tree) -> dict[str, np.ndarray]:
    """Every layer's array by itself, "2.q_proj" as [in, out] where Muon takes it; those outside as they are."""
    out = {name: np.asarray(x) for name, x in tree.items() if name != "layers"}
    for name, x in tree["layers"].items():
        out |= {f"{i}.{name}": np.asarray(layer) for i, layer in enumerate(x)}
    return out


def is_layers_matrix(name: str) -> bool:
    return name[0].isdigit() and "norm" not in name


def as_matrix(name: str, x: np.ndarray) -> np.ndarray:
    """[D, N, H] -> [D, N H] and [N, H, D] -> [N H, D], what transformers' transposed weights are."""
    if not is_layers_matrix(name):
        return x
    return x.reshape(-1, x.shape[-1]) if name.endswith(("o_proj", "down_proj")) else x.reshape(x.shape[0], -1)


def optax_itself(name: str, cfg: OptimizerConfig, steps: int):
    """optax's own optimiser, for arrays by themselves."""
    rate = learning_rate(cfg, steps)

    def matrices(params):
        return {k: "norm" not in k for k in params}

    if name == "adamw":
        return optax.adamw(rate, cfg.b1, cfg.b2, cfg.eps, weight_decay=cfg.weight_decay, mask=matrices)
    if name == "lion":
        return optax.lion(rate, cfg.b1, cfg.b2, weight_decay=cfg.weight_decay, mask=matrices)
    if name == "adafactor":
        return optax.adafactor(
            rate, multiply_by_parameter_scale=False, weight_decay_mask=matrices,
            weight_decay_rate=lambda count: rate(count) * cfg.weight_decay,
        )  # fmt: skip
    muon = optax.contrib.muon(rate, beta=cfg.b1, eps=cfg.eps, weight_decay=cfg.weight_decay, consistent_rms=0.2)
    transforms = {"muon": muon, "adamw": optax_itself("adamw", cfg, steps)}
    return optax.partition(transforms, lambda p: {k: "muon" if is_layers_matrix(k) else "adamw" for k in p})


@pytest.mark.parametrize("name", sorted(DIRECTIONS))
def test_stacked_layers_take_the_steps_that_optax_takes_with_each_by_itself(name):
    shapes, cfg = param_shapes(WIDE), dataclasses.replace(OPTIMIZER, name=name)
    params, gradients = random_like(shapes, 0), [random_like(shapes, i) for i in range(1, 4)]
    found = unstacked(taken(optimizer_of(run(cfg, 3)), params, gradients))

    apart = [{k: as_matrix(k, x) for k, x in unstacked(t).items()} for t in (params, *gradients)]
    if name == "adafactor":  # which takes heads as they are
        apart = [unstacked(t) for t in (params, *gradients)]
    expected = taken(optax_itself(name, cfg, 3), apart[0], apart[1:])
    assert set(found) == set(expected)
    for key, x in expected.items():
        moved = np.abs(np.asarray(x) - apart[0][key]).max()
        assert moved > 1e-3, key
        # Newton-Schulz in another order of sums; the others are the same operations
        atol = 2e-3 * moved if name == "muon" else 2e-6
        np.testing.assert_allclose(found[key].reshape(x.shape), x, rtol=0, atol=atol, err_msg=key)


def test_muon_takes_heads_together_and_layers_apart():
    # The orthogonal factor of each layer's matrix, near enough: Muon's coefficients leave singular values in 0.7..1.2.
    cfg = OptimizerConfig(name="muon", learning_rate=1.0, schedule="constant", weight_decay=0.0, clip_norm=0.0)
    params = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), param_shapes(WIDE))
    gradient = random_like(param_shapes(WIDE), 0)
    found = unstacked(taken(optimizer_of(run(cfg, 1)), params, [gradient]))
    for key, g in unstacked(gradient).items():
        if is_layers_matrix(key):
            u, _, vt = np.linalg.svd(as_matrix(key, g), full_matrices=False)
            step = as_matrix(key, found[key]) / (0.2 * max(as_matrix(key, g).shape) ** 0.5)
            singular = np.diag(u.T @ -step @ vt.T)
            assert singular.min() > 0.6, key
            assert singular.max() < 1.3, key


@pytest.mark.parametrize(
    ("name", "shape"), [*((name, (1, 4, 2)) for name in sorted(DIRECTIONS)), ("adafactor", (2, 2, 2))]
)
def test_a_sharded_state_takes_the_same_steps_and_stays_sharded(name, shape):
    shapes, config = param_shapes(WIDE), run(dataclasses.replace(OPTIMIZER, name=name, clip_norm=0.5), 3)
    params, gradients = random_like(shapes, 0), [random_like(shapes, i) for i in range(1, 4)]
    expected = taken(optimizer_of(config), params, gradients)

    mesh = mesh_of(*shape)
    optimizer = optimizer_of(config, mesh=mesh)
    shardings = state_shardings(WIDE, optimizer, mesh)

    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    rest = (shardings["params"], shardings["opt_state"])
    step = jax.jit(step, in_shardings=(*rest, rest[0]), out_shardings=rest)
    found = jax.device_put(params, rest[0])
    state = jax.jit(optimizer.init, out_shardings=rest[1])(found)
    step = step.lower(found, state, found).compile(FAST_COMPILE)
    for gradient in gradients:
        found, state = step(found, state, jax.device_put(gradient, rest[0]))
    for path, x in jax.tree.leaves_with_path(found):
        want = expected["layers"][path[-1].key] if len(path) == 2 else expected[path[-1].key]
        np.testing.assert_allclose(x, want, rtol=0, atol=2e-5, err_msg=jax.tree_util.keystr(path))
    # What is as large as a matrix is split over fsdp x tensor; vectors and Adafactor's factors over fsdp, those of F,
    # N and V over tensor.
    for path, x in jax.tree.leaves_with_path(state):
        parts = x.size / x.addressable_shards[0].data.size
        where = f"{jax.tree_util.keystr(path)} {x.shape}"
        if x.size > 3 * 256:
            assert parts == shape[1] * shape[2], where
        elif x.size > 3:
            assert parts in (shape[1], shape[2]), where


def test_factors_are_all_that_adafactor_keeps_of_a_matrix_it_factors():
    cfg = OptimizerConfig(name="adafactor")
    state = jax.eval_shape(optimizer_of(run(cfg, 3)).init, param_shapes(WIDE))
    sizes = {jax.tree_util.keystr(p): x.size for p, x in jax.tree.leaves_with_path(state) if "gate_proj" in str(p)}
    assert sorted(sizes.values()) == [3, 3 * 128, 3 * 160]  # a place kept for an unfactored one; rows; columns


def test_an_unknown_optimiser_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"config\.optimizer\.name must be one of adamw, .*muon, found 'sgd'"):
        optimizer_of(run(OptimizerConfig(name="sgd"), 3))

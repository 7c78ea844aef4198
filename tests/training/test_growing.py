"""Growth in a run: the same bits after a kill at any step, and the optimiser state of the grown model by hand."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from solar_jax import train
from solar_jax.config import GrowthConfig, OptimizerConfig
from solar_jax.errors import UserError
from solar_jax.growth.apply import grow, grown_config
from solar_jax.growth.operators import make_layer_map
from solar_jax.model import llama
from solar_jax.model.precision import PRECISIONS
from solar_jax.training import loop
from solar_jax.training.growing import STATES, grown_state, make_phases
from solar_jax.training.optimizer import Rewarm, learning_rate, make_optimizer
from solar_jax.training.partition import make_partition
from solar_jax.training.state import abstract_state, first_opt_state, state_shardings
from solar_jax.training.step import make_train_step
from tests.parallel.test_mesh import mesh_of
from tests.parallel.test_rules import SMALL
from tests.test_train import make_config, metrics
from tests.training.small_run import FAST_COMPILE, config, initial, make_batch

F32 = PRECISIONS["float32"]


class Killed(Exception):
    """Stands for kill -9 at the moment when a step's line is written."""


def killed_at(monkeypatch, line: str):
    def say(text=""):
        if text.startswith(line):
            raise Killed(text)

    monkeypatch.setattr(loop, "say", say)


@pytest.fixture(scope="module")
def grows(tiny, text, tmp_path_factory):
    """A run that grows after step 3 of 6, uninterrupted."""
    config = make_config(tiny, text, growth_at_step=3, growth_rewarm_steps=2, checkpoint_every=1)
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return config, folder, train.run(config, folder)


def test_a_run_that_grows_trains_the_base_until_then_and_the_grown_model_after(grows):
    config, folder, summary = grows
    assert [r[0] for r in metrics(folder / "until_3")] == [1, 2, 3]
    assert [r[0] for r in metrics(folder)] == [4, 5, 6]
    assert [r[4] for r in metrics(folder)] == [8 * 32 * step for step in (4, 5, 6)]
    assert (summary["layers"], summary["base_layers"], summary["tokens"]) == (8, 6, 6 * 8 * 32)
    evals = [json.loads(line) for line in (folder / "evals.jsonl").read_text().splitlines()]
    loss = {(r["arm"], r["step"]): r["loss"] for r in evals}
    assert {("until_3", 0), ("until_3", 3), ("healed", 3), ("healed", 6)} <= loss.keys()
    assert summary["zero_token_loss"] == loss["healed", 3]
    assert abs(loss["healed", 3] - loss["until_3", 3]) > 1e-4  # growth changes the model
    rate = learning_rate(config.optimizer, 6)
    rates = [r[3] / float(rate(r[0] - 1)) for r in metrics(folder)]
    assert rates == pytest.approx([0.5, 1, 1], rel=1e-6)  # warmed up again over two steps


@pytest.mark.parametrize("line", ["until_3 step 2/", "until_3 step 3/", "healed step 4/"])
def test_a_run_killed_around_its_growth_ends_in_the_same_bits(grows, tmp_path, monkeypatch, line):
    config, whole, _ = grows
    with monkeypatch.context() as patch:
        killed_at(patch, line)
        with pytest.raises(Killed):
            train.run(config, tmp_path / "run")
    train.run(config, tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(whole)
    assert metrics(tmp_path / "run/until_3") == metrics(whole / "until_3")
    assert_same_weights(tmp_path / "run", whole)


def test_identity_growth_with_copied_state_gives_the_bits_of_no_growth(tiny, text, tmp_path):
    plain = make_config(tiny, text, growth_operator="identity")
    train.run(plain, tmp_path / "plain")
    growth = dataclasses.replace(plain.growth, at_step=3)
    train.run(dataclasses.replace(plain, growth=growth), tmp_path / "grown")
    assert metrics(tmp_path / "grown/until_3") + metrics(tmp_path / "grown") == metrics(tmp_path / "plain")
    assert_same_weights(tmp_path / "grown", tmp_path / "plain")


def assert_same_weights(a, b):
    assert (a / "hf/model.safetensors").read_bytes() == (b / "hf/model.safetensors").read_bytes()


def test_a_schedule_grows_again_and_again_to_the_composed_map():
    growth = GrowthConfig("stack_last", b=2, at_step=2, schedule=(4, 5))
    run = dataclasses.replace(config(), growth=growth, train=dataclasses.replace(config().train, steps=6))
    phases = make_phases(4, run)
    assert [(p.first, p.last, p.total.layers) for p in phases] == [(0, 2, 4), (2, 4, 6), (4, 5, 8), (5, 6, 10)]
    assert phases[-1].total == make_layer_map(4, growth)
    assert phases[-1].total.source == (0, 1, 2, 3, 2, 3, 2, 3, 2, 3)


@pytest.mark.parametrize(
    ("growth", "said"),
    [
        (GrowthConfig("linear_lesa", every=1, at_step=2), r"at_step=2 .* linear_lesa"),
        (GrowthConfig("zeroed", m=1, inner="normal", at_step=2), r"at_step=2 .* inner=normal"),
        (GrowthConfig("tied", m=1, at_step=2), r"at_step=2 .* tied"),
        (GrowthConfig("dus", m=1, at_step=2, state="fresh"), r"growth\.state must be one of .*, found 'fresh'"),
    ],
)
def test_growth_that_no_run_can_make_in_its_middle_is_refused(growth, said):
    with pytest.raises(UserError, match=said):
        make_phases(4, dataclasses.replace(config(), growth=growth))


SPLIT = GrowthConfig("split", a=0, b=1, alpha=0.25)  # SMALL's layers 0 1 2 -> 0 0 1 2 with scales 1/4, 3/4


def grown_by_hand(kind: str):
    """AdamW's moments before and after growth, with gradients of ones as moments."""
    run, mesh = config(), mesh_of(1, 1, 1)
    optimizer = make_optimizer(run.optimizer, 10, F32)
    layer_map = make_layer_map(3, SPLIT)
    cfg, after = SMALL, grown_config(SMALL, layer_map)
    all_before = make_partition("all", make_layer_map(3, GrowthConfig("identity")))
    all_after = make_partition("all", layer_map)
    state = {"params": initial(False)}
    opt_state = first_opt_state(
        optimizer, all_before, state["params"], state_shardings(cfg, optimizer, mesh, all_before)["opt_state"]
    )
    rng = np.random.default_rng(0)
    opt_state = jax.tree.map(
        lambda x: jnp.array(rng.random(x.shape), x.dtype) if x.ndim else jnp.full_like(x, 7), opt_state
    )
    shardings = state_shardings(after, optimizer, mesh, all_after)
    abstract = abstract_state(after, "float32", optimizer, shardings, all_after)
    phase = make_phases(3, dataclasses.replace(run, growth=dataclasses.replace(SPLIT, at_step=1)))[1]
    before = jax.tree.map(np.asarray, opt_state)
    found = grown_state(state | {"opt_state": opt_state}, abstract, phase, kind, False, all_after, optimizer)
    return before, found


def part(opt_state, kind: type):
    """The part of an optimiser's state that is of a kind."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kind))
    return next(x for x in leaves if isinstance(x, kind))


@pytest.mark.parametrize("kind", STATES)
def test_the_optimiser_state_of_new_layers_is_what_its_name_says(kind):
    before, found = grown_by_hand(kind)
    old, new = part(before, optax.ScaleByAdamState), part(found["opt_state"], optax.ScaleByAdamState)
    scale = {"copied": (1, 1), "scaled": (0.25, 0.75), "zero": (1, 0), "reset": (0, 0)}[kind]
    rest = 0 if kind == "reset" else 1
    for power, name in ((1, "mu"), (2, "nu")):
        x, y = getattr(old, name), getattr(new, name)
        for array in ("q_proj", "mlp_norm", "o_proj", "down_proj"):
            # The scaled projections' own gradients do not change with their scale.
            factors = (1, 1) if kind == "scaled" and array in ("o_proj", "down_proj") else scale
            sources = zip((0, 0, 1, 2), (*factors, rest, rest), strict=True)
            expected = np.stack([x["layers"][array][i] * factor**power for i, factor in sources])
            np.testing.assert_allclose(y["layers"][array], expected, rtol=1e-6, err_msg=array)
        np.testing.assert_array_equal(y["embed"], x["embed"] * rest)
    assert int(new.count) == (0 if kind == "reset" else 7)
    # The rate goes on, whatever becomes of the moments.
    assert int(part(found["opt_state"], optax.ScaleByScheduleState).count) == 7
    np.testing.assert_array_equal(found["params"]["layers"]["o_proj"][1], initial(False)["layers"]["o_proj"][0] * 0.75)


def test_the_rate_rises_again_after_growth_over_the_steps_that_are_asked_for():
    cfg = OptimizerConfig(learning_rate=1.0, schedule="constant")
    rate = learning_rate(cfg, 10, Rewarm((3, 7), 2))
    assert [float(rate(i)) for i in range(10)] == [1, 1, 1, 0.5, 1, 1, 1, 0.5, 1, 1]
    assert [float(learning_rate(cfg, 10, Rewarm((3,), 0))(i)) for i in range(10)] == [1] * 10


def test_new_layers_move_by_their_factor_of_the_learning_rate():
    layer_map = make_layer_map(2, GrowthConfig("slices", slices="0:2,1:2"))
    run, mesh, batch = config(remat="none"), mesh_of(1, 1, 1), jax.tree.map(jnp.array, make_batch(0))
    optimizer = make_optimizer(run.optimizer, 10, F32)
    moves = {}
    for factor in (1.0, 0.25):
        partition = make_partition("all", layer_map, new_rate=factor)
        state = {"params": initial(False), "opt_state": optimizer.init(partition.trained(initial(False)))}
        step = make_train_step(SMALL, run.train, run.data.sequence_length, optimizer, mesh, partition)
        state, _ = step.lower(state, batch).compile(FAST_COMPILE)(state, batch)
        moves[factor] = np.asarray(state["params"]["layers"]["q_proj"] - initial(False)["layers"]["q_proj"])
    np.testing.assert_array_equal(moves[0.25][:2], moves[1.0][:2])
    np.testing.assert_allclose(moves[0.25][2], moves[1.0][2] / 4, atol=6e-8)  # an ulp of the weights
    assert np.abs(moves[1.0][2]).max() > 1e-5


def test_tied_layers_train_as_one_set_of_weights_that_is_visited_twice():
    # Oracle: the loss as a function of the base's own parameters, gathered inside it, with optax alone.
    growth = make_layer_map(2, GrowthConfig("tied", of="blocks", blocks="1:2"))  # 0 1 1
    run, mesh, batch = config(remat="none"), mesh_of(1, 1, 1), jax.tree.map(jnp.array, make_batch(0))
    optimizer = make_optimizer(dataclasses.replace(run.optimizer, eps=1e-12), 10, F32)
    two = initial(False) | {"layers": jax.tree.map(lambda x: x[:2], initial(False)["layers"])}

    def loss(params):
        logits = llama.logits(SMALL, grow(params, growth), batch["tokens"], batch["positions"], batch["segment_ids"])
        taken = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
        return -(taken * batch["weights"]).sum() / batch["weights"].sum()

    @jax.jit
    def by_hand(params, opt_state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value, optax.global_norm(grads)

    partition = make_partition("all", growth)
    state = {"params": grow(two, growth), "opt_state": optimizer.init(grow(two, growth))}
    step = make_train_step(SMALL, run.train, run.data.sequence_length, optimizer, mesh, partition)
    compiled = step.lower(state, batch).compile(FAST_COMPILE)
    expected, opt_state = two, optimizer.init(two)
    for _ in range(3):
        state, measured = compiled(state, batch)
        expected, opt_state, value, norm = by_hand(expected, opt_state)
        assert float(measured["loss"]) == pytest.approx(float(value), abs=2e-6)
        assert float(measured["grad_norm"]) == pytest.approx(float(norm), rel=1e-5)
    q = np.asarray(state["params"]["layers"]["q_proj"])
    np.testing.assert_array_equal(q[1], q[2])
    np.testing.assert_allclose(q, np.asarray(grow(expected, growth)["layers"]["q_proj"]), atol=2e-6)
    assert np.abs(q[1] - np.asarray(two["layers"]["q_proj"][1])).max() > 1e-5


@pytest.mark.parametrize("name", ["new", "seam"])
def test_tied_layers_of_which_some_are_frozen_are_refused(name):
    with pytest.raises(UserError, match=r"tied\(dus\(m=2\)\) shares weights .* found '" + name):
        make_partition(name, make_layer_map(6, GrowthConfig("tied", of="dus", m=2)))

"""One run of a study: the same numbers as `train`, and one program for all rates."""

import dataclasses
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from solar_jax import train
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.tokenizer import eos_id, load_tokenizer
from solar_jax.config import GrowthConfig, MeshConfig, OptimizerConfig
from solar_jax.data.corpus import load_corpus
from solar_jax.errors import Interrupted, UserError
from solar_jax.model.precision import PRECISIONS
from solar_jax.studying import engine
from solar_jax.studying.arms import PlannedRun, plan_arms
from solar_jax.studying.documents import choose_documents
from solar_jax.studying.engine import Bench, StudyPrograms, make_rateless_optimizer, train_arm_of_study
from solar_jax.training.optimizer import DIRECTIONS, SCHEDULES, make_optimizer
from tests.studying.studies import made


@pytest.fixture(scope="module")
def bench(parts):
    study = made(parts)
    c = open_checkpoint(study.run.source)
    tokenizer, eos = load_tokenizer(c), eos_id(c)
    documents = choose_documents(study, tokenizer, eos, c.cfg.vocab_size)
    return Bench(study, c, load_corpus(study.run.data, tokenizer, eos), documents)


@pytest.fixture(scope="module")
def programs():
    return StudyPrograms(tuple(jax.devices()[:1]))


@pytest.fixture(scope="module")
def arms(bench):
    return {arm.name: arm for arm in plan_arms(bench.study, bench.base.cfg)}


def trained(bench, programs, run, stop=None):
    told = []
    result = train_arm_of_study(bench, run, programs, stop or threading.Event(), lambda *a: told.append(a))
    assert [step for step, _ in told] == list(result.steps)
    return result


def test_an_arm_has_the_losses_of_a_run_of_train_with_its_rate_and_seed(bench, programs, arms, tmp_path):
    found = trained(bench, programs, PlannedRun(arms["dus"], 1e-3, 1))
    run = bench.study.run
    config = dataclasses.replace(
        run, seed=1, growth=GrowthConfig("dus", m=1), optimizer=dataclasses.replace(run.optimizer, learning_rate=1e-3),
        mesh=MeshConfig(data=1, fsdp=8), evaluation=dataclasses.replace(run.evaluation, windows=8),
    )  # fmt: skip
    train.run(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    expected = [line["loss"] for line in lines]
    assert found.training == pytest.approx(expected, rel=1e-6)
    other = trained(bench, programs, PlannedRun(arms["dus"], 3e-3, 1))  # a negative control: the rate is taken
    assert other.training[:1] == pytest.approx(expected[:1], rel=1e-6)
    assert abs(other.training[-1] - expected[-1]) > 1e-3


def test_arms_of_one_depth_share_their_programs_whatever_their_rate(bench, arms, monkeypatch):
    compiled, made_of = StudyPrograms(tuple(jax.devices()[:1])), []
    make = engine.make_train_step
    monkeypatch.setattr(engine, "make_train_step", lambda *a: made_of.append(a[0]) or make(*a))
    zero = {}
    for name in ("dus", "block"):
        for rate in (1e-3, 3e-3):
            zero[name, rate] = trained(bench, compiled, PlannedRun(arms[name], rate, 0)).losses[0]
    assert len(made_of) == 1
    assert np.array_equal(zero["dus", 1e-3], zero["dus", 3e-3])
    assert not np.array_equal(zero["dus", 1e-3], zero["block", 1e-3])  # the program is shared, the weights are not
    trained(bench, compiled, PlannedRun(arms["base"], 1e-3, 0))
    assert len(made_of) == 2


def test_all_arms_of_a_seed_see_the_same_rows_and_a_longer_control_goes_on_from_them(
    bench, programs, arms, monkeypatch
):
    seen: dict[str, list[bytes]] = {}
    given = engine.Feed.__call__

    def spy(self, k):
        batch = given(self, k)
        seen[name][k:] = [np.asarray(batch["tokens"]).tobytes()]
        return batch

    monkeypatch.setattr(engine.Feed, "__call__", spy)
    for name, seed in (("dus", 0), ("pro", 0), ("base_flops", 0), ("block", 1)):
        seen[name] = []
        trained(bench, programs, PlannedRun(arms[name], 1e-3, seed))
    assert arms["base_flops"].steps == 6
    assert seen["dus"] == seen["pro"] == seen["base_flops"][:4]
    assert len(set(seen["base_flops"])) == 6
    assert seen["block"] != seen["dus"]


def test_only_the_new_layers_of_such_an_arm_move_and_it_starts_as_the_base(bench, programs, arms):
    pro = trained(bench, programs, PlannedRun(arms["pro"], 3e-3, 0))
    base = trained(bench, programs, PlannedRun(arms["base"], 3e-3, 0))
    assert pro.losses[0] == pytest.approx(base.losses[0], rel=1e-6)
    assert pro.losses[-1].sum() < pro.losses[0].sum()
    assert base.losses[-1].sum() < pro.losses[-1].sum()


def test_a_run_that_diverges_says_at_which_step_and_one_that_is_asked_to_stop_stops(bench, programs, arms):
    with pytest.raises(UserError, match=r"^the loss at step \d of 4 is (nan|inf)"):
        trained(bench, programs, PlannedRun(arms["dus"], 1e30, 0))
    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted, match="goes on from the runs that are complete"):
        trained(bench, programs, PlannedRun(arms["dus"], 1e-3, 0), stop)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("policy", ["float32", "bf16"])
@pytest.mark.parametrize("name", DIRECTIONS)
def test_an_optimiser_whose_rate_is_an_input_is_the_one_that_has_it_built_in(name, schedule, policy):
    if name != "adamw" and (schedule, policy) != ("linear", "float32"):
        return
    cfg = OptimizerConfig(name, learning_rate=3e-2, schedule=schedule, warmup_steps=2)
    rng, dtype = np.random.default_rng(0), jnp.dtype(PRECISIONS[policy].weights)
    params = {"layers": {"up_proj": jnp.array(rng.normal(size=(2, 8, 4)), dtype)}, "final_norm": jnp.ones(8)}
    built_in = make_optimizer(cfg, 6, PRECISIONS[policy], seed=3)
    rateless = make_rateless_optimizer(cfg, 6, PRECISIONS[policy], seed=3, mesh=None)
    states = [built_in.init(params), optax.tree_utils.tree_set(rateless.init(params), peak_rate=jnp.float32(3e-2))]
    both = [params, params]
    for _ in range(6):
        grads = jax.tree.map(lambda x: jnp.array(rng.normal(size=x.shape), x.dtype), params)
        for i, tx in enumerate((built_in, rateless)):
            updates, states[i] = tx.update(grads, states[i], both[i])
            both[i] = optax.apply_updates(both[i], updates)
    # Rounded to bfloat16, a last bit of float32 may turn a few values by one step of theirs.
    close = [np.isclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(*map(jax.tree.leaves, both), strict=True)]
    assert np.mean(np.concatenate([c.ravel() for c in close])) == (
        1 if policy == "float32" else pytest.approx(1, abs=0.05)
    )
    moved = [
        np.abs(np.asarray(a - b, np.float32)).max()
        for a, b in zip(*map(jax.tree.leaves, (both[0], params)), strict=True)
    ]
    assert min(moved) > 1e-3


def test_a_rate_that_was_never_set_trains_nothing_silently():
    tx = make_rateless_optimizer(OptimizerConfig(), 4, PRECISIONS["float32"], seed=0, mesh=None)
    params = {"final_norm": jnp.ones(8)}
    updates, _ = tx.update(params, tx.init(params), params)
    assert np.isnan(np.asarray(updates["final_norm"])).all()

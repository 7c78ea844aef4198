"""Plans of a study: steps of equal FLOPs by hand, choice of rates, and which arms run with every seed."""

import dataclasses

import numpy as np
import pytest

from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.errors import UserError
from solar_jax.model.flops import flops_per_token
from solar_jax.studying.arms import (
    PlannedRun,
    RunResult,
    arms_near_best,
    chosen_rates,
    equal_steps,
    evaluation_steps,
    first_runs,
    plan_arms,
    seed_runs,
)  # fmt: skip
from tests.studying.studies import ARMS, made

VALIDATION, TOKENS = np.array([True, True, True, False]), np.array([1, 1, 1, 1])


@pytest.fixture(scope="module")
def base(parts):
    return open_checkpoint(str(parts / "model")).cfg


def test_the_base_at_equal_flops_takes_as_many_steps_as_fit_by_hand(parts, base):
    planned = {arm.name: arm for arm in plan_arms(made(parts, run_train_steps=100), base)}
    # A layer of TINY has 64 x 24 x 2 x (4 + 2) + 3 x 64 x 96 weights and 4 x 4 x 24 x 16 FLOPs of scores a token.
    layer, head, scores = 64 * 24 * 12 + 3 * 64 * 96, 64 * 320, 4 * 4 * 24 * 16
    four, six = (6 * (n * layer + head) + 3 * n * scores for n in (4, 6))
    assert planned["base"].flops_a_token == four
    assert planned["dus"].flops_a_token == six
    assert planned["base_flops"].steps == round(100 * six / four) == 144
    assert planned["base_flops"].flops == pytest.approx(planned["dus"].flops, rel=0.5 / 144)
    assert planned["base"].steps == planned["dus"].steps == 100
    assert planned["dus"].tokens == 100 * 4 * 32


def test_new_layers_alone_cost_less_than_the_same_model_trained_whole(parts, base):
    planned = {arm.name: arm for arm in plan_arms(made(parts), base)}
    pro = planned["pro"]
    assert pro.layer_map.layers == planned["dus"].layer_map.layers == 6
    assert pro.flops_a_token < 0.7 * planned["dus"].flops_a_token == 0.7 * flops_per_token(pro.cfg, 32)
    assert pro.partition.layers == (False, False, True, False, False, True)
    assert planned["base"].trainable == "all"


def test_the_base_inherits_no_part_that_it_does_not_have(parts, base):
    planned = {arm.name: arm for arm in plan_arms(made(parts, run_train_trainable="seam"), base)}
    assert (planned["base"].trainable, planned["dus"].trainable, planned["pro"].trainable) == ("all", "seam", "new")


def test_without_names_there_is_a_control_for_each_number_of_flops_and_controls_come_first(parts, base):
    arms = (ARMS[0], {"name": "f", "control": "flops"}, *ARMS[2:], {"name": "twice", "operator": "naive"})
    planned = plan_arms(made(parts, arms=arms, run_train_steps=100), base)
    by_name = {arm.name: arm for arm in planned}
    wanted = {equal_steps(by_name[name], by_name["base"].flops_a_token) for name in ("dus", "block", "pro", "twice")}
    controls = [arm for arm in planned if arm.control == "flops"]
    assert {arm.name for arm in controls} == {f"f_{n}" for n in wanted}
    assert len(wanted) == 3
    assert [bool(arm.control) for arm in planned] == [True] * 4 + [False] * 4


def test_two_arms_that_are_the_same_model_are_refused(parts, base):
    # [0, 1, 2] + [1, 2, 3] twice
    same = ({"name": "again", "operator": "block_repeat", "a": 1, "b": 3}, *ARMS)
    with pytest.raises(UserError, match=r"config.arms: again and dus place the same layers and train the same part"):
        plan_arms(made(parts, arms=same), base)
    plan_arms(made(parts, arms=({**same[0], "trainable": "new"}, *ARMS)), base)  # another part: another arm


def test_evaluations_are_at_the_start_the_probe_every_so_many_and_the_end(parts):
    study = made(parts, run_train_steps=10, evaluate_every=4, probe_steps=5)
    assert evaluation_steps(study, 10) == (0, 4, 5, 8, 10)
    assert evaluation_steps(study, 3) == (0, 3)  # a control with fewer steps than the probe
    assert evaluation_steps(dataclasses.replace(study, evaluate_every=0), 10) == (0, 5, 10)


def result(*last: float) -> RunResult:
    """A run with these losses of documents at its end."""
    return RunResult((0, 4), np.array([[9.0] * len(last), last]), (9.0,) * 4)


@pytest.fixture(scope="module")
def planned(parts, base):
    study = made(parts, searched="", rival="")
    return study, {arm.name: arm for arm in plan_arms(study, base)}


def test_the_rate_is_chosen_on_validation_text_and_not_on_test_text(planned):
    study, arms = planned
    runs = {rate: PlannedRun(arms["dus"], rate, 0) for rate in study.rates}
    results = {runs[3e-3]: result(2, 2, 2, 0), runs[1e-3]: result(1, 1, 1, 9)}
    assert chosen_rates(study, list(arms.values()), results, VALIDATION) == {"dus": 1e-3}
    assert chosen_rates(study, list(arms.values()), results, ~VALIDATION) == {"dus": 3e-3}
    assert chosen_rates(study, list(arms.values()), {runs[3e-3]: result(2, 2, 2, 0)}, VALIDATION) == {"dus": 3e-3}


def test_every_seed_is_for_controls_and_for_arms_within_two_errors_of_the_best(planned):
    study, arms = planned
    last = {
        "base": result(9, 9, 9, 0), "dus": result(1, 1, 1, 9),
        # behind by 0.3 +- 0.3: near
        "block": result(1, 1, 1.9, 0),
        # behind by 0.3 +- 0: not near, although its mean is that of block
        "pro": result(1.3, 1.3, 1.3, 0),
    }  # fmt: skip
    results = {PlannedRun(arms[name], 3e-3, 0): found for name, found in last.items()}
    rates = chosen_rates(study, list(arms.values()), results, VALIDATION)
    near = arms_near_best(study, list(arms.values()), results, rates, VALIDATION, TOKENS)
    assert [arm.name for arm in near] == ["base", "dus", "block"]
    runs = seed_runs(study, list(arms.values()), results, VALIDATION, TOKENS)
    assert [(run.arm.name, run.rate, run.seed) for run in runs] == [(n, 3e-3, 1) for n in ("base", "dus", "block")]
    # The two arms of the claim run with every seed, wherever they are.
    claimed = dataclasses.replace(study, searched="pro", rival="dus")
    near = arms_near_best(claimed, list(arms.values()), results, rates, VALIDATION, TOKENS)
    assert [arm.name for arm in near] == ["base", "dus", "block", "pro"]


def test_first_every_arm_runs_at_each_of_its_rates_with_one_seed(parts, base):
    study = made(parts, arms=({**ARMS[0], "rates": (1e-2,)}, *ARMS[1:]))
    runs = [(run.arm.name, run.rate, run.seed) for run in first_runs(study, plan_arms(study, base))]
    assert runs == [
        ("base", 1e-2, 0), *((n, r, 0) for n in ("base_flops", "dus", "block", "pro") for r in (3e-3, 1e-3)),
    ]  # fmt: skip

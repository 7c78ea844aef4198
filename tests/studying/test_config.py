"""Configs of studies: what they refuse, each in one sentence, and that those that are shipped are what they say."""

import pathlib
import runpy

import pytest

from solar_jax.errors import UserError
from solar_jax.growth.operators import OPERATORS
from solar_jax.studying import config as module
from solar_jax.studying.config import is_study, resolve_study
from solar_jax.training.partition import TRAINABLE
from tests.studying.studies import ARMS, content, made

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "study_smollm2.py"
BASE, GROWN = ARMS[0], ARMS[2]

REFUSED = {
    "unknown key": ({"rate": (1.0,)}, "config.rate is not a key of the config"),
    "wrong type": ({"seeds": ("a",)}, "config.seeds must be of type"),
    "key of the run": ({"run_train_stepz": 3}, "config.run.train.stepz is not a key of the config"),
    "value of the run": ({"run_data_holdout_every": 1}, "config.run.data.holdout_every must be at least 2, found 1"),
    "no steps": ({"run_train_steps": 0, "run_train_epochs": 1.0, "probe_steps": 1}, "config.probe_steps=1 must be at"),
    "rows that differ": ({"run_train_max_skipped": 1}, "config.run.train.max_skipped must be 0 in a study"),
    "spikes": ({"run_train_spike": 3.0}, "config.run.train.spike must be 0 in a study"),
    "adapters": ({"run_lora_rank": 2}, "config.run.lora.rank must be 0 in a study, found 2"),
    "no text": ({"run_data_format": "pairs"}, "config.run.data.format must be text in a study, found 'pairs'"),
    "no rates": ({"rates": ()}, "config.rates must hold at least one learning rate"),
    "a rate of 0": ({"rates": (0.0,)}, "config.rates: learning rates must differ and be above 0"),
    "one seed twice": ({"seeds": (1, 1)}, "config.seeds must be different numbers from 0 on, found (1, 1)"),
    "a late probe": ({"probe_steps": 5}, "config.probe_steps=5 must be at most config.run.train.steps=4"),
    "half a claim": ({"searched": ""}, "config.searched and config.rival must be given together"),
    "a claim of none": ({"rival": "other"}, "config.rival must name an arm, found 'other'"),
    "no arms": ({"arms": (), "searched": "", "rival": ""}, "config.arms must hold at least one arm that is no control"),
    "an arm that is none": ({"arms": ("dus",)}, "config.arms[0] must be a dict, found 'dus'"),
}
ARM_REFUSED = {
    "unknown operator": ({"operator": "magic"}, "config.arms[x].operator must be one of dus, naive"),
    "unknown key": ({"operator": "dus", "depth": 3}, "config.arms[x].depth is not a key of an arm; it has control"),
    "wrong type": ({"operator": "dus", "m": "3"}, "config.arms[x].m must be of type int, found '3'"),
    "no growth": ({}, "config.arms[x] does not grow"),
    "a control that grows": ({"operator": "dus", "control": "flops"}, "config.arms[x] is a control of the base"),
    "unknown control": ({"operator": "dus", "control": "none"}, "config.arms[x].control must be one of tokens, flops"),
    "unknown part": ({"operator": "dus", "trainable": "half"}, "config.arms[x].trainable must be one of all, new"),
    "equal to none": ({"control": "flops", "equal_to": ("y",)}, "config.arms[x].equal_to must name arms that grow"),
    "equal, no control": ({"operator": "dus", "equal_to": ("dus",)}, "config.arms[x].equal_to is for control=flops"),
    "a second base": ({"control": "tokens"}, "config.arms must hold one arm with control=tokens"),
    "a slash": ({"name": "a/b", "operator": "dus"}, "config.arms: each needs a name of its own without a slash"),
    "a name twice": ({"name": "dus", "operator": "naive"}, "config.arms: each needs a name of its own"),
    "a bad rate": ({"operator": "dus", "rates": (-1.0,)}, "config.arms[x]: learning rates must differ and be above 0"),
}


def refused(parts, **changes) -> str:
    with pytest.raises(UserError) as e:
        made(parts, **changes)
    assert len(str(e.value).splitlines()) == 1
    return str(e.value)


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_study_that_cannot_be_is_refused_in_a_sentence(parts, mistake):
    changes, said = REFUSED[mistake]
    assert refused(parts, **changes).startswith(said)


@pytest.mark.parametrize("mistake", ARM_REFUSED)
def test_an_arm_that_cannot_be_is_refused_by_name(parts, mistake):
    arm, said = ARM_REFUSED[mistake]
    assert refused(parts, arms=(*ARMS, {"name": "x"} | arm)).startswith(said)


def test_a_study_is_told_from_a_run_and_its_arms_are_typed(parts):
    assert is_study(content(parts))
    assert not is_study(content(parts).run)
    study = made(parts)
    assert [arm.name for arm in study.arms] == [arm["name"] for arm in ARMS]
    assert (study.arms[3].growth.operator, study.arms[3].growth.a, study.arms[3].growth.b) == ("block_repeat", 0, 2)
    assert study.arms[0].growth.operator == "identity"
    assert study.run.train.steps == 4


def test_the_parts_that_arms_may_train_are_those_that_there_are():
    assert ("", *TRAINABLE) == module._TRAINABLE


@pytest.mark.parametrize("size", ["quick", "tiny"])
def test_the_small_shipped_studies_resolve(size):
    study = resolve_study(runpy.run_path(str(CONFIG))["get_config"](size))
    assert study.name == f"study_smollm2_{size}"
    assert {arm.control for arm in study.arms} == {"", "flops", "tied", "tokens"}


def test_the_full_study_has_every_control_and_refuses_an_operator_that_does_not_exist():
    found = runpy.run_path(str(CONFIG))["get_config"]("full")
    arms = {arm["name"]: arm for arm in found.arms}
    assert len(arms) == len(found.arms)
    assert {arm.get("control", "") for arm in found.arms} == {"", "tokens", "flops", "tied"}
    run = found.run
    assert run.train.steps * run.train.batch_size * run.data.sequence_length >= 1e5
    unknown = [arm for arm in found.arms if arm.get("operator", "identity") not in OPERATORS]
    if unknown:
        with pytest.raises(UserError, match=rf"config.arms\[{unknown[0]['name']}\].operator must be one of dus"):
            resolve_study(found)
    else:
        resolve_study(found)


def test_a_size_that_is_none_is_refused():
    with pytest.raises(UserError, match="has the sizes full, core, quick, tiny, found 'huge'"):
        runpy.run_path(str(CONFIG))["get_config"]("huge")

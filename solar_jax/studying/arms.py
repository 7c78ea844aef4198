"""The arms of a study as they are run: steps, FLOPs, and which runs of them are still to come."""

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from solar_jax.config import Config, ModelConfig
from solar_jax.errors import UserError
from solar_jax.growth.apply import grown_config
from solar_jax.growth.operators import LayerMap, make_layer_map
from solar_jax.model.flops import flops_per_token_in_part
from solar_jax.studying.config import ArmConfig, StudyConfig
from solar_jax.studying.statistics import difference_error
from solar_jax.training.partition import Partition, make_partition

NEAR = 2.0  # standard errors behind the best arm within which an arm runs with every seed


@dataclasses.dataclass(frozen=True)
class PlannedArm:
    """An arm on a given base."""

    name: str
    config: ArmConfig
    layer_map: LayerMap
    cfg: ModelConfig  # of the grown model
    partition: Partition
    trainable: str
    steps: int
    step_tokens: int  # B x T
    flops_a_token: float  # of training, forward and backward
    rates: tuple[float, ...]

    @property
    def control(self) -> str:
        return self.config.control

    @property
    def tokens(self) -> int:
        """Tokens that a run of it trains on."""
        return self.steps * self.step_tokens

    @property
    def flops(self) -> float:
        """Training FLOPs of a run of it."""
        return self.tokens * self.flops_a_token

    def flops_at(self, step: int) -> float:
        return step * self.step_tokens * self.flops_a_token

    def run_config(self, run: Config) -> Config:
        """The training config of a run of it, but for the learning rate and the order of the data."""
        train = dataclasses.replace(run.train, steps=self.steps, trainable=self.trainable)
        return dataclasses.replace(run, train=train, growth=self.config.growth)


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One training run."""

    arm: PlannedArm
    rate: float  # peak learning rate
    seed: int  # of the order of the data

    def __str__(self) -> str:
        return f"{self.arm.name}, rate {self.rate:g}, seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class RunResult:
    """Losses of one finished run, by document."""

    steps: tuple[int, ...]  # of the evaluations, from 0 on
    losses: np.ndarray  # [evaluations, N] summed over each document's tokens, nats, float64
    training: tuple[float, ...]  # loss of each step's batch, nats a token
    least_load: tuple[float, ...] = ()  # the smallest share of an expert's tokens in any layer, step by step


Results = Mapping[PlannedRun, RunResult]


def plan_arms(study: StudyConfig, base: ModelConfig) -> tuple[PlannedArm, ...]:
    """Returns the arms on a base, controls first; a control at equal FLOPs once for each number of steps.

    Raises:
      UserError: an operator's numbers do not fit the base, or nothing of an arm would train.
    """
    grown = {arm.name: _planned(study, arm, base) for arm in study.arms if arm.control != "flops"}
    found = [arm for arm in grown.values() if arm.control == "tokens"]
    for arm in study.arms:
        if arm.control != "flops":
            continue
        control = _planned(study, arm, base)
        wanted = [grown[name] for name in arm.equal_to] or [a for a in grown.values() if a.control != "tokens"]
        steps = sorted({equal_steps(one, control.flops_a_token) for one in wanted})
        names = [arm.name] if len(steps) == 1 else [f"{arm.name}_{n}" for n in steps]
        found += [dataclasses.replace(control, name=name, steps=n) for name, n in zip(names, steps, strict=True)]
    _check_differ([arm for arm in grown.values() if arm.control != "tokens"])
    found += [arm for arm in grown.values() if arm.control == "tied"]
    return (*found, *(arm for arm in grown.values() if not arm.control))


def _check_differ(arms: Sequence[PlannedArm]) -> None:
    """Raises a UserError for arms that are the same model trained alike, which would count twice in every table."""
    known: dict[Hashable, str] = {}
    for arm in arms:
        key = (dataclasses.replace(arm.layer_map, operator=""), arm.trainable)
        if (other := known.setdefault(key, arm.name)) != arm.name:
            raise UserError(
                f"config.arms: {other} and {arm.name} place the same layers and train the same part; leave one out."
            )


def equal_steps(arm: PlannedArm, flops_a_token: float) -> int:
    """Steps, at least one, in which a model of so many FLOPs a token spends what an arm does, to the nearest step."""
    return max(1, round(arm.flops / (flops_a_token * arm.step_tokens)))


def _planned(study: StudyConfig, arm: ArmConfig, base: ModelConfig) -> PlannedArm:
    layer_map = make_layer_map(base.num_hidden_layers, arm.growth)
    # The base has no new layers and no seam: unless a control says otherwise, all of it trains.
    inherited = "all" if layer_map.is_identity else study.run.train.trainable
    trainable = arm.trainable or inherited
    partition, cfg = make_partition(trainable, layer_map), grown_config(base, layer_map)
    length = study.run.data.sequence_length
    flops = flops_per_token_in_part(
        cfg, length, trained=partition.layers, first=partition.first, trains_head=partition.trains_head(cfg)
    )
    return PlannedArm(
        name=arm.name, config=arm, layer_map=layer_map, cfg=cfg, partition=partition, trainable=trainable,
        steps=study.run.train.steps, step_tokens=study.run.train.batch_size * length, flops_a_token=flops,
        rates=arm.rates or study.rates,
    )  # fmt: skip


def evaluation_steps(study: StudyConfig, steps: int) -> tuple[int, ...]:
    """Steps after which losses are measured: 0, the probe, every `evaluate_every`, and the last."""
    every = range(0, steps, study.evaluate_every) if study.evaluate_every else ()
    probe = (study.probe_steps,) if study.probe_steps <= steps else ()
    return tuple(sorted({0, steps, *probe, *every}))


def first_runs(study: StudyConfig, arms: Sequence[PlannedArm]) -> list[PlannedRun]:
    """Every arm at each of its rates, with the first seed."""
    return [PlannedRun(arm, rate, study.seeds[0]) for arm in arms for rate in arm.rates]


def chosen_rates(
    study: StudyConfig, arms: Sequence[PlannedArm], results: Results, validation: np.ndarray
) -> dict[str, float]:
    """The rate of each arm with the lowest final loss on validation text at the first seed; failed runs do not count.

    Args:
      study: its config.
      arms: the arms.
      results: what is known.
      validation: [N] bool, the documents of validation text.
    """
    chosen = {}
    for arm in arms:
        runs = [PlannedRun(arm, rate, study.seeds[0]) for rate in arm.rates]
        known = {run.rate: results[run].losses[-1, validation].sum() for run in runs if run in results}
        if known:
            chosen[arm.name] = min(known, key=known.__getitem__)
    return chosen


def arms_near_best(
    study: StudyConfig, arms: Sequence[PlannedArm], results: Results, rates: Mapping[str, float],
    validation: np.ndarray, tokens: np.ndarray,
) -> list[PlannedArm]:  # fmt: skip
    """Arms that run with every seed: controls, arms whose claim the report judges, those near the best that is tested.

    Near is within two standard errors of the paired difference of final losses on validation text at the first seed.

    Args:
      study: its config.
      arms: the arms.
      results: what is known.
      rates: by arm, from `chosen_rates`.
      validation: [N] bool, the documents of validation text.
      tokens: [N] tokens of each document.
    """
    last = {
        arm.name: results[PlannedRun(arm, rates[arm.name], study.seeds[0])].losses[-1, validation]
        for arm in arms
        if arm.name in rates
    }
    tested = [arm.name for arm in arms if not arm.control and arm.name in last]
    if not tested:
        return [arm for arm in arms if arm.control and arm.name in last]
    best = min(tested, key=lambda name: last[name].sum())

    def is_near(name: str) -> bool:
        behind, error = difference_error(last[name], last[best], tokens[validation])
        return name in (best, study.searched, study.rival) or math.isnan(error) or behind <= NEAR * error

    return [arm for arm in arms if arm.name in last and (arm.control or is_near(arm.name))]


def seed_runs(
    study: StudyConfig, arms: Sequence[PlannedArm], results: Results, validation: np.ndarray, tokens: np.ndarray
) -> list[PlannedRun]:
    """Runs of controls and arms near the best with the seeds after the first; arguments as in `arms_near_best`."""
    rates = chosen_rates(study, arms, results, validation)
    near = arms_near_best(study, arms, results, rates, validation, tokens)
    return [PlannedRun(arm, rates[arm.name], seed) for arm in near for seed in study.seeds[1:]]

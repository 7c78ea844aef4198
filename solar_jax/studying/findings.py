"""Findings of a study as numbers: curves, differences to controls, crossings and rank correlations."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from solar_jax.studying.arms import PlannedArm, PlannedRun, Results, RunResult, chosen_rates
from solar_jax.studying.config import StudyConfig
from solar_jax.studying.documents import Documents
from solar_jax.studying.statistics import (
    Interval,
    crossing,
    first_reach,
    paired_difference,
    rank_correlation_interval,
)  # fmt: skip

VERDICTS = {-1: "better", 0: "undecided", 1: "worse"}  # by the side of 0 on which an interval lies


@dataclasses.dataclass(frozen=True)
class MeasuredArm:
    """An arm at its chosen rate."""

    arm: PlannedArm
    rate: float
    runs: Mapping[int, RunResult]  # by seed, in the order of config.seeds

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps of the evaluations, the same for all seeds."""
        return next(iter(self.runs.values())).steps

    @property
    def tokens(self) -> list[int]:
        """Training tokens before each evaluation."""
        return [step * self.arm.step_tokens for step in self.steps]

    @property
    def flops(self) -> list[float]:
        """Training FLOPs before each evaluation."""
        return [self.arm.flops_at(step) for step in self.steps]

    def sums(self, seeds: Sequence[int], mask: np.ndarray, at: int = -1) -> np.ndarray:
        """[S, documents of `mask`] summed losses at an evaluation, nats."""
        return np.stack([self.runs[seed].losses[at, mask] for seed in seeds])

    def curve(self, seeds: Sequence[int], mask: np.ndarray, tokens: np.ndarray) -> list[float]:
        """The loss at every evaluation, in nats a token over the documents of `mask`, averaged over seeds."""
        total = np.mean([self.runs[seed].losses[:, mask].sum(axis=1) for seed in seeds], axis=0)
        return [float(x) for x in total / tokens[mask].sum()]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """An arm against a control, on test text at the end of training."""

    arm: str
    control: str
    seeds: int  # that both have
    difference: Interval  # arm - control, nats a token
    flops_ratio: float  # the control's FLOPs over the arm's
    crossed: float | None  # tokens of the arm from which it stays at or below the control; None: not reached

    @property
    def verdict(self) -> str:
        return VERDICTS[self.difference.side]


@dataclasses.dataclass(frozen=True)
class Lead:
    """The searched arm minus its rival, on test text."""

    before: Interval  # at zero tokens
    after: Interval  # at the end of training
    seeds: int


@dataclasses.dataclass(frozen=True)
class Findings:
    """All that a report says. Losses are of test text, in nats a token."""

    arms: tuple[MeasuredArm, ...]
    base_loss: float  # of the base before any training
    curves: Mapping[str, list[float]]  # by arm, at every evaluation, averaged over its seeds
    probe: Mapping[str, float]  # by arm, after the probe's steps; NaN where it has none
    to_base: Mapping[str, float | None]  # tokens at which an arm that grew reaches the base's loss
    comparisons: tuple[Comparison, ...]
    first_seed: Mapping[str, Mapping[str, float]]  # zero-token, probe, end -> losses of the arms that grew, by arm
    correlations: Mapping[tuple[str, str], Interval]  # between two of those times, over the arms that grew
    lead: Lead | None

    def measured(self, name: str) -> MeasuredArm | None:
        return next((one for one in self.arms if one.arm.name == name), None)


def find(study: StudyConfig, arms: Sequence[PlannedArm], results: Results, documents: Documents) -> Findings:
    """Computes everything that the report says.

    Args:
      study: its config.
      arms: all that were planned; those without a finished run at the first seed are left out.
      results: of finished runs.
      documents: the held-out documents.
    """
    rates = chosen_rates(study, arms, results, documents.validation)
    measured = []
    for arm in (arm for arm in arms if arm.name in rates):
        runs = {seed: PlannedRun(arm, rates[arm.name], seed) for seed in study.seeds}
        found = {seed: results[run] for seed, run in runs.items() if run in results}
        measured.append(MeasuredArm(arm, rates[arm.name], found))
    test, tokens = documents.split("test"), documents.tokens
    curves = {one.arm.name: one.curve(list(one.runs), test, tokens) for one in measured}
    base = next((curves[one.arm.name][0] for one in measured if one.arm.control == "tokens"), math.nan)
    grew = [one for one in measured if one.arm.control in ("", "tied")]
    first_seed = _at_first_seed(study, grew, test, tokens)
    return Findings(
        arms=tuple(measured),
        base_loss=base,
        curves=curves,
        probe={one.arm.name: _at_probe(study, one, curves[one.arm.name]) for one in measured},
        to_base={one.arm.name: first_reach(one.tokens, curves[one.arm.name], base) for one in grew},
        comparisons=tuple(
            _compared(study, one, control, documents) for one in grew for control in _controls(measured, one)
        ),
        first_seed=first_seed,
        correlations=_correlations(study, first_seed),
        lead=_lead(study, measured, documents),
    )


def _at_probe(study: StudyConfig, one: MeasuredArm, curve: Sequence[float]) -> float:
    return curve[one.steps.index(study.probe_steps)] if study.probe_steps in one.steps else math.nan


def _controls(measured: Sequence[MeasuredArm], arm: MeasuredArm) -> list[MeasuredArm]:
    """The controls of an arm; of those at equal FLOPs the one that is nearest to the arm's."""
    found = [one for one in measured if one.arm.control in ("tokens", "tied") and one is not arm]
    equal = [one for one in measured if one.arm.control == "flops"]
    if equal:
        found.append(min(equal, key=lambda one: abs(math.log(one.arm.flops / arm.arm.flops))))
    return sorted(found, key=lambda one: ("tokens", "flops", "tied").index(one.arm.control))


def _compared(study: StudyConfig, one: MeasuredArm, control: MeasuredArm, documents: Documents) -> Comparison:
    test, tokens = documents.split("test"), documents.tokens
    seeds = _common(one, control)
    axes = (one.flops, control.flops) if control.arm.control == "flops" else (one.tokens, control.tokens)
    crossed = crossing(axes[0], one.curve(seeds, test, tokens), axes[1], control.curve(seeds, test, tokens))
    if crossed is not None and control.arm.control == "flops":
        crossed /= one.arm.flops_a_token
    return Comparison(
        arm=one.arm.name,
        control=control.arm.name,
        seeds=len(seeds),
        difference=paired_difference(one.sums(seeds, test), control.sums(seeds, test), tokens[test], study.bootstrap),
        flops_ratio=control.arm.flops / one.arm.flops,
        crossed=crossed,
    )


def _common(one: MeasuredArm, other: MeasuredArm) -> list[int]:
    """Seeds that both have; the first one always is among them."""
    return [seed for seed in one.runs if seed in other.runs]


def _at_first_seed(
    study: StudyConfig, grew: Sequence[MeasuredArm], test: np.ndarray, tokens: np.ndarray
) -> dict[str, dict[str, float]]:
    """Losses at the first seed, which all arms have: means over seeds would differ by the order of the data, too."""
    curves = [(one, one.curve([study.seeds[0]], test, tokens)) for one in grew]
    return {
        "zero-token": {one.arm.name: curve[0] for one, curve in curves},
        "probe": {one.arm.name: _at_probe(study, one, curve) for one, curve in curves},
        "end": {one.arm.name: curve[-1] for one, curve in curves},
    }


def _correlations(study: StudyConfig, losses: Mapping[str, Mapping[str, float]]) -> dict[tuple[str, str], Interval]:
    of = {when: np.array(list(by_arm.values())) for when, by_arm in losses.items()}
    pairs = [("zero-token", "end"), ("probe", "end"), ("zero-token", "probe")]
    return {(a, b): rank_correlation_interval(of[a], of[b], study.bootstrap) for a, b in pairs}


def _lead(study: StudyConfig, measured: Sequence[MeasuredArm], documents: Documents) -> Lead | None:
    by_name = {one.arm.name: one for one in measured}
    if study.searched not in by_name or study.rival not in by_name:
        return None
    ours, theirs, test = by_name[study.searched], by_name[study.rival], documents.split("test")
    seeds, tokens = _common(ours, theirs), documents.tokens[test]

    def difference(seeds: Sequence[int], at: int) -> Interval:
        return paired_difference(ours.sums(seeds, test, at), theirs.sums(seeds, test, at), tokens, study.bootstrap)

    return Lead(difference(seeds[:1], 0), difference(seeds, -1), len(seeds))

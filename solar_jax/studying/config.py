"""The config of a study: what a file `configs/study_*.py` holds, its types and its checks."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import ml_collections

from solar_jax.config import Config, GrowthConfig, resolve
from solar_jax.config_checks import above_0, at_least, not_negative
from solar_jax.config_tree import typed
from solar_jax.errors import UserError
from solar_jax.growth.operators import EXPERT_KEYS, OPERATOR_KEYS, OPERATORS

CONTROLS = ("", "tokens", "flops", "tied")
_TRAINABLE = ("", "all", "new", "seam", "no_embed", "router", "experts")
_GROWTH = {"operator", "slices", *OPERATOR_KEYS, *EXPERT_KEYS}


@dataclasses.dataclass(frozen=True)
class ArmConfig:
    """One arm: a growth, what trains, and how it is compared."""

    name: str = ""
    growth: GrowthConfig = dataclasses.field(default_factory=lambda: GrowthConfig("identity"))
    trainable: str = ""  # a name of training.partition.TRAINABLE; "": that of config.run.train
    control: str = ""  # "": an arm that is tested; tokens, flops: the base; tied: a growth with shared weights
    equal_to: tuple[str, ...] = ()  # flops: arms whose FLOPs it gets, a run for each number of steps; (): all arms
    rates: tuple[float, ...] = ()  # learning rates tried; (): config.rates


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    run: Config = dataclasses.field(
        default_factory=Config
    )  # what all arms share; its growth, learning rate and seed are the arms'
    name: str = ""
    arms: tuple[ArmConfig, ...] = ()
    rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)  # peak learning rates; each arm's is chosen on validation text
    seeds: tuple[int, ...] = (0, 1, 2)  # of the order of the data; all rates run with the first one
    probe_steps: int = 50  # after which losses are measured to rank arms early
    evaluate_every: int = 0  # steps between evaluations; 0: only at the start, at the probe and at the end
    validation_documents: int = 0  # at most so many held-out documents; 0: the half of all
    test_documents: int = 0  # likewise
    document_tokens: int = 0  # of each, from its start; 0: all
    devices_per_arm: int = 0  # arms run side by side on groups of so many devices; 0: one at a time on all
    bootstrap: int = 2000  # samples of every interval
    sunk_tokens: float = 0.0  # tokens that the base was trained on before, stated in the report
    searched: str = ""  # the arm whose lead over `rival` the report judges, before and after healing
    rival: str = ""

    def check(self) -> None:
        """Raises a UserError for values that no study could use."""
        at_least(1, "study", self, "probe_steps", "bootstrap")
        not_negative(
            "study", self, "evaluate_every", "validation_documents", "test_documents", "document_tokens",
            "devices_per_arm", "sunk_tokens",
        )  # fmt: skip
        if not self.name or "/" in self.name:
            raise UserError(f"config.name must be a name without a slash, found {self.name!r}.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise UserError(f"config.seeds must be different numbers from 0 on, found {self.seeds}.")
        for where, rates in (("config.rates", self.rates), *((f"config.arms[{a.name}]", a.rates) for a in self.arms)):
            if any(not 0 < r < math.inf for r in rates) or len(set(rates)) < len(rates):
                raise UserError(f"{where}: learning rates must differ and be above 0, found {rates}.")
        if not self.rates:
            raise UserError("config.rates must hold at least one learning rate, found ().")
        if self.probe_steps > self.run.train.steps:
            raise UserError(
                f"config.probe_steps={self.probe_steps} must be at most config.run.train.steps={self.run.train.steps}."
            )
        self._check_run()
        self._check_arms()

    def _check_run(self) -> None:
        """Raises a UserError for what a run may be but a study's may not."""
        run = self.run
        above_0("run.train", run.train, "steps")
        if run.data.format != "text":
            raise UserError(f"config.run.data.format must be text in a study, found {run.data.format!r}.")
        if run.lora.rank:
            raise UserError(f"config.run.lora.rank must be 0 in a study, found {run.lora.rank}.")
        for key, found in (("max_skipped", run.train.max_skipped), ("spike", run.train.spike)):
            if found:  # arms that leave out different rows would not be compared on the same ones
                raise UserError(f"config.run.train.{key} must be 0 in a study, whose arms see the same rows.")

    def _check_arms(self) -> None:
        names = [arm.name for arm in self.arms]
        for arm in self.arms:
            where = f"config.arms[{arm.name}]"
            if not arm.name or "/" in arm.name or names.count(arm.name) > 1:
                raise UserError(f"config.arms: each needs a name of its own without a slash, found {arm.name!r}.")
            if arm.control not in CONTROLS:
                raise UserError(f"{where}.control must be one of tokens, flops, tied, found {arm.control!r}.")
            if arm.trainable not in _TRAINABLE:
                named = ", ".join(_TRAINABLE[1:])
                raise UserError(f"{where}.trainable must be one of {named}, found {arm.trainable!r}.")
            grows = arm.growth.operator != "identity" or arm.growth.experts > 0
            if arm.control in ("tokens", "flops") and grows:
                raise UserError(f"{where} is a control of the base, but grows by {arm.growth.operator}.")
            if arm.control in ("", "tied") and not grows:
                raise UserError(
                    f"{where} does not grow; it must name an operator or experts, or control=tokens or flops."
                )
            if arm.equal_to and arm.control != "flops":
                raise UserError(f"{where}.equal_to is for control=flops, found control={arm.control!r}.")
            for other in arm.equal_to:
                if not any(o.name == other and o.control in ("", "tied") for o in self.arms):
                    raise UserError(f"{where}.equal_to must name arms that grow, found {other!r}.")
        if not any(not arm.control for arm in self.arms):
            raise UserError("config.arms must hold at least one arm that is no control.")
        if sum(arm.control == "tokens" for arm in self.arms) != 1:
            raise UserError("config.arms must hold one arm with control=tokens, the base at equal tokens.")
        for key in ("searched", "rival"):
            if (name := getattr(self, key)) and name not in names:
                raise UserError(f"config.{key} must name an arm, found {name!r}.")
        if bool(self.searched) != bool(self.rival):
            raise UserError("config.searched and config.rival must be given together.")


def is_study(content: Any) -> bool:
    """True for the content of a config file that describes a study."""
    return "arms" in content


def study_defaults() -> ml_collections.ConfigDict:
    """Every key of a study with its default, for a config file to change."""
    return ml_collections.ConfigDict(dataclasses.asdict(StudyConfig()), convert_dict=True)


def resolve_study(content: ml_collections.ConfigDict) -> StudyConfig:
    """The typed tree of a study's config file.

    Raises:
      UserError: a key is unknown, has another type than its default, or a value cannot be.
    """
    values: dict[str, Any] = content.to_dict()
    run = values.pop("run", None)
    arms = values.pop("arms", ())
    if run is None or not isinstance(arms, (list, tuple)):
        raise UserError("config must hold run, a training config, and arms, a tuple of dicts.")
    study = typed(StudyConfig, values, "config")
    try:
        run = resolve(ml_collections.ConfigDict(run))
    except UserError as e:
        raise UserError(re.sub(r"\bconfig\.", "config.run.", str(e))) from None
    study = dataclasses.replace(study, run=run, arms=tuple(_arm(arm, i) for i, arm in enumerate(arms)))
    study.check()
    return study


def _arm(entry: Any, index: int) -> ArmConfig:
    """An arm from its flat dict, in which the keys of its growth stand beside its own."""
    if not isinstance(entry, Mapping):
        raise UserError(f"config.arms[{index}] must be a dict, found {entry!r}.")
    where = f"config.arms[{entry.get('name', index)}]"
    operator = entry.get("operator", "identity")
    if operator not in OPERATORS:
        raise UserError(f"{where}.operator must be one of {', '.join(OPERATORS)}, found {operator!r}.")
    own = {field.name for field in dataclasses.fields(ArmConfig)} - {"growth"}
    for key in entry:
        if key not in own | _GROWTH:
            raise UserError(
                f"{where}.{key} is not a key of an arm; it has {', '.join(sorted(own))}, and those of growth: "
                f"{', '.join(sorted(_GROWTH))}."
            )
    growth = {"operator": operator} | {key: value for key, value in entry.items() if key in _GROWTH}
    arm = typed(ArmConfig, {key: value for key, value in entry.items() if key in own}, where)
    return dataclasses.replace(arm, growth=typed(GrowthConfig, growth, where))

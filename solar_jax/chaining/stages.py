"""The stages of a chain: training configs that start from each other's results, and merges of them."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from solar_jax.cli.config_files import load_config
from solar_jax.config import Config, EvaluationConfig
from solar_jax.errors import UserError

_CHAIN = ("name", "stages", "measures")
_TASKS = ("tasks", "task_limit", "task_data", "task_path")  # optional, as in a run's config.evaluation
_TRAIN = ("name", "config", "start", "changes", "tokens")
_MERGE = ("name", "models", "candidates", "eval_config", "reference")


@dataclasses.dataclass(frozen=True)
class TrainStage:
    """A stage that trains."""

    name: str  # also of its folder
    config: str  # as `train --config` takes it
    start: str = ""  # the stage whose result is its source; "": the config's own source
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # values by key without `config.`
    tokens: float = 0.0  # training tokens, for plans, where the config counts epochs

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.start,) if self.start else ()

    def resolved(self, workdir: pathlib.Path) -> Config:
        """The config that is run: what one could run alone, but for its source."""
        source = {"source": str(workdir / self.start)} if self.start else {}
        return load_config(self.config, {**self.changes, **source})

    def stated(self) -> dict[str, Any]:
        return {"config": self.config, "start": self.start, "changes": dict(self.changes)}


@dataclasses.dataclass(frozen=True)
class MergeStage:
    """A stage that merges two results in several ways and writes the best."""

    name: str
    models: tuple[str, str]  # stages
    candidates: str  # as `merge --candidates` takes it
    eval_config: str  # whose held-out rows measure the candidates
    reference: str  # the stage whose result is the reference of held-out pairs

    @property
    def inputs(self) -> tuple[str, ...]:
        return (*self.models, self.reference)

    def stated(self) -> dict[str, Any]:
        return {"models": list(self.models), "candidates": self.candidates, "eval_config": self.eval_config,
                "reference": self.reference}  # fmt: skip


Stage = TrainStage | MergeStage


@dataclasses.dataclass(frozen=True)
class Chain:
    """Stages in the order that they run."""

    name: str
    stages: tuple[Stage, ...]
    measures: tuple[str, ...]  # configs whose held-out rows measure every stage's result
    evaluation: EvaluationConfig = dataclasses.field(
        default_factory=EvaluationConfig
    )  # lm-eval's tasks that measure them, too

    def after(self, names: Sequence[str]) -> list[Stage]:
        """The named stages and those that use their results, directly or not."""
        found: list[Stage] = []
        for stage in self.stages:
            if stage.name in names or any(one.name in stage.inputs for one in found):
                found.append(stage)
        return found


def is_chain(content: Any) -> bool:
    """True for the content of a config file that describes a chain."""
    return "stages" in content


def resolve_chain(content: Mapping[str, Any]) -> Chain:
    """Checks the content of a chain's config file, and every config that it names.

    Raises:
      UserError: a key is unknown or missing, or a stage starts from one that is not before it.
    """
    _check_keys(content, (*_CHAIN, *_TASKS), _CHAIN, "the chain")
    stages: list[Stage] = []
    for entry in content["stages"]:
        where = f"stage {entry.get('name')!r}"
        merges = "models" in entry
        _check_keys(entry, _MERGE if merges else _TRAIN, _MERGE if merges else ("name", "config"), where)
        known = [stage.name for stage in stages]
        if entry["name"] in known or "/" in str(entry["name"]):
            raise UserError(f"{where}: a stage needs a name of its own, and no slash.")
        stage = MergeStage(**dict(entry) | {"models": tuple(entry["models"])}) if merges else TrainStage(**entry)
        for name in stage.inputs:
            if name not in known:
                raise UserError(f"{where}: must start from one of the stages before it ({known}), found {name!r}.")
        if isinstance(stage, TrainStage):
            stage.resolved(pathlib.Path("."))
        else:
            load_config(stage.eval_config)
        stages.append(stage)
    if not stages:
        raise UserError("the chain has no stages.")
    for config in content["measures"]:
        load_config(config)
    given: dict[str, Any] = {key: content[key] for key in _TASKS if key in content}
    if isinstance(tasks := given.get("tasks", ()), str):
        raise UserError(f"the chain: tasks must be a list of names, found {tasks!r}.")
    given["tasks"] = tuple(tasks)
    evaluation = EvaluationConfig(**given)
    evaluation.check()
    return Chain(content["name"], tuple(stages), tuple(content["measures"]), evaluation)


def _check_keys(entry: Mapping[str, Any], known: Sequence[str], needed: Sequence[str], where: str) -> None:
    for key in entry:
        if key not in known:
            raise UserError(f"{where}: the key {key!r} is unknown; keys are {', '.join(known)}.")
    for key in needed:
        if key not in entry:
            raise UserError(f"{where}: {key} is missing.")

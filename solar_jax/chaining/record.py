"""chain.json: what the stages of a chain's folder were made from, and their measures."""

import json
import pathlib
import shutil
from typing import Any

from solar_jax.chaining.stages import Chain, MergeStage, Stage, TrainStage
from solar_jax.checkpoints import lineage
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.errors import UserError
from solar_jax.parallel import processes
from solar_jax.storage.json_files import read_json, write_json
from solar_jax.training import run_folder

FILE = "chain.json"
Measured = dict[str, dict[str, float]]  # by config: measures by name


class Record:
    """The content of chain.json, kept by every process and written by the first at each change."""

    def __init__(self, workdir: pathlib.Path):
        self.workdir = workdir
        self._stages: dict[str, dict[str, Any]] = (read_json(workdir / FILE) or {}).get("stages", {})

    def check(self, chain: Chain) -> None:
        """Raises a UserError if a stage was begun with other settings, naming the difference."""
        for stage in chain.stages:
            again = f"--rerun={stage.name} runs it again, and those after it"
            before = self._stages.get(stage.name, {}).get("stage", stage.stated())
            for key, value in stage.stated().items():
                if before.get(key) != value:
                    raise UserError(
                        f"{self.workdir / stage.name}: was begun with {key} {before.get(key)!r}, now it is {value!r}; "
                        f"{again}."
                    )
            if isinstance(stage, TrainStage):
                try:
                    run_folder.check_owner(self.workdir / stage.name, stage.resolved(self.workdir))
                except UserError as e:
                    raise UserError(f"{str(e).partition('; give another')[0].rstrip('.')}; {again}.") from e

    def check_inputs(self, stage: Stage) -> None:
        """Raises a UserError if what a begun stage started from is not what it began with."""
        known = self._stages.get(stage.name, {}).get("inputs", {})
        for name, found in self._inputs(stage).items():
            if known.get(name, found) != found:
                raise UserError(
                    f"{self.workdir / name}: has changed since {stage.name} began from it; --rerun={stage.name} runs "
                    "that again, and those after it."
                )

    def _inputs(self, stage: Stage) -> dict[str, str]:
        """Hashes of the results that a stage starts from, by stage."""
        found = {}
        for name in dict.fromkeys(stage.inputs):
            files = lineage.fingerprint(open_checkpoint(str(self.workdir / name)))
            found[name] = json.dumps(files["files"], sort_keys=True)
        return found

    def begin(self, stage: Stage) -> None:
        entry = self._stages.setdefault(stage.name, {})
        entry |= {"stage": stage.stated(), "inputs": self._inputs(stage)}
        self._write()

    def measured(self, name: str) -> Measured | None:
        return self._stages.get(name, {}).get("measured")

    def scores(self, name: str) -> dict[str, float] | None:
        """Scores of tasks."""
        return self._stages.get(name, {}).get("scores")

    def add(self, name: str, **more: Any) -> None:
        """Adds to a stage's entry."""
        self._stages.setdefault(name, {}).update(more)
        self._write()

    def summary(self, name: str) -> dict[str, Any] | None:
        """A finished run's summary; None for a merge, and before the run ends."""
        return read_json(self.workdir / name / "summary.json")

    def is_done(self, stage: Stage) -> bool:
        """True if a stage's result is there."""
        folder = self.workdir / stage.name
        return (folder / ("config.json" if isinstance(stage, MergeStage) else "summary.json")).exists()

    def forget(self, stage: Stage) -> None:
        """Deletes a stage's folder and record."""
        if processes.is_first():
            shutil.rmtree(self.workdir / stage.name, ignore_errors=True)
        self._stages.pop(stage.name, None)
        self._write()

    def _write(self) -> None:
        if not processes.is_first():
            return
        self.workdir.mkdir(parents=True, exist_ok=True)
        write_json(self.workdir / FILE, {"stages": self._stages})

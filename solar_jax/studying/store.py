"""A study's folder: one JSON file for each finished or failed run, and what all of them share."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from solar_jax.config import Config
from solar_jax.errors import UserError
from solar_jax.storage.json_files import read_json, read_json_object, write_json
from solar_jax.studying.arms import PlannedArm, PlannedRun, RunResult
from solar_jax.studying.config import StudyConfig
from solar_jax.studying.documents import Documents
from solar_jax.training.run_folder import config_dict, flat

SHARED = "study.json"
_RUN_KEYS = ("source", "data", "train", "optimizer", "seed")  # of config.run, on which results depend
_NOT = ("workers",)  # keys of those groups on which they do not
_STUDY_KEYS = ("probe_steps", "evaluate_every", "document_tokens", "validation_documents", "test_documents")


class StudyFolder:
    """Reads and writes a study's folder; every file appears complete or not at all.

    study.json       what all results depend on; a study of other numbers is refused
    runs/ARM/RATE_SEED.json         losses of a finished run
    runs/ARM/RATE_SEED.failed.json  the sentence that a run failed with; it is tried again at the next start
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def open(self, study: StudyConfig, documents: Documents, text: dict[str, Any]) -> None:
        """Creates the folder, or checks that its results belong to this study.

        Args:
          study: its config; arms, rates and seeds may be added to those that have run.
          documents: the held-out ones.
          text: hashes of tokenizer and training rows.

        Raises:
          UserError: the folder holds results of other numbers, or something else.
        """
        shared = {"config": shared_config(study), "documents": documents.fingerprint, "text": text}
        before = read_json(self.folder / SHARED)
        if before is None:
            if self.folder.exists() and any(self.folder.iterdir()):
                raise UserError(f"{self.folder}: holds files but no {SHARED}, so it is no study's folder.")
            (self.folder / "runs").mkdir(parents=True, exist_ok=True)
            write_json(self.folder / SHARED, shared)
            return
        if before != shared:
            old, new = flat(before, ""), flat(shared, "")
            key = next(k for k in (*new, *old) if old.get(k) != new.get(k))
            raise UserError(
                f"{self.folder}: its results are of another study: {key[1:]} was {old.get(key)!r} and is "
                f"{new.get(key)!r} now; give this one a --workdir of its own."
            )

    def result(self, run: PlannedRun) -> RunResult | None:
        """The losses of a finished run; None if it has not finished.

        Raises:
          UserError: the run of this name was of another arm.
        """
        file = self._file(run)
        if not file.exists():
            return None
        found = read_json_object(file)
        if (stated := arm_record(run.arm)) != found["arm"]:
            key = next(k for k in {**stated, **found["arm"]} if stated.get(k) != found["arm"].get(k))
            raise UserError(
                f"{file}: is of an arm {run.arm.name} whose {key} was {found['arm'].get(key)!r} and is "
                f"{stated.get(key)!r} now; name the new arm otherwise, or delete that file to run it again."
            )
        losses = np.array([one["losses"] for one in found["evaluations"]], np.float64)
        steps = tuple(one["step"] for one in found["evaluations"])
        return RunResult(steps, losses, tuple(found["training"]), tuple(found.get("least_load", ())))

    def save(self, run: PlannedRun, result: RunResult, seconds: float) -> None:
        file = self._file(run)
        file.parent.mkdir(parents=True, exist_ok=True)
        evaluations = [
            {"step": step, "losses": losses.tolist()} for step, losses in zip(result.steps, result.losses, strict=True)
        ]
        write_json(
            file,
            {
                "arm": arm_record(run.arm), "rate": run.rate, "seed": run.seed, "seconds": seconds,
                "evaluations": evaluations, "training": list(result.training),
                **({"least_load": list(result.least_load)} if result.least_load else {}),
            },
        )  # fmt: skip
        self._failed(run).unlink(missing_ok=True)

    def fail(self, run: PlannedRun, sentence: str) -> None:
        file = self._failed(run)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"arm": arm_record(run.arm), "rate": run.rate, "seed": run.seed, "failed": sentence})

    def failure(self, run: PlannedRun) -> str | None:
        """The sentence that a run failed with, if it did and has not been run since."""
        found = read_json(self._failed(run))
        return None if found is None else found["failed"]

    def _file(self, run: PlannedRun) -> pathlib.Path:
        return self.folder / "runs" / run.arm.name / f"{run.rate!r}_{run.seed}.json"

    def _failed(self, run: PlannedRun) -> pathlib.Path:
        return self._file(run).with_suffix(".failed.json")


def arm_record(arm: PlannedArm) -> dict[str, Any]:
    """Settings of one arm on which its results depend, as JSON holds them."""
    stated = dataclasses.asdict(arm.layer_map) | {"trainable": arm.trainable, "steps": arm.steps}
    if arm.layer_map.experts is None:  # as it was before there were experts
        stated.pop("experts")
    return json.loads(json.dumps(stated))


def shared_config(study: StudyConfig) -> dict[str, Any]:
    """Settings of a study on which the results of all its arms depend."""
    run: Config = study.run
    kept = {key: value for key, value in config_dict(run).items() if key in _RUN_KEYS}
    for group in ("data", "train", "optimizer"):
        kept[group] = {key: value for key, value in kept[group].items() if key not in _NOT}
    kept["optimizer"].pop("learning_rate")
    return {"run": kept} | {key: getattr(study, key) for key in _STUDY_KEYS}

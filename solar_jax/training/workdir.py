"""A run's folder: whose it is, what is in it, and whether to begin, go on or stop."""

import dataclasses
import pathlib
from typing import Any

import ml_collections

from solar_jax import lineage
from solar_jax.config import Config, resolve
from solar_jax.errors import UserError
from solar_jax.growth.plan import GrowthPlan
from solar_jax.hf.files import LINEAGE, read_json
from solar_jax.hf.folders import new_folder
from solar_jax.hf.reader import Checkpoint
from solar_jax.hf.writer import write_companions
from solar_jax.training.checkpoint import MODEL_FOLDER
from solar_jax.training.metrics import write_json


def flat(tree: dict[str, Any], prefix: str = "config") -> dict[str, Any]:
    """{"config.train.steps": 12, ...} of a nested dict."""
    out = {}
    for key, value in tree.items():
        path = f"{prefix}.{key}"
        out |= flat(value, path) if isinstance(value, dict) else {path: value}
    return out


def config_dict(config: Config) -> dict[str, Any]:
    """The resolved config as JSON holds it."""
    as_json = dataclasses.asdict(config)
    as_json["data"]["sources"] = list(as_json["data"]["sources"])
    return as_json


def _may_change(key: str) -> bool:
    """Whether a key may be another after a restart."""
    return key.startswith("config.logging.") or key == "config.data.workers"


def check_owner(workdir: pathlib.Path, config: Config) -> bool:
    """Whether `workdir` already holds this run.

    Raises:
      UserError: it holds another run, or other files.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"{workdir}: must be a folder, found a file.")
    if not workdir.exists() or not any(workdir.iterdir()):
        return False
    if not (workdir / "config.json").exists():
        raise UserError(f"{workdir}: holds files but no run (no config.json); give another --workdir.")
    try:  # read by today's names and defaults
        there = flat(config_dict(resolve(ml_collections.ConfigDict(read_json(workdir / "config.json")))))
    except UserError as e:
        raise UserError(f"{workdir / 'config.json'}: {e}") from e
    here = flat(config_dict(config))
    changed = [key for key in sorted(here | there) if here.get(key) != there.get(key) and not _may_change(key)]
    if changed:
        key, more = changed[0], f" (and {len(changed) - 1} more keys)" if len(changed) > 1 else ""
        raise UserError(
            f"{workdir}: holds another run, whose {key} is {there.get(key)!r} where this one's is "
            f"{here.get(key)!r}{more}; give another --workdir."
        )
    return True


def create(
    workdir: pathlib.Path, config: Config, checkpoint: Checkpoint, plan: GrowthPlan, hf_config: dict[str, Any]
) -> None:
    """Makes the folder with config.json and `model/`, what its checkpoints need to become a model again."""
    with new_folder(workdir) as folder:
        write_json(folder / "config.json", config_dict(config))
        (folder / MODEL_FOLDER).mkdir()
        write_companions(folder / MODEL_FOLDER, hf_config, checkpoint.companions)
        lineage.write(folder / MODEL_FOLDER, lineage.record(checkpoint, plan, "train", name=config.name), LINEAGE)

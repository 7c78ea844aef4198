"""A compiled training step on disk: made for a slice before it is rented, loaded where the run starts.

`plan --save` writes it and `config.train.compiled` names it. The folder holds `program.bin`, the executable as jax
serialises it (a pickle: load only your own), and `program.json`, all that it depends on.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import serialize_executable

from solar_jax.config import Config, ModelConfig
from solar_jax.errors import UserError, phrase
from solar_jax.hardware.versions import COMPILERS, installed_versions
from solar_jax.storage.json_files import read_json_object, write_json
from solar_jax.storage.paths import attempt, is_local, path, write_file
from solar_jax.training.run_folder import as_json, config_dict, flat

PROGRAM, RECORD = "program.bin", "program.json"
# Keys of the config, and groups of them, on which the step depends; and keys of these groups on which it does not.
_USED = (
    "train", "optimizer", "lora", "preferences", "seed", "data.sequence_length", "data.format", "growth.at_step",
    "growth.schedule", "growth.rewarm_steps", "growth.new_rate",
)  # fmt: skip
_NOT = ("train.compiled", "train.control", "train.epochs", "preferences.cache")
_OPEN = {"remat": "auto", "accumulation": 0}  # keys of config.train that a saved program fills, and when


def _machine(devices: Sequence[jax.Device]) -> dict[str, dict[str, Any]]:
    """Returns the devices that are compiled for, and versions of what compiles."""
    kind = devices[0].platform
    foreign = [part for part, of in (("libtpu", "tpu"), ("cuda", "gpu")) if kind != of]
    versions = installed_versions([name for name in COMPILERS if not any(part in name for part in foreign)])
    if kind == "cpu":  # code is made for its instruction set
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
        versions["cpu"] = hashlib.sha256(features.encode()).hexdigest()[:12]
    hosts = len({d.process_index for d in devices})
    return {"devices": {"kind": devices[0].device_kind, "count": len(devices), "hosts": hosts}, "versions": versions}


def _record(cfg: ModelConfig, config: Config, mesh: jax.sharding.Mesh) -> dict[str, dict[str, Any]]:
    """Returns all that a step depends on: devices, versions, mesh, model and config, as JSON holds them."""
    devices = list(mesh.devices.flat)
    keys = {key.removeprefix("config."): value for key, value in flat(config_dict(config)).items()}
    used = {k: v for k, v in keys.items() if (k in _USED or k.split(".")[0] in _USED) and k not in _NOT}
    return _machine(devices) | {
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1} | {"order": [d.id for d in devices]},
        "model": as_json(dataclasses.asdict(cfg)),
        "config": used,
    }


def _digest(lowered: jax.stages.Lowered) -> str:
    return hashlib.sha256(lowered.as_text().encode()).hexdigest()


def save_program(
    folder: pathlib.Path, cfg: ModelConfig, config: Config, mesh: jax.sharding.Mesh, lowered: jax.stages.Lowered,
    compiled: jax.stages.Compiled,
) -> int:  # fmt: skip
    """Writes a compiled step; in a folder that holds one, it is replaced.

    Args:
      folder: local, or in a bucket.
      cfg: the grown model.
      config: the run, with nothing left open.
      mesh: that the step was compiled for.
      lowered: the step before compilation.
      compiled: the step.

    Returns:
      The program's size in bytes.
    """
    payload, _, _ = serialize_executable.serialize(compiled)
    if is_local(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).unlink(missing_ok=True)  # a kill between the two files leaves no record of another program
    write_file(folder / PROGRAM, payload)
    more = {"hlo": _digest(lowered), "program": hashlib.sha256(payload).hexdigest()}
    write_json(folder / RECORD, _record(cfg, config, mesh) | {"sums": more})
    return len(payload)


@dataclasses.dataclass(frozen=True)
class SavedProgram:
    """A saved step: its folder, and what it depends on."""

    folder: pathlib.Path
    record: dict[str, Any]

    @property
    def _where(self) -> str:
        return f"config.train.compiled={self.folder}"

    def check_machine(self) -> None:
        """Raises a UserError that names what the step was compiled for, if it is not what this machine has."""
        self._compare(_machine(jax.devices()))

    def filled(self, config: Config) -> Config:
        """Returns a config with mesh, remat policy and microbatches taken from here, where it leaves them open."""
        saved, axes = self.record["config"], dataclasses.asdict(config.mesh)
        train = {
            k: saved.get(f"train.{k}", is_open) for k, is_open in _OPEN.items() if getattr(config.train, k) == is_open
        }
        if not any(axes.values()):
            axes |= {axis: self.record["mesh"].get(axis, 1) for axis in axes if axis != "slice"}
        return dataclasses.replace(
            config, train=dataclasses.replace(config.train, **train), mesh=dataclasses.replace(config.mesh, **axes)
        )

    def check(self, cfg: ModelConfig, config: Config, mesh: jax.sharding.Mesh) -> None:
        """Raises a UserError that names what the step was compiled for and what this run has, if they differ.

        Args:
          cfg: the grown model of the run.
          config: the run, with nothing left open.
          mesh: of the run.
        """
        self._compare(_record(cfg, config, mesh))

    def _compare(self, record: dict[str, dict[str, Any]]) -> None:
        for group, here in record.items():
            there = self.record[group]
            for key in here | there:
                if there.get(key) != here.get(key):
                    name = f"config.{key}" if group == "config" else f"{group}: {key}"
                    raise UserError(
                        f"{self._where}: the step was compiled for {name}={_shown(there.get(key))}, found "
                        f"{_shown(here.get(key))}; compile it again with `plan --save`, or leave config.train.compiled "
                        "empty."
                    )

    def load(self, lowered: jax.stages.Lowered, mesh: jax.sharding.Mesh) -> jax.stages.Compiled:
        """Loads the step onto the devices of a mesh; `lowered` is the run's own step before compilation.

        Raises:
          UserError: it is of another step, damaged, or these devices do not load it.
        """
        if self.record["sums"].get("hlo") != _digest(lowered):
            raise UserError(
                f"{self._where}: the step was compiled from another program, as another version of solar_jax makes; "
                "compile it again with `plan --save`, or leave config.train.compiled empty."
            )
        file = self.folder / PROGRAM
        payload = attempt(file, lambda: file.read_bytes() if file.exists() else b"")
        if hashlib.sha256(payload).hexdigest() != self.record["sums"].get("program"):
            raise UserError(f"{file}: its SHA-256 is not that in {RECORD}; compile it again with `plan --save`.")
        in_tree, devices = jax.tree.structure(lowered.args_info), tuple(mesh.devices.flat)
        try:
            return serialize_executable.deserialize_and_load(
                payload, in_tree, lowered.out_tree, execution_devices=devices
            )
        except Exception as e:  # of many types, by platform
            raise UserError(f"{self._where}: these devices do not load the program ({phrase(e)}).") from e


def open_program(folder: str) -> SavedProgram | None:
    """Reads what the saved step in a folder depends on; None for "".

    Raises:
      UserError: the folder holds no saved step.
    """
    if not folder:
        return None
    place = path(folder)
    if not attempt(place, lambda: (place / RECORD).exists()):
        raise UserError(
            f"config.train.compiled={folder}: holds no compiled step (no {RECORD}); `plan --save` writes one."
        )
    found = read_json_object(place / RECORD)
    groups = ("versions", "devices", "mesh", "model", "config", "sums")
    if any(not isinstance(found.get(group), dict) for group in groups):
        raise UserError(f"{place / RECORD}: expected the groups {', '.join(groups)}, found {', '.join(found)}.")
    return SavedProgram(place, found)


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:60]}..."

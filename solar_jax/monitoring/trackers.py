"""Metrics export to TensorBoard and Weights & Biases, from the first process."""

import hashlib
import importlib
import importlib.util
import pathlib
from typing import Any

from solar_jax.config import LoggingConfig
from solar_jax.errors import UserError
from solar_jax.parallel import processes

# config key -> (required module, install command)
PACKAGES = {
    "tensorboard": ("tensorboardX", "pip install tensorboardX"),
    "wandb_project": ("wandb", "pip install wandb"),
}
_FLUSH_SECONDS = 10


def check_packages(cfg: LoggingConfig) -> None:
    """Raises a UserError if the config needs a package that is not installed."""
    for key, (module, install) in PACKAGES.items():
        if getattr(cfg, key) and importlib.util.find_spec(module) is None:
            raise UserError(
                f"config.logging.{key}={getattr(cfg, key)!r} needs the package {module}, which is not installed; "
                f"run `{install}`."
            )


class Writers:
    """Scalars by arm and step. A resumed run continues its own curves: repeated steps replace the earlier values."""

    def __init__(self, cfg: LoggingConfig, workdir: pathlib.Path, name: str, first_start: float, config: Any):
        """Opens the writers; `first_start`, in Unix seconds, distinguishes runs of one name; `config` is its JSON.

        Raises:
          UserError: Weights & Biases fails to start.
        """
        self._tensorboard = workdir / "tensorboard" if cfg.tensorboard and processes.is_first() else None
        self._events: dict[str, Any] = {}  # arm -> its TensorBoard writer
        self._wandb: Any = None
        if cfg.wandb_project and processes.is_first():
            self._wandb = self._start_wandb(cfg.wandb_project, workdir, name, first_start, config)

    def write(self, arm: str, step: int, values: dict[str, float | None]) -> None:
        """Writes one step's values, skipping those that are None."""
        known = {key: value for key, value in values.items() if value is not None}
        if self._tensorboard is not None:
            if arm not in self._events:
                # Purges an earlier session's events from this step on. Its file, named by the second, stays.
                self._events[arm] = importlib.import_module("tensorboardX").SummaryWriter(
                    str(self._tensorboard / arm), purge_step=step, flush_secs=_FLUSH_SECONDS, filename_suffix=f".{step}"
                )
            for key, value in known.items():
                self._events[arm].add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log({f"{arm}/{key}": value for key, value in known.items()} | {f"{arm}/step": step})

    def close(self) -> None:
        for writer in self._events.values():
            writer.close()
        if self._wandb is not None:
            self._wandb.finish()

    @staticmethod
    def _start_wandb(project: str, workdir: pathlib.Path, name: str, first_start: float, config: Any) -> Any:
        wandb = importlib.import_module("wandb")
        run_id = hashlib.sha256(f"{workdir.resolve()} {first_start}".encode()).hexdigest()[:16]
        try:
            run = wandb.init(
                project=project, name=name, id=run_id, resume="allow", dir=str(workdir), config=config
            )  # fmt: skip
        except Exception as e:  # wandb's own exception types: no login, no network
            raise UserError(
                f"config.logging.wandb_project={project!r}: Weights & Biases did not start: {' '.join(str(e).split())}"
            ) from e
        # Each arm counts its own steps, and a resumed arm repeats some, which W&B's own step counter rejects.
        for arm in ("healed", "control"):
            run.define_metric(f"{arm}/*", step_metric=f"{arm}/step")
        return run

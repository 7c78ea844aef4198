"""The metrics once more, for TensorBoard and for Weights & Biases; the first process writes."""

import hashlib
import importlib
import importlib.util
import pathlib
from typing import Any

from solar_jax.config import LoggingConfig
from solar_jax.errors import UserError
from solar_jax.parallel import processes

# config key -> (the module that it needs, what installs it)
PACKAGES = {
    "tensorboard": ("tensorboardX", "pip install tensorboardX"),
    "wandb_project": ("wandb", "pip install wandb"),
}
_FLUSH_SECONDS = 10


def check_packages(cfg: LoggingConfig) -> None:
    """Raises a UserError where the config asks for a package that is not installed."""
    for key, (module, install) in PACKAGES.items():
        if getattr(cfg, key) and importlib.util.find_spec(module) is None:
            raise UserError(
                f"config.logging.{key}={getattr(cfg, key)!r} needs the package {module}, which is not installed "
                f"({install})."
            )


class Writers:
    """Scalars by arm and step. A resumed run goes on in its own curves: steps that are taken again replace theirs."""

    def __init__(self, cfg: LoggingConfig, workdir: pathlib.Path, name: str, first_start: float, config: Any):
        """`first_start`, the run's in Unix seconds, tells it from others of its name; `config` is its JSON.

        Raises:
          UserError: Weights & Biases does not start.
        """
        self._tensorboard = workdir / "tensorboard" if cfg.tensorboard and processes.is_first() else None
        self._events: dict[str, Any] = {}  # arm -> its TensorBoard writer
        self._wandb: Any = None
        if cfg.wandb_project and processes.is_first():
            self._wandb = self._start_wandb(cfg.wandb_project, workdir, name, first_start, config)

    def write(self, arm: str, step: int, values: dict[str, float | None]) -> None:
        """What is None is left out."""
        known = {key: value for key, value in values.items() if value is not None}
        if self._tensorboard is not None:
            if arm not in self._events:
                # Of an earlier session's events those from here on are void. Its file, named by the second, stays.
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
        except Exception as e:  # of its own types: no login, no network
            raise UserError(
                f"config.logging.wandb_project={project!r}: Weights & Biases does not start: {' '.join(str(e).split())}"
            ) from e
        # Each arm counts its own steps, and a resumed one counts some again, which W&B's own counter refuses.
        for arm in ("healed", "control"):
            run.define_metric(f"{arm}/*", step_metric=f"{arm}/step")
        return run

"""A run and its arms: shared state, first weights and held-out loss."""

import dataclasses
import pathlib
import sys
from collections.abc import Callable

import grain
import jax

from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.checkpoints.load import load_params
from solar_jax.config import Config, ModelConfig
from solar_jax.data.pipeline import Batch
from solar_jax.model.precision import precision
from solar_jax.model.shapes import Params, param_shapes
from solar_jax.monitoring import metrics
from solar_jax.monitoring.goodput import Ledger
from solar_jax.monitoring.trackers import Writers
from solar_jax.parallel import rules
from solar_jax.training.partition import Partition, make_partition
from solar_jax.training.step import make_eval_step, mean_loss


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that the arms of a run share."""

    config: Config
    workdir: pathlib.Path
    local_folder: pathlib.Path  # for what needs a disk: profiles, stalls, TensorBoard's and W&B's files
    checkpoint: Checkpoint  # the base
    grown: Checkpoint  # the view of it that is trained
    mesh: jax.sharding.Mesh
    rows: grain.MapDataset  # training
    heldout: list[Batch]
    evals: metrics.JsonLines  # {"arm", "step", "loss"} of every held-out evaluation
    ledger: Ledger
    writers: Writers
    documents: Callable[[int, int], list[str]]  # (first row, rows of training) -> their documents' ids


@dataclasses.dataclass(frozen=True)
class Arm:
    """A model and where its training is recorded."""

    name: str
    checkpoint: Checkpoint  # its first weights
    folder: pathlib.Path
    trainable: str  # a name of training.optimizer.TRAINABLE

    @property
    def cfg(self) -> ModelConfig:
        return self.checkpoint.cfg

    @property
    def partition(self) -> Partition:
        return make_partition(self.trainable, self.checkpoint.layer_map)


def say(text: str = "") -> None:
    """Prints on the first process."""
    if jax.process_index() == 0:
        print(text, flush=True)


def warn(text: str) -> None:
    """Prints a warning, on any process."""
    sys.stderr.write(f"warning: {text}\n")


def first_params(run: Run, c: Checkpoint) -> Params:
    """A checkpoint's weights in the run's precision and on its mesh; each device reads its own shard."""
    dtypes = jax.tree.map(lambda s: s.dtype, param_shapes(c.cfg, precision(run.config.train).weights))
    return load_params(c, rules.parameter_shardings(c.cfg, run.mesh), dtypes)


def evaluate(run: Run, arm: str, step: int, cfg: ModelConfig, params: Params) -> float:
    """Returns the held-out loss, recorded once; a resumed run reads it instead of computing it again."""
    for record in run.evals.read():
        if record["arm"] == arm and record["step"] == step:
            return record["loss"]
    loss = mean_loss(
        make_eval_step(cfg, run.config.train, run.config.data.sequence_length, run.mesh), params, run.heldout
    )
    run.evals.append({"arm": arm, "step": step, "loss": loss})
    run.writers.write(arm, step, {"heldout_loss": loss})
    return loss


def heldout_losses(run: Run, arm: Arm) -> dict[int, float]:
    """Held-out losses of an arm by step."""
    return {r["step"]: r["loss"] for r in run.evals.read() if r["arm"] == arm.name}

"""A run and its arms: shared state, first weights and held-out loss."""

import dataclasses
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import grain
import jax
import optax

from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.checkpoints.load import load_params
from solar_jax.config import Config, LoraConfig, ModelConfig
from solar_jax.data.chat.formats import kind_of
from solar_jax.data.corpus import Corpus
from solar_jax.data.pipeline import Batch
from solar_jax.model.lora import first_adapter
from solar_jax.model.precision import precision
from solar_jax.model.shapes import Params, param_shapes
from solar_jax.monitoring import metrics
from solar_jax.monitoring.goodput import Ledger
from solar_jax.monitoring.trackers import Writers
from solar_jax.parallel import rules
from solar_jax.training.objectives import Measures, Objective, next_token, text_measures
from solar_jax.training.optimizer import Rewarm, make_optimizer
from solar_jax.training.partition import Partition, make_partition
from solar_jax.training.saved_program import SavedProgram
from solar_jax.training.state import State
from solar_jax.training.step import make_eval_step, means, with_error


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
    task_scores: metrics.JsonLines  # {"arm", "step", "scores"} of every evaluation of tasks
    ledger: Ledger
    writers: Writers
    documents: Callable[[int, int], list[str]]  # (first row, rows of training) -> their documents' ids
    corpus: Corpus
    end: int | None = None  # the token that ends an answer
    objective: Objective = next_token
    measures: Measures = text_measures  # of held-out rows
    suite: Any = None  # an evaluation.tasks.Suite, where tasks are measured
    program: SavedProgram | None = None  # the compiled step of the arm whose result is the run's
    first_loss: float | None = None  # the loss of the first step, where it is known beforehand

    @property
    def kind(self) -> str:
        """Kind of records that the run trains on: "text", "conversations" or "pairs"."""
        return kind_of(self.config.data.format)

    @property
    def rewarm(self) -> Rewarm:
        """Where the learning rate rises again, since the model grows there."""
        return Rewarm(self.config.growth.steps, self.config.growth.rewarm_steps)

    def optimizer(self) -> optax.GradientTransformation:
        """The run's optimiser, which spans all its steps."""
        config = self.config
        return make_optimizer(
            config.optimizer, config.train.steps, precision(config.train), seed=config.seed, mesh=self.mesh,
            rewarm=self.rewarm,
        )  # fmt: skip

    @property
    def arm(self) -> str:
        """The name of the arm whose result is the run's."""
        return "healed" if self.kind == "text" else "tuned"


@dataclasses.dataclass(frozen=True)
class Arm:
    """A model and where its training is recorded."""

    name: str
    checkpoint: Checkpoint  # its first weights
    folder: pathlib.Path
    trainable: str  # a name of training.partition.TRAINABLE
    lora: LoraConfig | None = None
    new_rate: float = 1.0  # factor of the learning rate of new layers
    first: int = 0  # the step that it begins after
    last: int = 0  # the step that it ends after; 0: the run's last
    # (abstract state, optimiser, partition) -> {"params", "opt_state", "host"} that it begins with; None: the
    # checkpoint's weights
    begin: Callable[[State, optax.GradientTransformation, Partition], State] | None = None

    @property
    def cfg(self) -> ModelConfig:
        return self.checkpoint.cfg

    @property
    def partition(self) -> Partition:
        return make_partition(self.trainable, self.checkpoint.layer_map, self.lora, self.new_rate)


def say(text: str = "") -> None:
    """Prints on the first process."""
    if jax.process_index() == 0:
        print(text, flush=True)


def warn(text: str) -> None:
    """Prints a warning, on any process."""
    sys.stderr.write(f"warning: {text}\n")


def first_params(run: Run, c: Checkpoint, partition: Partition | None = None) -> Params:
    """A checkpoint's weights in the run's precision and on its mesh; each device reads its own shard."""
    policy = precision(run.config.train)
    weights = policy.weights if partition is None else partition.base_dtype(policy)
    dtypes = jax.tree.map(lambda s: s.dtype, param_shapes(c.cfg, weights))
    return load_params(c, rules.parameter_shardings(c.cfg, run.mesh), dtypes)


def with_adapter(run: Run, cfg: ModelConfig, params: Params, partition: Partition) -> Params:
    """A model's parameters with a new adapter beside them, where the partition has one."""
    if (lora := partition.lora) is None:
        return params
    weights, shardings = precision(run.config.train).weights, rules.adapter_shardings(lora, run.mesh)

    def first(layers: Params) -> Params:
        return first_adapter(cfg, lora, partition.taken(layers), run.config.seed, weights)

    return params | {"lora": jax.jit(first, out_shardings=shardings)(params["layers"])}


def evaluate(
    run: Run, arm: str, step: int, cfg: ModelConfig, params: Params, partition: Partition | None = None
) -> float:
    """Returns the held-out loss, recorded once with the other measures; a resumed run reads it."""
    for record in run.evals.read():
        if record["arm"] == arm and record["step"] == step:
            return record["loss"]
    eval_step = make_eval_step(
        cfg, run.config.train, run.config.data.sequence_length, run.mesh, run.measures, partition
    )
    values = with_error(means(eval_step, params, run.heldout))
    run.evals.append({"arm": arm, "step": step} | values)
    run.writers.write(arm, step, {f"heldout_{name}": value for name, value in values.items()})
    return values["loss"]


def measures_line(run: Run, arm: str, step: int) -> str:
    """Measures beside the held-out loss, as the end of a line; "" if there are none."""
    record = next((r for r in run.evals.read() if r["arm"] == arm and r["step"] == step), {})
    said = ""
    if "accuracy" in record:
        said += f", preference accuracy {100 * record['accuracy']:.1f} +- {100 * record['accuracy_error']:.1f} %"
    if "end_probability" in record:
        said += f", end token {100 * record['end_probability']:.1f} %"
    return said


def heldout_losses(run: Run, arm: Arm) -> dict[int, float]:
    """Held-out losses of an arm by step."""
    return {r["step"]: r["loss"] for r in run.evals.read() if r["arm"] == arm.name}

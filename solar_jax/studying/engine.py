"""One run of a study: a grown model is loaded, trained on the rows that all arms see, and measured by document."""

import dataclasses
import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.checkpoints.load import load_params
from solar_jax.checkpoints.views import grown
from solar_jax.config import Config, OptimizerConfig
from solar_jax.data.corpus import Corpus
from solar_jax.data.pipeline import Feed, training_rows
from solar_jax.errors import Interrupted, UserError
from solar_jax.hardware import chips
from solar_jax.model.precision import PRECISIONS, Precision, precision
from solar_jax.model.shapes import param_shapes
from solar_jax.parallel import rules
from solar_jax.parallel.mesh import make_mesh
from solar_jax.planning import search
from solar_jax.studying.arms import PlannedArm, PlannedRun, RunResult, evaluation_steps
from solar_jax.studying.config import StudyConfig
from solar_jax.studying.documents import Documents, TargetStep, make_target_step
from solar_jax.training.optimizer import make_optimizer
from solar_jax.training.state import State, first_opt_state, state_shardings
from solar_jax.training.step import make_train_step
from solar_jax.training.stochastic_rounding import narrow


class PeakRate(NamedTuple):
    """State of `_scaled_by_peak`: the run's peak learning rate, an array and so an input of the compiled step."""

    peak_rate: jax.Array  # float32 scalar


def _scaled_by_peak() -> optax.GradientTransformation:
    def init(params: Any) -> PeakRate:
        del params
        return PeakRate(jnp.full([], jnp.nan, jnp.float32))  # a rate that is never set must not train

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, PeakRate]:
        del params
        return jax.tree.map(lambda u: u * state.peak_rate, updates), state

    return optax.GradientTransformation(init, update)


def make_rateless_optimizer(
    cfg: OptimizerConfig, steps: int, policy: Precision, *, seed: int, mesh: Mesh | None
) -> optax.GradientTransformation:
    """The optimiser of `make_optimizer` whose peak learning rate is in its state, so that all rates share a program.

    Every schedule is proportional to its peak and the rate is the last factor of an update, so it can be applied after
    the schedule of peak 1; only the rounding of narrow weights must come later. Arguments as in `make_optimizer`.
    """
    unit = dataclasses.replace(cfg, learning_rate=1.0)
    whole = make_optimizer(unit, steps, PRECISIONS["float32"], seed=seed, mesh=mesh)
    return narrow(optax.chain(whole, _scaled_by_peak()), policy, seed)


@dataclasses.dataclass(frozen=True)
class Bench:
    """Config, base, text and documents that the runs of a study share."""

    study: StudyConfig
    base: Checkpoint
    corpus: Corpus
    documents: Documents


@dataclasses.dataclass
class StudyPrograms:
    """Compiled steps of one group of devices, by what they depend on; arms of one shape and trained part share them."""

    devices: tuple[jax.Device, ...]
    made: dict[Hashable, Any] = dataclasses.field(default_factory=dict)

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def meshed(self, run: Config, arm: PlannedArm) -> tuple[Config, Mesh]:
        """An arm's training config with nothing left to the planner, and its mesh on these devices.

        Raises:
          UserError: the arm does not fit them.
        """

        def make() -> tuple[Config, Mesh]:
            here = dataclasses.replace(search.present(), count=len(self.devices), slices=1)
            option, _ = search.choose(arm.cfg, arm.run_config(run), here, arm.partition)
            return option.config, make_mesh(option.config.mesh, self.devices)

        return self.get(("mesh", arm.cfg, arm.partition, arm.steps), make)


def train_arm_of_study(
    bench: Bench, run: PlannedRun, programs: StudyPrograms, stop: threading.Event, tell: Callable[[int, float], None]
) -> RunResult:
    """Trains one arm at one rate on the rows of one seed, and measures it at every evaluation.

    Args:
      bench: what all runs share.
      run: the arm, rate and seed.
      programs: of the devices to run on.
      stop: set where the study is asked to stop.
      tell: called after every evaluation with the step and the validation loss, nats a token.

    Raises:
      Interrupted: `stop` was set.
      UserError: a loss is not finite, or the arm does not fit the devices.
    """
    study, arm = bench.study, run.arm
    config, mesh = programs.meshed(study.run, arm)
    policy, B, T = precision(config.train), config.train.batch_size, config.data.sequence_length
    optimizer = make_rateless_optimizer(config.optimizer, arm.steps, policy, seed=config.seed, mesh=mesh)
    size = rules.padded_rows(B, mesh, config.train.accumulation)
    feed = Feed(training_rows(bench.corpus, run.seed), 0, B, size, rules.batch_sharding(mesh))
    state = _first_state(bench, run, config, mesh, optimizer)

    def compile_step() -> Any:
        step = make_train_step(arm.cfg, config.train, T, optimizer, mesh, arm.partition)
        options = chips.compiler_options(programs.devices[0], config.train.offload_collectives)
        return step.lower(state, feed(0)).compile(options or None)

    compiled = programs.get(("step", arm.cfg, arm.partition, arm.steps), compile_step)
    measured = _Measured(bench, arm, config, mesh, programs)
    at = set(evaluation_steps(study, arm.steps))
    training: list[Any] = []
    load: list[Any] = []
    steps, losses = [], []
    for step in range(arm.steps + 1):
        if stop.is_set():
            raise Interrupted(f"{run}: stopped; the same command goes on from the runs that are complete.")
        if step:
            state, numbers = compiled(state, feed(step - 1))
            training.append(numbers["loss"])
            load += [numbers["router_least_load"]] if "router_least_load" in numbers else []
            if step > 1:  # the one before: its result is there, and no more than two steps are in flight
                _check_finite(run, step - 1, float(training[-2]))
        if step in at:
            found = measured(state["params"])
            validation = bench.documents.validation
            loss = float(found[validation].sum() / bench.documents.tokens[validation].sum())
            _check_finite(run, step, loss)
            steps.append(step)
            losses.append(found)
            tell(step, loss)
    return RunResult(tuple(steps), np.stack(losses), tuple(map(float, training)), tuple(map(float, load)))


def _check_finite(run: PlannedRun, step: int, loss: float) -> None:
    if not np.isfinite(loss):
        raise UserError(f"the loss at step {step} of {run.arm.steps} is {loss}; a lower rate may help.")


def _first_state(
    bench: Bench, run: PlannedRun, config: Config, mesh: Mesh, optimizer: optax.GradientTransformation
) -> State:
    """The grown weights and the optimiser's state before the first step, with the run's rate in it."""
    arm, policy = run.arm, precision(config.train)
    c = grown(bench.base, arm.layer_map)
    dtypes = jax.tree.map(lambda s: s.dtype, param_shapes(c.cfg, policy.weights))
    params = load_params(c, rules.parameter_shardings(c.cfg, mesh), dtypes)
    shardings = state_shardings(arm.cfg, optimizer, mesh, arm.partition)
    opt_state = first_opt_state(optimizer, arm.partition, params, shardings["opt_state"])
    rate = jax.device_put(jnp.float32(run.rate), rules.replicated(mesh))
    return {"params": params, "opt_state": optax.tree_utils.tree_set(opt_state, peak_rate=rate)}


class _Measured:
    """Losses by document of an arm's parameters."""

    def __init__(self, bench: Bench, arm: PlannedArm, config: Config, mesh: Mesh, programs: StudyPrograms):
        size = rules.padded_rows(config.evaluation.batch_size, mesh)
        key = tuple(mesh.shape.items())
        self._documents = bench.documents
        self._batches = programs.get(("rows", key), lambda: bench.documents.batches(size, rules.batch_sharding(mesh)))
        T = config.data.sequence_length
        self._step: TargetStep = programs.get(
            ("targets", arm.cfg, arm.partition),
            lambda: make_target_step(arm.cfg, config.train, T, mesh, arm.partition),
        )

    def __call__(self, params: Any) -> np.ndarray:
        return self._documents.losses(self._step, params, self._batches)

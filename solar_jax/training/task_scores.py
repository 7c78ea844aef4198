"""Scores of lm-eval's tasks on an arm's live parameters: before training, when due, and after the last step."""

from typing import TYPE_CHECKING, Any

from solar_jax.config import EvaluationConfig
from solar_jax.errors import UserError
from solar_jax.model.precision import precision
from solar_jax.model.shapes import Params
from solar_jax.training.run import Arm, Run, say

if TYPE_CHECKING:  # it imports lm-eval, which only these runs need
    from solar_jax.evaluation.live import LiveTasks


def open_suite(cfg: EvaluationConfig) -> Any:
    """Finds a config's tasks, an `evaluation.tasks.Suite`; None if it has none.

    Raises:
      UserError: lm-eval is missing, a task is unknown, or its data is bad.
    """
    if not cfg.tasks:
        return None
    try:
        from solar_jax.evaluation.live import find_suite
    except ImportError as e:
        raise UserError(f"tasks={cfg.tasks} needs lm-eval ({e}); it comes with the extra `eval`.") from e
    return find_suite(cfg)


class TaskScores:
    """Measures an arm, by programs that are compiled once."""

    def __init__(self, run: Run, arm: Arm):
        self._run, self._arm = run, arm
        self._live: LiveTasks | None = None

    def due(self, step: int) -> bool:
        """True if the tasks are measured after a step."""
        every, arm = self._run.config.evaluation.task_every, self._arm
        ends = arm.first, arm.last or self._run.config.train.steps
        return self._run.suite is not None and (step in ends or bool(every and step % every == 0))

    def measure(self, step: int, params: Params) -> None:
        """Measures, records and prints the scores, if they are due and not known; a resumed run reads them."""
        run, arm = self._run, self._arm
        if not self.due(step) or any(r["arm"] == arm.name and r["step"] == step for r in run.task_scores.read()):
            return
        from solar_jax.evaluation.live import LiveTasks, score_line

        if self._live is None:
            partition = arm.partition
            self._live = LiveTasks(
                run.suite, run.config.evaluation.task_limit, run.grown, arm.cfg, run.mesh,
                dtype=precision(run.config.train).compute, whole=partition.whole,
                prepare=lambda p: partition.merged(p, partition.trained(p)),
            )  # fmt: skip
        scores = self._live.of(params)
        run.task_scores.append({"arm": arm.name, "step": step, "scores": scores})
        run.writers.write(arm.name, step, {f"task_{name}": value for name, value in scores.items()})
        say(f"{arm.name}: {score_line(scores)} after step {step}")

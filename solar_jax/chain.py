"""Run the whole recipe: grow, heal, tune, align and merge, stage by stage, from one command.

    python -m solar_jax.chain --config configs/solar/chain.py:smollm2 --workdir DIR [--rerun STAGE]

Each stage is a training config that runs alone too, or a merge. The same command goes on where it stopped: finished
stages are skipped, the running one resumes. A stage whose config has changed is refused with the difference, unless
--rerun names it: it and those after it are then deleted and run again. DIR/STAGE is a run's folder, that of a merge a
Hugging Face folder; chain.json holds what each began from and its measures.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from absl import flags
from ml_collections import config_flags

from solar_jax.chaining.stages import Chain, MergeStage, Stage, is_chain, resolve_chain
from solar_jax.cli import command
from solar_jax.errors import UserError
from solar_jax.storage.paths import is_local


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "Chain file, FILE.py[:ARGUMENT].")
    flags.DEFINE_string("workdir", None, "Folder of all stages, local; runs/<chain name> if not given.")
    flags.DEFINE_list("rerun", [], "Stages to delete and run again, with those after them.")
    flags.DEFINE_bool("dry_run", False, "Say what would be run, and stop.")


def check() -> None:
    """Raises a UserError for flags that cannot work; does not import jax."""
    f = flags.FLAGS
    if f.config is None:
        raise UserError("--config is missing; for a first chain give --config=configs/solar/chain.py:smollm2.")
    if not is_chain(f.config):
        raise UserError("--config must be a chain, a file with stages, such as configs/solar/chain.py.")
    chain = resolve_chain(f.config)
    if f.workdir and not is_local(f.workdir):
        raise UserError(f"--workdir must be a local folder for a chain, found {f.workdir}.")
    names = [stage.name for stage in chain.stages]
    for name in f.rerun:
        if name not in names:
            raise UserError(f"--rerun={name}: stages are {', '.join(names)}.")


if __name__ == "__main__":
    command.begin(define_flags, check)  # before the imports that take seconds

from solar_jax import merge, train
from solar_jax.chaining.record import Measured, Record
from solar_jax.chaining.report import plan_text, stage_markdown, stage_table
from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.checkpoints.convert import Target
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.scratch import open_source
from solar_jax.cli.config_files import load_config
from solar_jax.merging.candidates import make_candidates
from solar_jax.monitoring.profiling import listen_for_profiles
from solar_jax.parallel import processes
from solar_jax.planning.heldout import planned_heldout
from solar_jax.training.measuring import HeldOut
from solar_jax.training.preemption import listen_for_preemption
from solar_jax.training.run import say
from solar_jax.training.task_scores import open_suite

BASE = "base"  # the name of the first stage's source in tables


def main(argv: Sequence[str]) -> None:
    del argv
    f = flags.FLAGS
    chain = resolve_chain(f.config)
    processes.join()
    with listen_for_profiles(), listen_for_preemption():
        run_chain(chain, pathlib.Path(f.workdir or f"runs/{chain.name}"), f.rerun, dry_run=f.dry_run)


def run_chain(chain: Chain, workdir: pathlib.Path, rerun: Sequence[str] = (), *, dry_run: bool = False) -> None:
    """Runs the stages that are not finished.

    Args:
      chain: the stages.
      workdir: the folder of all stages, on a disk that every process sees.
      rerun: stages that are run again, with those after them.
      dry_run: only say what would be run.

    Raises:
      UserError: a stage has changed, does not fit, or fails; finished stages stay.
    """
    # ---- Checks, and the plan ----------------------------------------------------------------------------------------
    record, again = Record(workdir), chain.after(rerun)
    kept = [stage for stage in chain.stages if stage not in again]
    record.check(dataclasses.replace(chain, stages=tuple(kept)))
    done = {stage.name: stage in kept and record.is_done(stage) for stage in chain.stages}
    say(f"{chain.name} in {workdir}\n{plan_text(chain, workdir, done)}\n")
    if again:
        say(f"run again, their folders deleted: {', '.join(stage.name for stage in again)}\n")
    if dry_run:
        return
    for stage in again:
        record.forget(stage)
    processes.wait("what is run again is deleted")

    # ---- The stages --------------------------------------------------------------------------------------------------
    meter = _Meter(chain, record)
    for stage in chain.stages:
        say(f"\n---- {stage.name} {'-' * (110 - len(stage.name))}")
        record.check_inputs(stage)
        if record.is_done(stage):
            say(f"{workdir / stage.name}: is finished")
            meter.measure(stage.name, str(workdir / stage.name))
            continue
        record.begin(stage)
        processes.wait(f"{stage.name} is recorded")
        _run(chain, stage, workdir, record, meter)
        meter.measure(stage.name, str(workdir / stage.name))
        say(f"\n{stage_table(meter.rows(), meter.scores())}")

    # ---- The result --------------------------------------------------------------------------------------------------
    last = chain.stages[-1]
    result = workdir / last.name if isinstance(last, MergeStage) else workdir / last.name / "hf"
    say(f"\n{stage_table(meter.rows(), meter.scores())}\n{result}: the result, a Hugging Face folder")


def _run(chain: Chain, stage: Stage, workdir: pathlib.Path, record: Record, meter: "_Meter") -> None:
    """Runs or resumes one stage."""
    folder = workdir / stage.name
    if not isinstance(stage, MergeStage):
        train.run(stage.resolved(workdir), folder)
        return
    models = [str(workdir / name) for name in stage.models]
    summaries = {one.name: summary for one in chain.stages if (summary := record.summary(one.name))}
    merge.merge_best(
        make_candidates(stage.candidates, models, None, None), models, [stage.eval_config], Target(folder),
        reference=str(workdir / stage.reference), numbers=stage_markdown(meter.rows(), meter.scores(), summaries),
    )  # fmt: skip


class _Meter:
    """Measures every result on the same held-out rows, once; what is known is read from the record."""

    def __init__(self, chain: Chain, record: Record):
        self._chain, self._record = chain, record
        self._heldout: dict[str, HeldOut] = {}
        self._suite = open_suite(chain.evaluation)  # before the first stage: its data may be bad
        self._names = [BASE, *(stage.name for stage in chain.stages)]

    def rows(self) -> Mapping[str, Measured]:
        return {name: found for name in self._names if (found := self._record.measured(name)) is not None}

    def scores(self) -> Mapping[str, dict[str, float]]:
        """Scores of tasks, by result."""
        return {name: found for name in self._names if (found := self._record.scores(name)) is not None}

    def measure(self, name: str, source: str) -> None:
        if self._is_known(name):
            return
        first = self._chain.stages[0]
        if not self._is_known(BASE) and not isinstance(first, MergeStage):
            config = first.resolved(self._record.workdir)
            self._measure(BASE, open_source(config.source, config.model, config.seed))  # which may be from scratch
        self._measure(name, open_checkpoint(source))

    def _is_known(self, name: str) -> bool:
        return self._record.measured(name) is not None and (
            self._suite is None or self._record.scores(name) is not None
        )

    def _measure(self, name: str, c: Checkpoint) -> None:
        if self._record.measured(name) is None:
            for config_name in self._chain.measures:
                if config_name not in self._heldout:
                    self._heldout[config_name] = planned_heldout(load_config(config_name), c, with_reference=False)
            self._record.add(name, measured={key: heldout.of(c) for key, heldout in self._heldout.items()})
        if self._suite is not None:
            from solar_jax.evaluation.live import score_line, scores_of  # imported here: it needs lm-eval

            scores = scores_of(c, self._suite, self._chain.evaluation.task_limit)
            self._record.add(name, scores=scores)
            say(f"{name}: {score_line(scores)}")


if __name__ == "__main__":
    command.start(main)

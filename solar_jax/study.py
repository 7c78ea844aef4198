"""Compare growth operators: train many arms on the same rows, beside controls, and report what held.

    python -m solar_jax.study --config configs/study_smollm2.py:quick --workdir DIR [--dry_run]

Every arm is trained at every learning rate; the rate is chosen on validation text, and losses are reported on test
text. Controls, and arms near the best, are trained with every seed. The same command goes on from the runs that are
complete, and tries failed ones again. DIR then holds results.parquet, documents.parquet, report.md with its pictures,
study.json and runs/.
"""

import pathlib
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from solar_jax.checkpoints.find import check_local
from solar_jax.cli import command
from solar_jax.data.sources import check_sources
from solar_jax.errors import UserError
from solar_jax.storage.paths import is_local
from solar_jax.studying.config import StudyConfig, is_study, resolve_study


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "Study file, FILE.py[:ARGUMENT].")
    flags.DEFINE_string("workdir", None, "Folder of the study, local; runs/<study name> if not given.")
    flags.DEFINE_bool("dry_run", False, "Say what would be run, and stop.")


def check() -> None:
    """Raises a UserError for flags that cannot work; does not import jax."""
    f = flags.FLAGS
    if f.config is None:
        raise UserError("--config is missing; for a first study give --config=configs/study_smollm2.py:quick.")
    if not is_study(f.config):
        raise UserError("--config must be a study, a file with arms, such as configs/study_smollm2.py.")
    study = resolve_study(f.config)
    if f.workdir and not is_local(f.workdir):
        raise UserError(f"--workdir must be a local folder for a study, found {f.workdir}.")
    check_local(study.run.source)
    check_sources(study.run.data)


if __name__ == "__main__":
    command.begin(define_flags, check, tree=StudyConfig)  # before the imports that take seconds

import jax

from solar_jax import train
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.tokenizer import eos_id, load_tokenizer
from solar_jax.data.corpus import load_corpus
from solar_jax.data.pipeline import passes
from solar_jax.hardware import compilation
from solar_jax.storage.owner import owned
from solar_jax.storage.paths import write_file
from solar_jax.studying.arms import Results, chosen_rates, first_runs, plan_arms, seed_runs
from solar_jax.studying.documents import choose_documents
from solar_jax.studying.engine import Bench
from solar_jax.studying.findings import Findings, find
from solar_jax.studying.plots import pictures
from solar_jax.studying.report import plan_lines, report
from solar_jax.studying.schedule import Schedule, device_groups, work
from solar_jax.studying.store import StudyFolder
from solar_jax.studying.tables import (
    DOCUMENTS,
    RESULTS,
    check_pyarrow,
    document_rows,
    result_rows,
    write_parquet,
)  # fmt: skip
from solar_jax.training.run import say
from solar_jax.training.run_folder import text_record


def main(argv: Sequence[str]) -> None:
    del argv
    f = flags.FLAGS
    study = resolve_study(f.config)
    run_study(study, pathlib.Path(f.workdir or f"runs/{study.name}"), dry_run=f.dry_run)


def run_study(
    study: StudyConfig, folder: pathlib.Path, *, dry_run: bool = False, devices: Sequence[jax.Device] | None = None
) -> Findings | None:
    """Runs what is not finished and writes tables, pictures and the report.

    Args:
      study: its config.
      folder: of the study, from which it goes on.
      dry_run: only say what would be run.
      devices: to run on; all that there are if None.

    Returns:
      What the report says; None for a dry run.

    Raises:
      UserError: the config does not fit the base, text or devices, the folder is of another study, or every run of an
        arm that is needed failed.
    """
    compilation.use_cache(study.run.logging.compilation_cache)
    check_pyarrow()
    train.check_names(study.run)

    # ---- Checks: everything is refused here, before anything is trained or written -------------------------------
    base = open_checkpoint(study.run.source)
    train.check_model(study.run, base)
    arms = plan_arms(study, base.cfg)
    devices = jax.devices() if devices is None else devices
    groups = device_groups(devices, study.devices_per_arm)
    if jax.process_count() > 1:
        raise UserError("study runs in one process; start it on one host.")
    tokenizer, eos = load_tokenizer(base), eos_id(base)
    corpus = load_corpus(study.run.data, tokenizer, eos, base.cfg.vocab_size)
    documents = choose_documents(study, tokenizer, eos, base.cfg.vocab_size)
    batch = study.run.train.batch_size
    epochs = {arm.name: passes(corpus, arm.steps * batch) for arm in arms}  # refuses to read a source too often
    bench = Bench(study, base, corpus, documents)

    # ---- The plan, printed ----------------------------------------------------------------------------------------
    with owned(folder):
        store = StudyFolder(folder)
        runs = first_runs(study, arms)
        if not dry_run or folder.exists():
            store.open(study, documents, text_record(base, corpus))
        done = sum(store.result(run) is not None for run in runs)
        say(f"{study.name} in {folder}\n{plan_lines(study, arms, {a.name: work(bench, a) for a in arms}, done)}")
        say(f"devices   {len(groups)} group(s) of {len(groups[0])} of {len(devices)} {groups[0][0].device_kind}")
        say(f"text      {documents.note}\n")
        if dry_run:
            return None

        # ---- The runs ---------------------------------------------------------------------------------------------
        schedule = Schedule(bench, store, groups, say)
        results = schedule.run(runs)
        more = seed_runs(study, arms, results, documents.validation, documents.tokens)
        results |= schedule.run(more)
        runs += more

        # ---- The result -------------------------------------------------------------------------------------------
        if not results:
            raise UserError(f"{folder}: every run failed, the first with: {store.failure(runs[0])}")
        found = find(study, arms, results, documents)
        rates = chosen_rates(study, arms, results, documents.validation)
        by_step = _epochs_by_step(bench, results)
        write_parquet(folder / RESULTS, result_rows(runs, results, documents, rates, by_step))
        write_parquet(folder / DOCUMENTS, document_rows(runs, results, documents))
        for name, picture in pictures(found, study).items():
            write_file(folder / name, picture)
        failures = {run: sentence for run in runs if (sentence := store.failure(run)) is not None}
        text = report(study, base.cfg, arms, results, documents, found, failures, epochs)
        write_file(folder / "report.md", text)
    say(f"\n{text.split('## ')[0].strip()}\n\n{folder}: report.md, {RESULTS}, {DOCUMENTS}, pictures")
    return found


def _epochs_by_step(bench: Bench, results: Results) -> dict[int, float]:
    """Passes over all training rows, by number of steps."""
    rows = sum(len(of) for _, of in bench.corpus.train)
    steps = {step for result in results.values() for step in result.steps}
    return {step: step * bench.study.run.train.batch_size / rows for step in steps}


if __name__ == "__main__":
    command.start(main)

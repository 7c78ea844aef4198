"""Grow a checkpoint, heal it by continued pretraining, and write it out as a Hugging Face folder.

    python -m solar_jax.train --config configs/dus_48l.py:smollm2 [--config.train.steps=40] [--workdir DIR]

The same command resumes from the last good checkpoint. SIGTERM, or the notice of a preemption, saves the current step
and ends the command with status 75. --allow_changed=train.steps,data resumes a run of which these have changed. DIR
then holds config.json, data.json, metrics.jsonl (one line per step), evals.jsonl, summary.json, loss.png, checkpoints/,
hf/, model/, and control/ where a control was asked for.
"""

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from solar_jax.checkpoints.find import check_source
from solar_jax.cli import command
from solar_jax.config import Config, resolve
from solar_jax.data.sources import check_sources
from solar_jax.errors import UserError


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "Config file, FILE.py[:ARGUMENT].")
    flags.DEFINE_string(
        "workdir", None, "Folder of the run, local or gs://BUCKET/FOLDER; runs/<config name> if not given."
    )
    flags.DEFINE_list(
        "allow_changed",
        [],
        "What may have changed in a run that is resumed: config keys or groups, tokenizer, data.",
    )
    flags.DEFINE_bool(
        "take_over",
        False,
        "Start in the place of a process that owns a bucket's folder, once it has not moved for a minute.",
    )


def check() -> None:
    """Raises a UserError for flags that cannot work; imports no jax."""
    f = flags.FLAGS
    if f.config is None:
        raise UserError("--config is missing; for a first run give --config=configs/dus_48l.py:smollm2.")
    config = resolve(f.config)
    command.folder_from_flag(f.workdir or f"runs/{config.name}")
    check_source(config.source)
    check_sources(config.data)


if __name__ == "__main__":
    command.begin(define_flags, check)  # before the imports that take seconds


from solar_jax.checking.fallback import attention_for_run
from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.checkpoints.companions import template_files, template_text, with_end
from solar_jax.checkpoints.hf_config import differences
from solar_jax.checkpoints.scratch import open_source
from solar_jax.checkpoints.tokenizer import eos_id, load_tokenizer
from solar_jax.checkpoints.views import grown
from solar_jax.checkpoints.write_hf import parse_size
from solar_jax.data.chat.encoding import Rules, load_rules
from solar_jax.data.chat.formats import kind_of
from solar_jax.data.chat.template import NAMED
from solar_jax.data.corpus import heldout_rows, load_corpus
from solar_jax.data.pipeline import batch_documents, heldout_batches, passes, training_rows
from solar_jax.growth.apply import grown_config
from solar_jax.growth.operators import beside_map, make_layer_map
from solar_jax.hardware import compilation
from solar_jax.model.precision import precision
from solar_jax.monitoring import metrics
from solar_jax.monitoring.goodput import Ledger, goodput_line
from solar_jax.monitoring.profiling import listen_for_profiles
from solar_jax.monitoring.trackers import Writers, check_packages
from solar_jax.parallel import processes, rules
from solar_jax.parallel.mesh import make_mesh
from solar_jax.planning import search
from solar_jax.searching.run import searched
from solar_jax.storage.json_files import read_json, write_json
from solar_jax.storage.owner import owned
from solar_jax.storage.paths import is_local
from solar_jax.training import run_folder
from solar_jax.training.chunks import check_chunks
from solar_jax.training.growing import make_phases
from solar_jax.training.optimizer import make_optimizer
from solar_jax.training.partition import make_partition
from solar_jax.training.preemption import listen_for_preemption
from solar_jax.training.preferences import make_loss
from solar_jax.training.report import announce, draw, result_table, summarise
from solar_jax.training.run import Run, say, warn
from solar_jax.training.saved_program import open_program
from solar_jax.training.stages import RECIPES
from solar_jax.training.step_count import with_steps
from solar_jax.training.task_scores import open_suite
from solar_jax.training.tuning import row_count


def main(argv: Sequence[str]) -> None:
    del argv
    config = resolve(flags.FLAGS.config)
    processes.join()
    with listen_for_profiles():
        folder = command.folder_from_flag(flags.FLAGS.workdir or f"runs/{config.name}")
        run(config, folder, flags.FLAGS.allow_changed, take_over=flags.FLAGS.take_over)


def run(
    config: Config, folder: pathlib.Path, allowed: Sequence[str] = (), *, take_over: bool = False
) -> dict[str, Any]:
    """Runs everything, from the checkpoint to the healed model's HF folder.

    SIGTERM, a first Ctrl-C and a notebook's stop button end it after a step, which is saved.

    Args:
      config: the run.
      folder: of the run, from which it is resumed.
      allowed: what may have changed since it began: keys or groups of the config, "tokenizer", "data".
      take_over: take a bucket's folder from a process that gives no sign of life any more.

    Returns:
      The content of summary.json.

    Raises:
      UserError: something that the config names is missing, damaged or does not fit; nothing is written then.
      Interrupted: it was asked to stop; the same call goes on.
    """
    begin, started = time.perf_counter(), time.time()
    with listen_for_preemption(), contextlib.ExitStack() as stack:
        compilation.use_cache(config.logging.compilation_cache)
        check_names(config)
        run_folder.check_allowed(allowed)
        run_folder.check_place(folder)
        if processes.is_first():
            stack.enter_context(owned(folder, take_over=take_over))
        return _run(config, folder, allowed, begin, started)


def _run(config: Config, folder: pathlib.Path, allowed: Sequence[str], begin: float, started: float) -> dict[str, Any]:
    """`run`, in a folder that this process owns."""
    # ---- Checks: everything is refused here, before anything is allocated or written -----------------------------
    config, search_record = searched(config, folder)
    devices = search.present()
    program = open_program(config.train.compiled)
    if program:
        program.check_machine()
    if config.model.num_hidden_layers:  # known shape: what cannot fit is refused before opening a checkpoint
        layer_map = make_layer_map(config.model.num_hidden_layers, config.growth)
        trained = make_partition(config.train.trainable, layer_map, config.lora)
        search.choose(grown_config(config.model.architecture, layer_map), config, devices, trained)
    checkpoint = open_source(config.source, config.model, config.seed)
    check_model(config, checkpoint)
    layer_map = make_layer_map(checkpoint.cfg.num_hidden_layers, config.growth)
    make_phases(checkpoint.cfg.num_hidden_layers, config)  # refuses growth that a run cannot make
    if cut := beside_map(config.growth, checkpoint.cfg.num_hidden_layers):
        trained = make_partition(config.train.trainable, cut, config.lora)
        search.choose(grown_config(checkpoint.cfg, cut), config, devices, trained)
    partition = make_partition(config.train.trainable, layer_map, config.lora, config.growth.new_rate)
    deeper = grown(checkpoint, layer_map)
    planned = program.filled(config) if program else config
    option, need = search.choose(deeper.cfg, planned, devices, partition)
    tokenizer, eos = load_tokenizer(checkpoint), eos_id(checkpoint)
    goes_on = run_folder.check_owner(folder, config, allowed)
    if summary := read_json(folder / "summary.json"):
        say(f"{folder}: this run is complete.\n{result_table(summary)}")
        return summary
    date = run_folder.template_date(folder)
    encoding = load_rules(config.data, checkpoint.companions, checkpoint.where, tokenizer, eos, date)
    if encoding is not None:
        deeper = answering(deeper, encoding)
    corpus = load_corpus(config.data, tokenizer, eos, checkpoint.cfg.vocab_size, encoding)
    text = run_folder.text_record(checkpoint, corpus, encoding)
    if goes_on:
        run_folder.check_text(folder, text, allowed)
    suite = open_suite(config.evaluation)
    counted = with_steps(config, row_count(corpus))
    passes(corpus, counted.train.steps * config.train.batch_size, resumes=goes_on)  # refuses to read a source too often

    # ---- The attention kernel, checked once on each machine; a run without it is planned anew ----------------------
    attention = attention_for_run(deeper.cfg, option, devices.platform, say, warn)
    if attention != config.train.attention:
        without = dataclasses.replace(planned, train=dataclasses.replace(planned.train, attention=attention))
        option, need = search.choose(deeper.cfg, without, devices, partition)

    # ---- The plan, printed ----------------------------------------------------------------------------------------
    mesh = make_mesh(option.config.mesh)
    if program:
        in_steps = dataclasses.replace(option.config.train, steps=counted.train.steps)
        program.check(deeper.cfg, dataclasses.replace(option.config, train=in_steps), mesh)
    heldout = heldout_rows(corpus, config.evaluation.windows)
    train = option.config.train
    # Chunks count their own steps, each from its rows.
    counted_steps = config.train.steps if config.preferences.chunks else counted.train.steps
    announce(
        counted, folder, deeper, partition, corpus, len(heldout), resumes=goes_on, memory=str(need),
        mesh=f"{'chosen   ' if search.is_open(planned) else 'mesh     '} {option}",
        padded=rules.padded_rows(train.batch_size, mesh, train.accumulation),
    )  # fmt: skip
    processes.wait("everything is checked")
    if processes.is_first():
        if goes_on:
            run_folder.update(folder, config, text)
        else:
            run_folder.create(folder, config, deeper, text, search_record)
    processes.wait("the run's folder is there")
    ledger = Ledger(folder, started)
    local = folder if is_local(folder) else pathlib.Path("runs") / config.name
    shared = Run(
        config=dataclasses.replace(option.config, train=dataclasses.replace(train, steps=counted_steps)),
        workdir=folder,
        local_folder=local,
        checkpoint=checkpoint,
        grown=deeper,
        mesh=mesh,
        rows=training_rows(corpus, config.seed),
        heldout=heldout_batches(
            heldout, rules.padded_rows(config.evaluation.batch_size, mesh), rules.batch_sharding(mesh)
        ),
        evals=metrics.JsonLines(folder / "evals.jsonl"),
        task_scores=metrics.JsonLines(folder / "task_scores.jsonl"),
        suite=suite,
        program=program,
        ledger=ledger,
        documents=functools.partial(batch_documents, corpus, config.seed),
        corpus=corpus,
        end=None if encoding is None else encoding.end,
        writers=Writers(config.logging, local, config.name, ledger.first_start, run_folder.config_dict(config)),
    )

    # ---- The stages: base, grown model, export, control ------------------------------------------------------------
    with contextlib.closing(shared.writers):
        for stage in RECIPES[shared.kind]:
            stage(shared)

    shared.ledger.write()
    processes.wait("all arms are trained and recorded")  # every process reads what the first has written

    # ---- The result -------------------------------------------------------------------------------------------------
    summary = summarise(shared, time.perf_counter() - begin)
    if processes.is_first():
        draw(shared, summary)
        write_json(folder / "summary.json", summary)
    processes.wait("the summary is written")
    say(f"\n{result_table(summary)}\n{goodput_line(summary['time'])}")
    say(f"{folder}: summary.json, metrics.jsonl, loss.png, checkpoints/, hf/")
    return summary


def answering(c: Checkpoint, encoding: Rules) -> Checkpoint:
    """A model that carries the chat template that it is tuned with, and stops at the token that ends an answer."""
    found, text = c.companions, encoding.template.text
    files = {} if text in (template_text(found), NAMED["none"]) else template_files(text, found)
    return dataclasses.replace(
        c, companions=found | files | with_end(found, c.hf_config.get("eos_token_id"), encoding.end)
    )


def check_names(config: Config) -> None:
    """Raises a UserError for a name in the config that is in no table, or a package that is missing."""
    make_optimizer(config.optimizer, max(1, config.train.steps), precision(config.train), seed=config.seed)
    make_loss(config.preferences)
    check_chunks(config.preferences.chunks)
    kind = kind_of(config.data.format)
    for key, used, without in (
        ("train.control", config.train.control, kind != "text"),
        ("growth.at_step", config.growth.at_step > 0, kind != "text"),
        ("growth.beside", bool(config.growth.beside), kind != "text"),
        ("preferences.chunks", config.preferences.chunks, kind != "pairs"),
        ("mesh.context", config.mesh.context > 1, kind != "text"),
    ):
        if used and without:
            raise UserError(f"config.{key} is not for config.data.format={config.data.format!r}; leave it out.")
    parse_size(config.export.max_shard_size)
    check_packages(config.logging)


def check_model(config: Config, checkpoint: Checkpoint) -> None:
    """Raises a UserError where the checkpoint is not what the config expects, or too short for its rows."""
    for key, (expected, found) in differences(config.model, checkpoint.cfg).items():
        raise UserError(f"{checkpoint.where}: config.model.{key} expects {expected}, found {found}.")
    longest = checkpoint.cfg.max_position_embeddings
    if config.data.sequence_length > longest:
        raise UserError(
            f"config.data.sequence_length={config.data.sequence_length} exceeds the model's "
            f"max_position_embeddings={longest}."
        )


if __name__ == "__main__":
    command.start(main)

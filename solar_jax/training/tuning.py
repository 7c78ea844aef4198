"""The stage that tunes a model on conversations or on pairs; with chunks, each from the result of the one before."""

import dataclasses
import functools
import time
from collections.abc import Iterable
from typing import Any

from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.config import Config
from solar_jax.data.chat.pairs import LogProbs
from solar_jax.data.corpus import AnyRows, Corpus, heldout_indices, heldout_rows
from solar_jax.data.pipeline import addresses, batch_documents, heldout_batches, passes, training_rows
from solar_jax.parallel import processes, rules
from solar_jax.storage import paths
from solar_jax.training import run_folder
from solar_jax.training.chunks import make_chunks
from solar_jax.training.loop import train_arm
from solar_jax.training.objectives import answer_measures
from solar_jax.training.partition import make_partition
from solar_jax.training.preferences import make_loss, preference_measures, preference_objective
from solar_jax.training.reference import log_probs
from solar_jax.training.run import Arm, Run, first_params, say
from solar_jax.training.step_count import with_steps

_MANY = 1000  # rows between two looks at whether all are wanted
REFERENCE = "reference"  # folder of the reference's log-probabilities


def row_count(corpus: Corpus) -> int:
    """Training rows of all sources."""
    return sum(len(rows) for _, rows in corpus.train)


def tune_on_answers(run: Run, end: int) -> None:
    """Trains the model on the answers of conversations; `end`: the token that ends one."""
    tuned = dataclasses.replace(run, measures=answer_measures(end))
    train_arm(tuned, Arm("tuned", run.grown, run.workdir, run.config.train.trainable, run.config.lora))


def tune_on_pairs(run: Run, corpus: Corpus, end: int) -> None:
    """Trains the model on preferences, chunk by chunk.

    The start and the reference of a chunk are the result of the chunk before it. Held-out pairs are measured against
    the start of the whole run, so that chunks compare. The last chunk's arm is the run itself, the others are in
    chunk1/, chunk2/ and so on.
    """
    config, loss = run.config, make_loss(run.config.preferences)
    cache = paths.path(config.preferences.cache) if config.preferences.cache else run.workdir / REFERENCE

    def reference(c: Checkpoint, wanted: list[tuple[AnyRows, Iterable[int]]]) -> LogProbs:
        begin = time.perf_counter()
        partition = make_partition(config.train.trainable, c.layer_map, config.lora)
        found = log_probs(wanted, c.cfg, first_params(run, c, partition), config, run.mesh, cache, say)
        run.ledger.add("reference", time.perf_counter() - begin)
        return found

    chunks = make_chunks(corpus, config, lambda: reference(run.grown, [(r, range(len(r))) for _, r in corpus.train]))
    known: LogProbs | None = None
    if loss.needs_reference:  # of the start: the held-out pairs and the first chunk's
        first = _read(chunks[0], with_steps(config, row_count(chunks[0])))
        known = reference(run.grown, [*heldout_indices(corpus, config.evaluation.windows), *first])
    measured = dataclasses.replace(
        run,
        objective=preference_objective(loss, config.data.sequence_length),
        measures=preference_measures(loss, config.data.sequence_length, end),
        heldout=heldout_batches(
            heldout_rows(corpus, config.evaluation.windows, known),
            rules.padded_rows(config.evaluation.batch_size, run.mesh),
            rules.batch_sharding(run.mesh),
        ),
    )
    start, base = run.grown, None
    for i, chunk in enumerate(chunks):
        last = i == len(chunks) - 1
        name, folder = ("tuned", run.workdir) if last else (f"chunk{i + 1}", run.workdir / f"chunk{i + 1}")
        its = with_steps(config, row_count(chunk))
        readings = passes(chunk, its.train.steps * its.train.batch_size, resumes=True)
        if len(chunks) > 1:
            pairs = sum(len(rows.sequences(k)[1]) // 2 for _, rows in chunk.train for k in range(len(rows)))
            say(
                f"chunk {i + 1} of {len(chunks)}: {pairs:,} pairs, {its.train.steps} steps, read "
                f"{max(readings):.2f} times"
            )
        if i and loss.needs_reference:
            known = reference(start, _read(chunk, its))
        if len(chunks) > 1:
            run_folder.add_model(folder, start, config, base)
        arm_run = dataclasses.replace(
            measured,
            config=its,
            rows=training_rows(chunk, config.seed, known),
            documents=functools.partial(batch_documents, chunk, config.seed),
            first_loss=loss.at_reference(),
        )
        train_arm(arm_run, Arm(name, start, folder, config.train.trainable, config.lora))
        processes.wait(f"{name} is trained")
        if not last:
            start, base = open_checkpoint(str(folder)), str(folder)


def _read(corpus: Corpus, config: Config) -> list[tuple[AnyRows, Iterable[int]]]:
    """The rows of each source that a run of these steps reads."""
    wanted: list[set[int]] = [set() for _ in corpus.train]
    places: Any = addresses(corpus, config.seed)
    for i in range(config.train.steps * config.train.batch_size):
        source, row = places[i]
        wanted[source].add(int(row))
        if i % _MANY == 0 and all(len(w) == len(rows) for w, (_, rows) in zip(wanted, corpus.train, strict=True)):
            break
    return [(rows, sorted(its)) for its, (_, rows) in zip(wanted, corpus.train, strict=True)]

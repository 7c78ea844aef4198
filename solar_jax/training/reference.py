"""Log-probabilities of pairs under the reference model: computed once a pair, on the mesh, and kept in a file.

The file is named by a hash of the model's weights, and its lines by a hash of a pair's tokens and of what of them is
trained. These depend on the tokenizer, the template and the rules, so that a line is never stale, and a changed record
costs one pair.
"""

import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import numpy as np

from solar_jax.cli.progress import duration
from solar_jax.config import Config, ModelConfig
from solar_jax.data.chat.pairs import LogProbs, Pair, pairs_of
from solar_jax.data.chat.rows import most_sequences, split_rows
from solar_jax.data.corpus import AnyRows
from solar_jax.data.packing import Row, best_fit, unpack
from solar_jax.data.pipeline import heldout_batches
from solar_jax.model.precision import compute_dtype
from solar_jax.model.shapes import Params
from solar_jax.monitoring import metrics
from solar_jax.orbax_store import checksums
from solar_jax.parallel import processes, rules
from solar_jax.storage.paths import is_local
from solar_jax.training.partition import Partition, everything
from solar_jax.training.preferences import sequence_sums
from solar_jax.training.state import model_shardings
from solar_jax.training.step import make_forward

_EVERY = 15.0  # seconds between lines of progress, and between writes


def weights_key(params: Params, config: Config) -> str:
    """A hash of a model's weights and of the dtype that they are multiplied in; the same on any mesh."""
    found: dict[str, int] = {}
    for path, x in jax.tree.leaves_with_path(params):
        found |= checksums.together(checksums.sums(checksums.views({checksums.name_of(path): x})))
    content = json.dumps([found, str(compute_dtype(config.train))], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def log_probs(
    wanted: Iterable[tuple[AnyRows, Iterable[int]]], cfg: ModelConfig, params: Params, config: Config,
    mesh: jax.sharding.Mesh, folder: pathlib.Path, say: Callable[[str], None], partition: Partition | None = None,
) -> LogProbs:  # fmt: skip
    """The log-probabilities of the pairs of some rows, those that are missing computed and written on the way.

    Args:
      wanted: rows, and the indices of those that are wanted.
      cfg, params, partition: the reference model, on the mesh.
      config: of the run: row length, batch size of evaluations, precision.
      mesh: of the run.
      folder: of the files, here or in a bucket.
      say: prints a line on the first process.
    """
    if processes.is_first() and is_local(folder):
        folder.mkdir(parents=True, exist_ok=True)
    file = metrics.JsonLines(folder / f"{weights_key(params, config)}.jsonl")
    known = {r["pair"]: (r["chosen"], r["rejected"]) for r in file.read()}
    processes.wait("the reference's log-probabilities are read")
    pairs = dict(pair for rows, indices in wanted for i in indices for pair in pairs_of(rows, i))
    missing = {key: pair for key, pair in pairs.items() if key not in known}
    say(f"reference: {len(pairs):,} pairs, {len(missing):,} of them to be computed")
    if not missing:
        return known
    length, size = config.data.sequence_length, rules.padded_rows(config.evaluation.batch_size, mesh)
    step = make_sequence_step(cfg, config, mesh, partition or everything(cfg))
    groups, begin = list(_rows(missing, length)), time.perf_counter()
    reported = begin
    for k in range(0, len(groups), size):
        some = groups[k : k + size]
        rows = [_row([missing[key] for key in keys], length) for keys in some]
        (batch,) = heldout_batches(rows, size, rules.batch_sharding(mesh))
        sums = np.asarray(step(params, batch))
        for row, keys in enumerate(some):
            for i, key in enumerate(keys):
                known[key] = float(sums[row, 2 * i]), float(sums[row, 2 * i + 1])
                file.append({"pair": key, "chosen": known[key][0], "rejected": known[key][1]})
        if time.perf_counter() - reported > _EVERY:
            file.flush()
            reported = time.perf_counter()
            left = (reported - begin) / (k + len(some)) * (len(groups) - k - len(some))
            say(f"reference: {k + len(some):,} of {len(groups):,} rows, {duration(left)} left")
    file.flush()
    return known


def _rows(pairs: Mapping[str, Pair], length: int) -> Iterator[list[str]]:
    """Yields the keys of the pairs of each row."""
    keys = list(pairs)
    rows = split_rows(best_fit(np.array([int(pairs[key][1].sum()) - 2 for key in keys]), length), length)
    order = np.argsort(rows, kind="stable")
    for of in np.split(order, np.flatnonzero(np.diff(rows[order])) + 1):
        yield [keys[i] for i in of]


def _row(pairs: list[Pair], length: int) -> Row:
    tokens, sizes, trained = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    return unpack("best_fit", tokens, sizes, length, True, trained)


def make_sequence_step(
    cfg: ModelConfig, config: Config, mesh: jax.sharding.Mesh, partition: Partition
) -> Callable[[Params, dict[str, jax.Array]], jax.Array]:
    """A jitted (params, batch) -> log-probability of each sequence's trained tokens, [B, sequences], replicated."""
    length = config.data.sequence_length
    forward = make_forward(cfg, config.train, length, mesh)

    def sums(params: Params, batch: dict[str, jax.Array]) -> jax.Array:
        merged = partition.merged(params, partition.trained(params))
        return sequence_sums(forward(merged), batch, most_sequences(length))

    return jax.jit(
        sums,
        in_shardings=(model_shardings(cfg, mesh, partition), rules.batch_sharding(mesh)),
        out_shardings=rules.replicated(mesh),
    )

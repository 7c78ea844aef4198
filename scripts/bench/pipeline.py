"""Measures how fast batches are made from prepared rows: tokens/s on one core, and through worker processes.

    uv run --extra demo python scripts/bench/pipeline.py [--prepared DIR] [--length 4096] [--batch 8] [--workers 1,2]

Without --prepared, text is made of CPython's documentation topics, their paragraphs shuffled, and prepared with
SmolLM2's tokenizer. A batch is read, decoded, stacked and put on the device, as in training; "a core" is based on the
CPU time of this process, all threads counted, while batches are made in the calling thread. Rows are read in shuffled
order. Worker processes are timed by wall clock after their first batches, their start-up separately. Real tokens are
counted, not padding. Figures are medians of the rounds, which take turns.
"""

import argparse
import contextlib
import json
import pathlib
import statistics
import tempfile
import time
from pydoc_data.topics import topics

import jax
import ml_collections
import numpy as np
from absl import flags

from solar_jax import prepare
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.tokenizer import eos_id, load_tokenizer
from solar_jax.config import Config, defaults, resolve
from solar_jax.data.corpus import Corpus, load_corpus
from solar_jax.data.pipeline import Feed, training_rows


def make_config(source: str, text: str, length: int) -> Config:
    config: ml_collections.ConfigDict = defaults()
    config.name, config.source = "pipeline", source
    config.data.sources, config.data.sequence_length = (text,), length
    config.train.steps = config.train.batch_size = 1
    return resolve(config)


def write_text(file: pathlib.Path, megabytes: float) -> None:
    """Writes documents of 1 to 80 paragraphs."""
    rng, size = np.random.default_rng(0), 0
    paragraphs = [p for name in sorted(topics) for p in topics[name].split("\n\n") if p.strip()]
    with file.open("w") as f:
        while size < megabytes * 1e6:
            line = json.dumps({"text": "\n\n".join(rng.choice(paragraphs, rng.integers(1, 80)))})
            size += f.write(line + "\n")


def prepared(source: str, folder: pathlib.Path, megabytes: float, length: int) -> pathlib.Path:
    write_text(folder / "text.jsonl", megabytes)
    config = make_config(source, str(folder / "text.jsonl"), length)
    prepare.prepare(config, folder / "prepared", prepare.Options(workers=1))
    return folder / "prepared"


def rate(feed: Feed, first: int, batches: int) -> tuple[float, float]:
    """Returns the rows per wall second, and per CPU second of this process, of `batches` batches from `first` on."""
    rows = 0
    wall, cpu = time.perf_counter(), time.process_time()
    for k in range(first, first + batches):
        batch = jax.block_until_ready(feed(k))
        rows += batch["tokens"].shape[0]
    return rows / (time.perf_counter() - wall), rows / (time.process_time() - cpu)


def through_workers(corpus: Corpus, size: int, batches: int, workers: int) -> tuple[float, float]:
    """Returns the rows per wall second, and the seconds until the first batch was ready."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    begin = time.perf_counter()
    with contextlib.closing(Feed(training_rows(corpus, 0), 0, size, size, sharding, workers)) as feed:
        feed(0)
        start = time.perf_counter() - begin
        warm = 1 + 4 * workers  # batches made while this process waited
        rate(feed, 1, warm)
        return rate(feed, 1 + warm, batches)[0], start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="smollm2", help="whose tokenizer")
    parser.add_argument("--prepared", help="a folder that `prepare` wrote with that tokenizer and length")
    parser.add_argument("--megabytes", type=float, default=30, help="of text that is made and prepared otherwise")
    parser.add_argument("--length", type=int, default=4096, help="tokens a row")
    parser.add_argument("--batch", type=int, default=8, help="rows")
    parser.add_argument("--batches", type=int, default=100, help="a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", default="1,2", help="numbers of worker processes")
    args = parser.parse_args()
    flags.FLAGS.mark_as_parsed()  # grain reads its own flags, which a command parses at start-up
    with tempfile.TemporaryDirectory(prefix="solar_jax_bench_") as temporary:
        folder = args.prepared or prepared(args.source, pathlib.Path(temporary), args.megabytes, args.length)
        checkpoint = open_checkpoint(args.source)
        config = make_config(args.source, str(folder), args.length)
        corpus = load_corpus(config.data, load_tokenizer(checkpoint), eos_id(checkpoint))
        _, rows = corpus.train[0]
        a_row = rows.tokens / len(rows)
        print(f"{len(rows):,} rows of {args.length} with {a_row:,.0f} real tokens, batches of {args.batch} rows")
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        feed = Feed(training_rows(corpus, 0), 0, args.batch, args.batch, sharding)
        rate(feed, 0, 10)
        counts = [int(n) for n in args.workers.split(",") if n]
        alone, many = [], {n: [] for n in counts}
        for i in range(args.rounds):
            alone.append(rate(feed, 10 + i * args.batches, args.batches))
            for n in counts:
                many[n].append(through_workers(corpus, args.batch, args.batches, n))
        wall, cpu = (a_row * statistics.median(r[i] for r in alone) / 1e6 for i in (0, 1))
        print(f"in this process       {cpu:6.2f} M tokens/s a core, {wall:6.2f} M tokens/s of the wall")
        for n, found in many.items():
            wall, start = a_row * statistics.median(r[0] for r in found) / 1e6, statistics.median(r[1] for r in found)
            print(f"{n} worker process(es)  {wall:6.2f} M tokens/s of the wall; first batch after {start:.1f} s")


if __name__ == "__main__":
    main()

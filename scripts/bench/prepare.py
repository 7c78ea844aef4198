"""Times text preparation: its core's tokenising and packing next to the `tokenizers` library alone, and row fill.

    python scripts/bench/prepare.py [--text FILE ...] [--articles] [--copies 3] [--rounds 3] [--workers 2]

The core is what `prepare` does with blocks of documents: tokenise, pack by best fit, encode records. It runs in this
process, where the library's own threads tokenise, and in single-threaded worker processes, whose start-up is not
counted. The library alone tokenises the same texts in one call, on all cores. All take turns; figures are medians.
"""

import argparse
import os
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from solar_jax.data.packing import blocks, pack
from solar_jax.data.prepared import engines
from solar_jax.data.prepared.blocks import DocumentBlock, Work
from solar_jax.data.sources import Document, documents, parse_sources

_SETTLE = 6  # seconds in which worker processes start


def read(paths: list[str], articles: bool) -> dict[str, list[Document]]:
    """Reads the documents of every file; with `articles`, WikiText is split into one document per article."""
    found = {}
    for source in parse_sources(tuple(paths)):
        texts = list(documents(source))
        if articles:
            parts = [part for d in texts for part in re.split(r"(?m)^(?= = [^=].* = $)", d.text) if part.strip()]
            texts = [Document(f"{source.path}:{i}", text) for i, text in enumerate(parts)]
        found[source.path] = texts
    return found


def as_blocks(texts: list[Document], length: int) -> list[DocumentBlock]:
    return [DocumentBlock("0-train", False, b, np.zeros((len(b), 2), np.int64), b"", 0) for b in blocks(texts, length)]


def timed(action: Callable[[], Any]) -> tuple[float, float]:
    """Returns wall seconds, and CPU seconds of this process's threads."""
    begin, used = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - begin, time.process_time() - used


def in_processes(work: Work, items: list[DocumentBlock], workers: int) -> tuple[float, float]:
    begin = 0.0

    def all_items() -> Iterator[DocumentBlock]:
        nonlocal begin
        tiny = Document("tiny", "a few words")
        for _ in range(4 * workers):
            yield DocumentBlock("0-train", False, [tiny], np.zeros((1, 2), np.int64), b"", 0)
        time.sleep(_SETTLE)
        begin = time.perf_counter()
        yield from items

    for _ in engines.local(work, all_items(), workers):
        pass
    return time.perf_counter() - begin, float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", action="append", help="of config.data.sources; pydoc-topics if none is given")
    parser.add_argument("--articles", action="store_true", help="split WikiText into its articles")
    parser.add_argument("--copies", type=int, default=1, help="of the texts, for the speed alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--length", type=int, action="append", help="T, of the rows' fill; several may be given")
    parser.add_argument("--source", default="smollm2", help="whose tokenizer")
    args = parser.parse_args()
    # Imported here, since worker processes import this file and do not need JAX.
    from solar_jax.checkpoints.open import open_checkpoint
    from solar_jax.checkpoints.tokenizer import eos_id, load_tokenizer

    checkpoint = open_checkpoint(args.source)
    tokenizer, eos = load_tokenizer(checkpoint), eos_id(checkpoint)
    found = read(args.text or ["pydoc-topics"], args.articles)
    lengths = args.length or [1024, 2048, 4096]

    print(f"{'documents as':40}" + "".join(f"{f'T={t}':>10}" for t in lengths) + "   real tokens of all, best fit")
    totals = {t: [0, 0] for t in lengths}
    for path, texts in found.items():
        shares = []
        for length in lengths:
            rows = pack(texts, tokenizer, eos, length)
            shares.append(rows.tokens / (len(rows) * length))
            totals[length][0] += rows.tokens
            totals[length][1] += len(rows) * length
        print(f"{pathlib.Path(path).name:40}" + "".join(f"{100 * s:9.2f}%" for s in shares))
    print(f"{'all together':40}" + "".join(f"{100 * totals[t][0] / totals[t][1]:9.2f}%" for t in lengths))

    texts = [d for some in found.values() for d in some] * args.copies
    items = as_blocks(texts, lengths[-1])
    megabytes = sum(len(d.text.encode()) for d in texts) / 1e6
    work = Work(tokenizer.to_str(), eos, lengths[-1], "best_fit", "<u2", None)
    strings = [d.text for d in texts]
    work(items[0])  # reads the tokenizer
    ways = {
        "tokenizers alone": lambda: timed(lambda: tokenizer.encode_batch_fast(strings, add_special_tokens=False)),
        "core, this process": lambda: timed(lambda: [work(item) for item in items]),
        "core, processes": lambda: in_processes(work, items, args.workers),
    }
    times = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            times[name].append(way())
            print(f"{name:20} {times[name][-1][0]:8.2f} s, {times[name][-1][1]:.2f} s of CPU", flush=True)
    print(f"\n{megabytes:.1f} MB of text in {len(items)} blocks, {args.workers} processes, {os.cpu_count()} cores")
    print(f"{'':20}     MB/s  of the library alone, by CPU time")
    first, first_cpu = (statistics.median(column) for column in zip(*times["tokenizers alone"], strict=True))
    for name, pairs in times.items():
        seconds, cpu = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{name:20} {megabytes / seconds:8.2f}  {first / seconds:20.2f}  {first_cpu / cpu:11.2f}")


if __name__ == "__main__":
    main()

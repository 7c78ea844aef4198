"""Tokenise and pack text once, into ArrayRecord shards of rows, for runs that read it many times.

    python -m solar_jax.prepare --config configs/dus_48l.py --config.data.sources=/path/to/corpus --out DIR

The config is that of `train`: its source provides the tokenizer, config.data the text and the format of the rows. DIR
is then listed in config.data.sources. The same command resumes where a killed one stopped, and any number of workers,
on one machine or on a Ray cluster, writes the same bytes.
"""

import dataclasses
import hashlib
import importlib.metadata
import math
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from solar_jax.checkpoints.find import check_local
from solar_jax.cli import command
from solar_jax.config import Config, resolve
from solar_jax.data.files import find_files
from solar_jax.data.prepared import engines, evaluation_sets
from solar_jax.data.prepared.evaluation_sets import find_evaluations, read_evaluations
from solar_jax.data.prepared.manifest import write_manifest
from solar_jax.data.sources import check_sources
from solar_jax.errors import UserError
from solar_jax.storage.paths import is_local


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "Config file, FILE.py[:ARGUMENT], as for train.")
    flags.DEFINE_string("out", None, "New local folder to write.")
    flags.DEFINE_integer("workers", os.cpu_count() or 1, "Processes on this machine.", lower_bound=1)
    flags.DEFINE_enum("engine", "local", sorted(engines.ENGINES), "Where blocks are processed; ray: see RAY_ADDRESS.")
    flags.DEFINE_bool("dedup", False, "Drop documents whose text occurred earlier, in any source.")
    flags.DEFINE_multi_string(
        "decontaminate", [], "Drop training documents that share words with evaluation sets: files or folders of "
        f"JSONL, JSON or Parquet, or a preset ({', '.join(evaluation_sets.PRESETS)}), or PRESET=FOLDER without the hub."
    )  # fmt: skip
    flags.DEFINE_integer("ngram", 13, "Consecutive shared words that make a document contaminated.", lower_bound=2)


def check() -> None:
    """Raises a UserError for flags that cannot work; imports no jax."""
    f = flags.FLAGS
    if f.config is None or not f.out:
        raise UserError("prepare needs --config FILE and --out DIR.")
    if not is_local(f.out):
        raise UserError(f"--out: {f.out}: ArrayRecord only writes local files; give a local folder and upload it.")
    config = resolve(f.config)
    check_local(config.source)
    check_sources(config.data)


if __name__ == "__main__":
    command.begin(define_flags, check)  # before the imports that take seconds

import tokenizers

from solar_jax.checkpoints.scratch import open_source
from solar_jax.checkpoints.tokenizer import eos_id, load_tokenizer
from solar_jax.cli.progress import byte_bar, duration
from solar_jax.data.chat.encoding import Rules, load_rules
from solar_jax.data.doubts import tokens_of_text
from solar_jax.data.embedded import EMBEDDED
from solar_jax.data.packing import block_characters
from solar_jax.data.prepared import manifest, records
from solar_jax.data.prepared.blocks import Work
from solar_jax.data.prepared.build import SHARDS, write_shards
from solar_jax.data.prepared.decontamination import Index, make_index
from solar_jax.data.prepared.rows import MANIFEST, is_prepared
from solar_jax.data.prepared.shards import BLOCKS_A_SHARD
from solar_jax.data.sources import Source, choice, sources_of
from solar_jax.storage.atomic_folder import check_space, check_target, new_folder, partial
from solar_jax.storage.json_files import read_json

_DISK = 0.5  # most bytes of rows per byte of text; 0.3 is typical
_INFLATED = 3  # bytes of text per byte of a compressed file that does not record its size
_WORTH_A_PROCESS = 1 << 24  # bytes of text; a process takes seconds to start


@dataclasses.dataclass(frozen=True)
class Options:
    workers: int
    engine: str = "local"
    dedup: bool = False
    decontaminate: tuple[str, ...] = ()
    ngram: int = 13  # consecutive words


def main(argv: Sequence[str]) -> None:
    del argv
    f = flags.FLAGS
    options = Options(f.workers, f.engine, f.dedup, tuple(f.decontaminate), f.ngram)
    prepare(resolve(f.config), pathlib.Path(f.out).expanduser(), options)


def prepare(config: Config, out: pathlib.Path, options: Options) -> dict[str, Any]:
    """Writes the prepared folder, which appears once it is complete.

    Returns:
      The manifest.

    Raises:
      UserError: something that the config or the options name is missing or damaged.
    """
    begin = time.perf_counter()
    check_target(out)
    sources = sources_of(config.data)
    expected = sum(_expected_bytes(source) for source in sources)
    check_space(out, int(_DISK * expected))
    checkpoint = open_source(config.source, config.model, config.seed)
    tokenizer, eos = load_tokenizer(checkpoint), eos_id(checkpoint)
    index = make_index(read_evaluations(find_evaluations(list(options.decontaminate))), options.ngram) \
        if options.decontaminate else None  # fmt: skip
    rules = load_rules(config.data, checkpoint.companions, checkpoint.where, tokenizer, eos)
    notes = rules.check() if rules else []
    about = _about(config, tokenizer, eos, checkpoint.where, rules)
    work = Work(
        tokenizer.to_str(), eos, config.data.sequence_length, config.data.packing, about["token_dtype"], index,
        checkpoint.cfg.vocab_size, rules,
    )  # fmt: skip
    _announce(config, out, options, sources, expected, about, index, tokenizer)
    for note in notes:
        print(f"template  {note}")
    job = about | {
        "sources": [_job(source) for source in sources], "dedup": options.dedup,
        "decontamination": _identity(index), "blocks": [block_characters(config.data.sequence_length), BLOCKS_A_SHARD],
    }  # fmt: skip
    with new_folder(out, job=job, keep=True) as folder:
        if not manifest.is_written(folder):
            remote = not all(is_local(source.path) for source in sources)  # of unknown size
            workers = options.workers if remote else min(options.workers, 1 + expected // _WORTH_A_PROCESS)
            with byte_bar(expected, out.name) as progress:
                found = write_shards(
                    config.data, work, folder, dedup=options.dedup, engine=options.engine, workers=workers,
                    progress=progress,
                )  # fmt: skip
            tokens = min(checkpoint.cfg.vocab_size, max(tokenizer.get_vocab().values()) + 1)
            write_manifest(folder, found, index, about | {"tokens_below": tokens})
        manifest.name_shards(folder)
    made = read_json(out / MANIFEST)
    print(_summary(made, out, time.perf_counter() - begin), flush=True)
    return made


def _about(
    config: Config, tokenizer: tokenizers.Tokenizer, eos: int, where: str, rules: Rules | None
) -> dict[str, Any]:
    """Returns everything except the documents that determines the rows."""
    data = config.data
    versions = {name: importlib.metadata.version(name) for name in ("tokenizers", "array-record", "numpy")}
    return {
        "tokenizer": {
            "source": where, "hash": records.tokenizer_hash(tokenizer, eos), "version": tokenizers.__version__,
            "eos": eos, "vocabulary": tokenizer.get_vocab_size(),
        },
        "sequence_length": data.sequence_length,
        "packing": data.packing,
        "token_dtype": records.token_dtype(max(tokenizer.get_vocab().values()) + 1),
        "holdout": {"rule": data.holdout, "every": data.holdout_every},
        "seed": config.seed,  # the config's; no row depends on it, since training shuffles with its own seed
        "versions": versions,
    } | ({} if rules is None else {"records": {
        "form": rules.form, "rules": rules.fingerprint(), "template": rules.template.name, "date": rules.template.date,
    }})  # fmt: skip


def _job(source: Source) -> dict[str, Any]:
    """Returns what of a source decides its rows; options at their defaults are left out, as jobs may have begun before
    an option existed."""
    absent = dataclasses.asdict(Source(source.path))
    job = dataclasses.asdict(source) | {"weight": 0, "epochs": math.inf}  # neither has to do with the rows
    return {
        key: value for key, value in job.items() if key not in ("plain", "skip_empty", "form") or value != absent[key]
    }


def _expected_bytes(source: Source) -> int:
    """Estimates how much text there is, from the sizes of local files.

    Raises:
      UserError: the source does not exist or cannot be prepared.
    """
    path = source.path
    if is_prepared(path):
        raise UserError(f"config.data.sources: {path}: is already prepared; list it in the sources of train instead.")
    if source.limit or source.epochs != Source(path).epochs:
        raise UserError(f"config.data.sources: {path}: ?limit= and ?epochs= are for train; prepare uses all of it.")
    if path in EMBEDDED:
        return 1 << 19
    total = 0
    for file in find_files(path, source.plain).files:
        if not is_local(file.name):
            continue
        size = pathlib.Path(file.name).stat().st_size
        if file.name.endswith(".gz") and 18 < size < 1 << 30:
            with open(file.name, "rb") as f:
                f.seek(-4, os.SEEK_END)
                total += max(size, int.from_bytes(f.read(4), "little"))  # uncompressed size, at the end of a gzip file
        else:
            total += size * (_INFLATED if file.name.endswith((".gz", ".zst", ".parquet")) else 1)
    return total


def _identity(index: Index | None) -> str | None:
    if index is None:
        return None
    digest = hashlib.sha256(f"{index.n} {index.names}".encode())
    digest.update(index.stream.tobytes() + index.firsts.tobytes() + "\n".join(index.words).encode())
    return digest.hexdigest()


def _announce(
    config: Config, out: pathlib.Path, options: Options, sources: list[Source], expected: int, about: dict[str, Any],
    index: Index | None, tokenizer: tokenizers.Tokenizer,
) -> None:  # fmt: skip
    """Prints everything that is about to happen."""
    data = config.data
    goes_on = (partial(out) / SHARDS).exists()
    print(f"{'Resuming' if goes_on else 'Preparing'} {out}")
    for source in sources:
        print(f"source    {choice(source)}")
        print(f"          {tokens_of_text(source, tokenizer)}")
    print(f"text      about {expected / 1e6:,.1f} MB in total")
    print(f"tokenizer {about['tokenizer']['source']}, {about['tokenizer']['vocabulary']:,} tokens")
    rule = f"one document in {data.holdout_every} is held out by {data.holdout}"
    print(f"rows      of {data.sequence_length:,} tokens, packing {data.packing}; {rule}")
    if options.dedup:
        print("dedup     documents whose text occurred earlier are dropped")
    if index is not None:
        print(
            f"evaluated {len(index.names):,} records, {len(index.hashes):,} distinct runs of {index.n} words; "
            f"training documents with one are dropped ({index.short:,} records have no {index.n} words in a row)"
        )
    where = "processes at most" if options.engine == "local" else "Ray workers, or its entire cluster"
    print(f"work      {options.workers} {where}, shards of {BLOCKS_A_SHARD} blocks", flush=True)


def _summary(made: dict[str, Any], out: pathlib.Path, seconds: float) -> str:
    lines = []
    for source in made["sources"]:
        train, heldout = source["train"], source["heldout"]
        left_out = ", ".join(f"{len(ids):,} {reason}" for reason, ids in source["left_out"].items())
        lines.append(
            f"{source['path']}: {source['documents']:,} documents ({source['duplicates']:,} duplicates, "
            f"{source['contaminated']:,} contaminated, {source['empty']:,} without text skipped), "
            f"{train['rows']:,} training rows of {train['tokens']:,} tokens, "
            f"{heldout['rows']:,} held-out rows of {heldout['tokens']:,}" + (f"; left out: {left_out}" * bool(left_out))
        )
    both = [made["totals"][part] for part in ("train", "heldout")]
    room = sum(t["rows"] for t in both) * made["sequence_length"]
    real, kind = sum(t["tokens"] for t in both) / max(1, room), "trained" if "records" in made else "real"
    lines.append(
        f"{out}: {sum(t['rows'] for t in both):,} rows, {100 * real:.2f} % {kind} tokens, "
        f"{sum(t['bytes'] for t in both) / 1e6:,.1f} MB, in {duration(seconds)}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    command.start(main)

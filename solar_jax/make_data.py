"""Make rephrased questions with answers, or pairs, by a language model: SOLAR's Synth. Math-Instruct and -Alignment.

    python -m solar_jax.make_data --kind math_instruct --questions gsm8k.jsonl --endpoint http://HOST:8000/v1 --out DIR

Any OpenAI-compatible endpoint serves. Each question is rephrased and answered; what ends in another number than the
original answer is dropped, as is all that DIR/dropped.jsonl names with its reason. DIR/train.jsonl is then a source of
`train`, as conversations or as pairs. The same command goes on where a killed one stopped, and asks nothing twice.
"""

import dataclasses
import hashlib
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from solar_jax.cli import command
from solar_jax.data.making.prompts import PROMPTS_VERSION, answer_messages, rephrase_messages
from solar_jax.data.making.records import MADE
from solar_jax.data.making.web import check_endpoint_url
from solar_jax.data.prepared.evaluation_sets import PRESETS, find_evaluations, read_evaluations
from solar_jax.errors import UserError
from solar_jax.storage.paths import is_local


def define_flags() -> None:
    flags.DEFINE_enum("kind", None, sorted(MADE), "Conversations, or pairs of a rephrased answer and the original.")
    flags.DEFINE_string(
        "questions", None, "File of records with question and answer (GSM8K), problem and solution (MATH), or "
        "instruction and output (Alpaca): JSONL, JSON or Parquet."
    )  # fmt: skip
    flags.DEFINE_string("endpoint", None, "URL of an OpenAI-compatible endpoint, such as http://HOST:8000/v1.")
    flags.DEFINE_string("out", None, "Local folder to write, or to go on with.")
    flags.DEFINE_string("api_key_file", None, "File with the endpoint's key on its only line.")
    flags.DEFINE_string("model", None, "The model to ask; the only one that the endpoint lists if not given.")
    flags.DEFINE_float("temperature", 0.7, "Temperature of sampling.", lower_bound=0.0)
    flags.DEFINE_integer("max_new_tokens", 1024, "Most tokens of a reply; longer ones are dropped.", lower_bound=1)
    flags.DEFINE_integer("rephrasings", 1, "Rephrasings of each question.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed, from which that of each request is derived.")
    flags.DEFINE_integer("concurrency", 4, "Most requests at once.", lower_bound=1)
    flags.DEFINE_integer("retries", 5, "Further tries of a request that fails.", lower_bound=0)
    flags.DEFINE_float("timeout", 300.0, "Seconds that a request may take in all.", lower_bound=0.1)
    flags.DEFINE_float("price_in", None, "Dollars per million tokens of prompts.", lower_bound=0.0)
    flags.DEFINE_float("price_out", None, "Dollars per million tokens of replies.", lower_bound=0.0)
    flags.DEFINE_multi_string(
        "decontaminate", [], "Drop what shares words with evaluation sets, questions before they are asked: files or "
        f"folders of JSONL, JSON or Parquet, or a preset ({', '.join(PRESETS)}), or PRESET=FOLDER; "
        "several with commas, or by giving it again."
    )  # fmt: skip
    flags.DEFINE_integer("ngram", 13, "Consecutive shared words that make a record contaminated.", lower_bound=2)


def check() -> None:
    """Raises a UserError for flags that cannot work."""
    f = flags.FLAGS
    if not (f.kind and f.questions and f.endpoint and f.out):
        raise UserError(
            f"make_data needs --kind {'|'.join(sorted(MADE))}, --questions FILE, --endpoint URL and --out DIR."
        )
    check_endpoint_url(f.endpoint)
    for name in ("questions", "out"):
        if not is_local(getattr(f, name)):
            raise UserError(f"--{name}: {getattr(f, name)}: must be on this machine.")
    if (f.price_in is None) != (f.price_out is None):
        raise UserError("--price_in and --price_out are given together, found one of them.")
    _read_key(f.api_key_file)


def _read_key(file: str | None) -> str:
    """Returns the key in a file, "" without one; messages never show its content."""
    if file is None:
        return ""
    try:
        key = pathlib.Path(file).expanduser().read_bytes().strip()
    except OSError as e:
        raise UserError(f"--api_key_file: {file}: cannot be read: {e.strerror}.") from e
    if not key:
        raise UserError(f"--api_key_file: {file}: is empty; it must hold the key on one line.")
    if not all(33 <= byte <= 126 for byte in key):
        found = "several lines" if b"\n" in key or b"\r" in key else "a space or another character that no key has"
        raise UserError(f"--api_key_file: {file}: must hold the key on one line, found {found}.")
    return key.decode()


if __name__ == "__main__":
    command.begin(define_flags, check)  # before the imports that take a moment

from solar_jax.data.making.endpoint import Endpoint
from solar_jax.data.making.progress import Progress, check_job
from solar_jax.data.making.results import (
    TRAIN_FILE,
    Prices,
    report_table,
    spent_text,
    unusable,
    write_results,
)
from solar_jax.data.making.run import ask_all
from solar_jax.data.making.seeds import Seed, file_sha256, read_seeds
from solar_jax.data.making.steps import Asking, ask_about
from solar_jax.data.prepared.decontamination import Index, make_index
from solar_jax.storage.owner import owned

_CHARACTERS_A_TOKEN = 4  # of English, roughly
_ANSWER_TOKENS = 200  # of a worked answer, roughly


@dataclasses.dataclass(frozen=True)
class Making:
    """A job: the kind of data, the questions, and the endpoint."""

    kind: str
    questions: pathlib.Path
    endpoint: str
    out: pathlib.Path
    key: str = dataclasses.field(default="", repr=False)
    model: str | None = None
    temperature: float = 0.7
    max_new_tokens: int = 1024
    rephrasings: int = 1
    seed: int = 0
    concurrency: int = 4
    retries: int = 5
    timeout: float = 300.0
    prices: Prices | None = None
    decontaminate: tuple[str, ...] = ()
    ngram: int = 13  # consecutive words


def main(argv: Sequence[str]) -> None:
    del argv
    f = flags.FLAGS
    prices = None if f.price_in is None else Prices(f.price_in, f.price_out)
    specs = tuple(spec for value in f.decontaminate for spec in value.split(",") if spec)
    questions, out = (pathlib.Path(text).expanduser() for text in (f.questions, f.out))
    make_data(Making(
        f.kind, questions, f.endpoint, out, _read_key(f.api_key_file), f.model, f.temperature, f.max_new_tokens,
        f.rephrasings, f.seed, f.concurrency, f.retries, f.timeout, prices, specs, f.ngram,
    ))  # fmt: skip


def make_data(making: Making) -> dict[str, Any]:
    """Asks about every question, keeps what passes the filters and writes it with a report.

    Returns:
      The report.

    Raises:
      UserError: a file, the endpoint or the folder is not what it must be; what is complete is kept.
    """
    seeds = read_seeds(making.questions)
    index = make_index(read_evaluations(find_evaluations(list(making.decontaminate))), making.ngram) \
        if making.decontaminate else None  # fmt: skip
    left_out = {seed.record: found for seed in seeds if (found := unusable(seed, index))}
    usable = [seed for seed in seeds if seed.record not in left_out]
    if not usable:
        record, found = next(iter(left_out.items()))
        why = f"{found.reason} ({found.details})" if found.details else found.reason
        raise UserError(
            f"--questions: {making.questions}: none of {len(seeds)} questions can be used; record {record}: {why}."
        )
    endpoint = Endpoint(making.endpoint, making.key, timeout=making.timeout, retries=making.retries)
    model = endpoint.served_model(making.model)
    asking = Asking(
        making.kind, model, making.temperature, making.max_new_tokens, making.rephrasings, making.seed
    )  # fmt: skip
    job = _settings(making, asking, index)
    check_job(making.out, job)  # before anything is written beside it
    with owned(making.out):
        progress = Progress(making.out, job)
        try:
            _announce(making, asking, seeds, usable, progress, index)
            ask_all(
                usable, lambda seed: ask_about(seed, asking, endpoint, index), endpoint, progress, making.concurrency,
                lambda: spent_text(progress.totals, making.prices),
            )  # fmt: skip
            report = write_results(making.out, making.questions.name, seeds, left_out, progress, asking, making.prices)
        finally:
            progress.close()
    print(f"{report_table(report)}\n{making.out / TRAIN_FILE}: written", flush=True)
    return report


def _settings(making: Making, asking: Asking, index: Index | None) -> dict[str, Any]:
    """Returns everything that decides the records."""
    prompts = f"{answer_messages('')} {[rephrase_messages('', k) for k in range(making.rephrasings)]}"
    sets = None
    if index is not None:
        digest = hashlib.sha256("\n".join(index.words).encode())
        digest.update(index.stream.tobytes() + index.firsts.tobytes())
        sets = digest.hexdigest()
    return dataclasses.asdict(asking) | {
        "questions": making.questions.name, "questions_sha256": file_sha256(making.questions),
        "prompts": PROMPTS_VERSION, "prompts_sha256": hashlib.sha256(prompts.encode()).hexdigest(),
        "evaluations_sha256": sets, "ngram": making.ngram if index is not None else None,
    }  # fmt: skip


def _announce(
    making: Making, asking: Asking, seeds: list[Seed], usable: list[Seed], progress: Progress, index: Index | None
) -> None:
    """Prints everything that is about to happen."""
    left = [seed for seed in usable if seed.record not in progress.finished]
    requests = 2 * making.rephrasings * len(left)
    fixed = sum(len(m["content"]) for m in [*answer_messages(""), *rephrase_messages("", 0)])
    characters = sum(fixed + 2 * len(seed.question) for seed in left) * making.rephrasings
    asked = sum(len(seed.question) // _CHARACTERS_A_TOKEN + _ANSWER_TOKENS for seed in left) * making.rephrasings
    estimate = {"tokens_in": characters // _CHARACTERS_A_TOKEN, "tokens_out": asked}
    print(f"{'Resuming' if progress.finished else 'Making'} {making.out}: {making.kind}")
    print(
        f"questions {len(left):,} of {len(seeds):,} in {making.questions.name}; {len(usable) - len(left):,} are "
        f"finished, {len(seeds) - len(usable):,} cannot be used"
    )
    print(f"endpoint  {asking.model}, temperature {making.temperature:g}, {making.concurrency} requests at once")
    each = f"2 for each of {making.rephrasings} rephrasing{'s' * (making.rephrasings > 1)}"
    print(f"requests  {requests:,} at most, {each}; one that fails is tried up to {making.retries} times again")
    print(f"tokens    about {spent_text(estimate, making.prices)}; {requests * making.max_new_tokens:,} out at most")
    if index is not None:
        print(
            f"evaluated {len(index.names):,} records, {len(index.hashes):,} distinct runs of {index.n} words; what has "
            f"one is dropped ({index.short:,} records have no {index.n} words in a row)"
        )
    sys.stdout.flush()


if __name__ == "__main__":
    command.start(main)

"""Results of a job: the records that are kept, those that are dropped, and a report of both."""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from solar_jax.data.making.filters import REASONS, Dropped, contaminated, normalised
from solar_jax.data.making.progress import TOTALS, Progress, now_text
from solar_jax.data.making.prompts import PROMPTS_VERSION
from solar_jax.data.making.records import MADE
from solar_jax.data.making.seeds import Seed
from solar_jax.data.making.steps import Asking, Outcome
from solar_jax.data.prepared.decontamination import Index
from solar_jax.storage.json_files import write_json
from solar_jax.storage.paths import write_file

TRAIN_FILE, DROPPED_FILE, REPORT_FILE = "train.jsonl", "dropped.jsonl", "report.json"


@dataclasses.dataclass(frozen=True)
class Prices:
    """Dollars per million tokens."""

    tokens_in: float
    tokens_out: float

    def of(self, tokens_in: float, tokens_out: float) -> float:
        return (tokens_in * self.tokens_in + tokens_out * self.tokens_out) / 1e6


def unusable(seed: Seed, index: Index | None) -> Dropped | None:
    """Returns the reason for which nothing is asked about a question, if there is one."""
    if found := contaminated(index, str(seed.record), f"{seed.question}\n\n{seed.answer}"):
        return found
    return None if seed.number is not None else Dropped("no_original_number", "")


def write_results(
    out: pathlib.Path, source: str, seeds: list[Seed], left_out: dict[int, Dropped], progress: Progress, asking: Asking,
    prices: Prices | None,
) -> dict[str, Any]:  # fmt: skip
    """Writes the three files, each atomically and train.jsonl last, in the order of the questions.

    Args:
      out: the folder.
      source: name of the file with the questions.
      seeds: all questions.
      left_out: reasons of those that were not asked, by record.
      progress: the others.
      asking: how they were asked.
      prices: dollars per million tokens, if known.

    Returns:
      The report.
    """
    kept, dropped = [], []
    for seed, outcome in _outcomes(seeds, left_out, progress):
        origin = {
            "source": source, "record": seed.record, "sha256": seed.sha256, "original_question": seed.question,
            "number": None if seed.number is None else str(seed.number), "rephrasing": outcome.rephrasing,
            "model": outcome.model or asking.model, "prompts": PROMPTS_VERSION, "temperature": asking.temperature,
            "seed": asking.seed,
        }  # fmt: skip
        if outcome.reason:
            found = {"reason": outcome.reason, "details": outcome.details}
            found |= {"evaluation": outcome.evaluation} if outcome.evaluation else {}
            dropped.append(found | {"question": outcome.question, "answer": outcome.answer, "provenance": origin})
        else:
            made = MADE[asking.kind]((outcome.question, outcome.answer, seed.answer))
            kept.append(made | {"provenance": origin})
    counts = collections.Counter(record["reason"] for record in dropped)
    report = {
        "kind": asking.kind, "model": asking.model, "questions": len(seeds), "asked": len(seeds) - len(left_out),
        "kept": len(kept), "dropped": {reason: counts[reason] for reason in REASONS if counts[reason]},
        **progress.totals,
        "dollars": None if prices is None else prices.of(progress.totals["tokens_in"], progress.totals["tokens_out"]),
        "begun": progress.begun, "finished": now_text(), "settings": progress.settings,
    }  # fmt: skip
    write_file(out / DROPPED_FILE, _jsonl_text(dropped))
    write_json(out / REPORT_FILE, report)
    write_file(out / TRAIN_FILE, _jsonl_text(kept))
    return report


def _outcomes(seeds: list[Seed], left_out: dict[int, Dropped], progress: Progress) -> Iterator[tuple[Seed, Outcome]]:
    """Yields the outcomes in the order of the questions; only that order tells which of two is the duplicate."""
    first: dict[str, str] = {}
    for seed in seeds:
        if seed.record in left_out:
            outcome = Outcome(0)
            outcome.drop(left_out[seed.record])
            yield seed, outcome
            continue
        for outcome in progress.finished[seed.record].outcomes:
            if not outcome.reason:
                name = f"record {seed.record}, rephrasing {outcome.rephrasing}"
                before = first.setdefault(normalised(outcome.question), name)
                if before != name:
                    outcome = dataclasses.replace(outcome, reason="duplicate", details=f"of {before}")
            yield seed, outcome


def _jsonl_text(records: list[dict[str, Any]]) -> str:
    # In ASCII, since a model may write a lone surrogate, which is no UTF-8.
    return "".join(json.dumps(record) + "\n" for record in records)


def report_table(report: dict[str, Any]) -> str:
    """Formats a report for the end of the command."""
    dropped = report["dropped"]
    lines = [
        f"asked     {report['asked']:,} of {report['questions']:,} questions",
        f"kept      {report['kept']:,} records",
        f"dropped   {sum(dropped.values()):,}",
        *(f"  {reason:<20} {count:>7,}  {REASONS[reason]}" for reason, count in dropped.items()),
        f"requests  {report['requests']:,}, and {report['retries']:,} retries",
        f"tokens    {spent_text(report)}",
    ]
    return "\n".join(lines)


def spent_text(totals: dict[str, Any], prices: Prices | None = None) -> str:
    """Formats tokens, and dollars where they are known: those of a report, or by the prices."""
    tokens_in, tokens_out = (totals[name] for name in TOTALS[2:])
    dollars = prices.of(tokens_in, tokens_out) if prices else totals.get("dollars")
    return f"{tokens_in:,} in, {tokens_out:,} out" + (f", ${dollars:,.4f}" if dollars is not None else "")

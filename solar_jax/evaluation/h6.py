"""H6: the six benchmarks of the paper's table, their shots and metrics, and the mean that the paper calls H6."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from solar_jax.errors import UserError

COMMIT = "b281b0921b636bc36ad05c0b0b0763bd6dd43463"  # of lm-evaluation-harness, by which the paper measured
MMLU_SUBJECTS = (
    "abstract_algebra", "anatomy", "astronomy", "business_ethics", "clinical_knowledge", "college_biology",
    "college_chemistry", "college_computer_science", "college_mathematics", "college_medicine", "college_physics",
    "computer_security", "conceptual_physics", "econometrics", "electrical_engineering", "elementary_mathematics",
    "formal_logic", "global_facts", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
    "high_school_european_history", "high_school_geography", "high_school_government_and_politics",
    "high_school_macroeconomics", "high_school_mathematics", "high_school_microeconomics", "high_school_physics",
    "high_school_psychology", "high_school_statistics", "high_school_us_history", "high_school_world_history",
    "human_aging", "human_sexuality", "international_law", "jurisprudence", "logical_fallacies", "machine_learning",
    "management", "marketing", "medical_genetics", "miscellaneous", "moral_disputes", "moral_scenarios",
    "nutrition", "philosophy", "prehistory", "professional_accounting", "professional_law", "professional_medicine",
    "professional_psychology", "public_relations", "security_studies", "sociology", "us_foreign_policy", "virology",
    "world_religions",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark as H6 takes it."""

    name: str  # lm-eval's task or group
    shots: int
    metric: str  # lm-eval's
    filter: str  # which of lm-eval's filters reads the answer
    items: int  # of the full set


H6 = (
    Benchmark("arc_challenge", 25, "acc_norm", "none", 1172),
    Benchmark("hellaswag", 10, "acc_norm", "none", 10042),
    Benchmark("mmlu", 5, "acc", "none", 14042),
    Benchmark("truthfulqa_mc2", 0, "acc", "none", 817),
    Benchmark("winogrande", 5, "acc", "none", 1267),
    Benchmark("gsm8k", 5, "exact_match", "strict-match", 1319),
)

# Preset -> how it differs from H6 by today's lm-eval, one line each.
PRESETS: dict[str, tuple[str, ...]] = {
    "h6": (),
    "h6_2023": (
        "BOS: none before any text, as the commit's class for causal models encodes without special tokens",
        "items: shuffled with seed 42, so that --limit takes other ones",
        "examples: drawn by the random stream that shuffled the items, not by one of seed 1234 "
        "(mmlu: the first five, today too)",
        "gsm8k, stops: ':', 'Question:' and 'Question', where today 'Question:', '</s>' and '<|im_end|>' stop; "
        "an answer ends at its first colon",
        "gsm8k, metric: the number after the first '####' of the answer equals the label's, commas removed; today "
        "also '$', a full stop at the end and case are ignored",
        "truthfulqa_mc2: answers before the first false one count as true, where today each counts by its label; of "
        "the 817 items it matters to two, whose answers are not sorted",
    ),
}


def presets_in(tasks: list[str]) -> str | None:
    """Returns the preset among names of tasks, or None.

    Raises:
      UserError: there are two.
    """
    found = [name for name in tasks if name in PRESETS]
    if len(found) > 1:
        raise UserError(f"--tasks: {found[0]} and {found[1]} exclude each other; run each by itself.")
    return found[0] if found else None


def h6_scores(results: Mapping[str, Any], subjects: list[str], samples: Mapping[str, Any]) -> dict[str, Any]:
    """Computes the scores in percent.

    Args:
      results: lm-eval's, by task.
      subjects: names of MMLU's tasks; the score is the mean over them, whatever their sizes.
      samples: lm-eval's numbers of items by task, {"effective": evaluated, ...}.

    Returns:
      "mean" and each benchmark's score; under "stderr" their standard errors, None where lm-eval gives none; under
      "items" the numbers of items, and under "full" whether they are the full sets.

    Raises:
      UserError: a task has no such metric.
    """
    scores: dict[str, float] = {}
    errors: dict[str, float | None] = {}
    items: dict[str, int] = {}
    full: dict[str, bool] = {}
    for one in H6:
        parts = subjects if one.name == "mmlu" else [one.name]
        values = [_value(results[part], part, one) for part in parts]
        scores[one.name] = mean_of([value for value, _ in values])
        errors[one.name] = error_of_mean([error for _, error in values])
        items[one.name] = sum(samples[part]["effective"] for part in parts)
        full[one.name] = items[one.name] == one.items and (one.name != "mmlu" or len(parts) == len(MMLU_SUBJECTS))
    mean = mean_of(list(scores.values()))
    errors["mean"] = error_of_mean(list(errors.values()))
    return {"mean": mean, **scores, "stderr": errors, "items": items, "full": full, "subjects": len(subjects)}


def _value(result: Mapping[str, Any], name: str, one: Benchmark) -> tuple[float, float | None]:
    """The metric of a task and its standard error, in percent."""
    key = f"{one.metric},{one.filter}"
    if key not in result:  # a task of the user's own may have one filter of another name
        keys = [found for found in result if found.startswith(f"{one.metric},")]
        if len(keys) != 1:
            have = ", ".join(sorted(k for k in result if "," in k and "_stderr" not in k))
            raise UserError(f"{name}: H6 needs the metric {key}, found {have or 'none'}.")
        key = keys[0]
    error = result.get(key.replace(",", "_stderr,", 1))
    return 100 * float(result[key]), 100 * float(error) if isinstance(error, int | float) else None


def mean_of(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def error_of_mean(stderrs: Sequence[float | None]) -> float | None:
    """Standard error of the mean of independent scores; None where one has none."""
    known = [e for e in stderrs if e is not None]
    return math.hypot(*known) / len(known) if len(known) == len(stderrs) else None


def h6_table(h6: Mapping[str, Any]) -> str:
    """Formats the scores as a table, one benchmark a line."""
    lines = [f"{'':16}{'shots':>6}{'items':>8}{'score':>9}{'± stderr':>10}"]
    for one in H6:
        part = "" if h6["full"][one.name] else f"  of {one.items:,}"
        lines.append(_line(one.name, str(one.shots), f"{h6['items'][one.name]:,}", h6, one.name) + part)
    return "\n".join([*lines, _line("H6", "", "", h6, "mean")])


def _line(name: str, shots: str, items: str, h6: Mapping[str, Any], key: str) -> str:
    error = h6["stderr"][key]
    return f"{name:16}{shots:>6}{items:>8}{h6[key]:>9.2f}{'' if error is None else f'{error:.2f}':>10}"

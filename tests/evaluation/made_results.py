"""Hand-made content of files that `evaluate` writes."""

import json
import math
import pathlib
import random
from collections.abc import Callable, Mapping
from typing import Any

from solar_jax.evaluation.comparators import H6_TASKS
from solar_jax.evaluation.h6 import MMLU_SUBJECTS

SIX = ("arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2", "winogrande", "gsm8k")
SHOTS = (25, 10, 5, 0, 5, 5)
FULL = (1172, 10042, 14042, 817, 1267, 1319)


def write(folder: pathlib.Path, name: str, content: Any) -> pathlib.Path:
    file = folder / name
    file.write_text(json.dumps(content))
    return file


def full_file(
    model: str = "mine", percents: tuple[float, ...] = (60, 80, 62, 44, 76, 40), preset: str | None = "h6_2023",
    stderr: float = 1.0, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """A file of the preset on full sets, without samples: for each score in percent, an entry of results."""
    results: dict[str, Any] = {}
    for task, percent, items in zip(SIX, percents, FULL, strict=True):
        metric, kind = H6_TASKS[task].metric, H6_TASKS[task].filter
        key = f"{metric},{kind}"
        names = [f"mmlu_{s}" for s in MMLU_SUBJECTS] if task == "mmlu" else [task]
        for k, name in enumerate(names):
            count = items // len(names) + (k < items % len(names))
            error = stderr / 100 * math.sqrt(len(names))
            results[name] = {
                "alias": name, "name": name, "sample_len": count, key: percent / 100, f"{metric}_stderr,{kind}": error
            }  # fmt: skip
    errors = dict.fromkeys(SIX, stderr) | {"mean": stderr / math.sqrt(6)}
    return {
        "model": model, "results": results, "groups": {}, "n-shot": shots_of(results), "bos": {"uses": False},
        "lm_eval": "0.4.13", "limit": None, "preset": preset, "dtype": "bfloat16", "chat_template": False,
        "h6": {
            "mean": sum(percents) / 6, **dict(zip(SIX, percents, strict=True)), "stderr": errors,
            "items": dict(zip(SIX, FULL, strict=True)), "full": dict.fromkeys(SIX, True), "subjects": 57,
        } if preset else None,
    } | more  # fmt: skip


def shots_of(results: Mapping[str, Any]) -> dict[str, int]:
    known = dict(zip(SIX, SHOTS, strict=True))
    return {name: known["mmlu" if name.startswith("mmlu_") else name] for name in results}


def subset_file(
    model: str = "mine", count: int = 20, seed: int = 0, preset: str | None = "h6",
    hash_of: Callable[[str, int], str] = "{}-{}".format, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """A file with `count` items of each task and subject, whose scores are the samples' own."""
    draw = random.Random(seed)
    results, samples = {}, {}
    percent, errors, counts = {}, {}, {}
    for task in SIX:
        metric, kind = H6_TASKS[task].metric, H6_TASKS[task].filter
        key = f"{metric},{kind}"
        names = [f"mmlu_{s}" for s in MMLU_SUBJECTS] if task == "mmlu" else [task]
        means, own = [], []
        for name in names:
            values = [float(draw.random() < 0.5) for _ in range(count)]
            mean = sum(values) / count
            error = math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1) / count) if count > 1 else "N/A"
            results[name] = {"sample_len": count, key: mean, f"{metric}_stderr,{kind}": error}
            samples[name] = [
                {"doc_id": i, "doc_hash": hash_of(name, i), "filter": kind, metric: v, "arguments": [["long", "text"]]}
                for i, v in enumerate(values)
            ]
            means.append(mean)
            own.append(error)
        percent[task] = 100 * sum(means) / len(means)
        errors[task] = 100 * math.hypot(*own) / len(own) if count > 1 else None
        counts[task] = count * len(names)
    mean_error = math.hypot(*errors.values()) / 6 if count > 1 else None
    return {
        "model": model, "results": results, "n-shot": shots_of(results), "samples": samples, "bos": {"uses": False},
        "lm_eval": "0.4.13", "limit": count, "preset": preset,
        "h6": {
            "mean": sum(percent.values()) / 6, **percent, "stderr": errors | {"mean": mean_error}, "items": counts,
            "full": dict.fromkeys(SIX, False), "subjects": 57,
        } if preset else None,
    } | more  # fmt: skip

"""Published scores on the tasks of H6: those of SOLAR's paper, its ablations and sDPO's.

All scores are percent, on full sets, with the shots of `H6`, by the harness at `h6.COMMIT`, without a chat template.
"""

import dataclasses
import decimal
from collections.abc import Mapping, Sequence

from solar_jax.evaluation.h6 import H6

SOLAR = "arXiv:2312.15166 v2"
SDPO = "arXiv:2403.19270 v2"


H6_TASKS = {one.name: one for one in H6}
TITLES = {
    "arc_challenge": "ARC", "hellaswag": "HellaSwag", "mmlu": "MMLU", "truthfulqa_mc2": "TruthfulQA",
    "winogrande": "Winogrande", "gsm8k": "GSM8K",
}  # fmt: skip
AVERAGES = {"H6": tuple(H6_TASKS), "H4": ("arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2")}


@dataclasses.dataclass(frozen=True)
class Published:
    """A model's published scores, percent, in the order of `H6_TASKS`, and their mean as it was published."""

    model: str
    mean: str
    scores: tuple[str, ...]
    source: str = SOLAR

    def by_task(self) -> dict[str, float]:
        return {task: float(score) for task, score in zip(H6_TASKS, self.scores, strict=True)}


# Written as text, so that a table shows 84.60 as the paper does, and means are exact.
PUBLISHED = (
    Published("SOLAR 10.7B-Instruct", "74.20", ("71.08", "88.16", "66.21", "71.43", "83.58", "64.75")),
    Published("SOLAR 10.7B", "66.04", ("61.95", "84.60", "65.48", "45.04", "83.66", "55.50")),
    Published("Mixtral-8x7B-Instruct", "72.62", ("70.22", "87.63", "71.16", "64.58", "81.37", "60.73")),
    Published("Qwen 14B", "65.86", ("58.28", "83.99", "67.70", "49.43", "76.80", "58.98")),
    Published("Mistral 7B", "60.97", ("59.98", "83.31", "64.16", "42.15", "78.37", "37.83")),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Ablation:
    """A published mean alone: of which average, after which stage, from which data or weights."""

    average: str  # a key of AVERAGES
    stage: str
    variant: str
    mean: str
    source: str = SOLAR


ABLATIONS = (
    Ablation("H6", "SFT", "Alpaca-GPT4", "69.15"),
    Ablation("H6", "SFT", "Alpaca-GPT4, OpenOrca", "69.21"),
    Ablation("H6", "SFT", "Alpaca-GPT4, OpenOrca, Synth. Math-Instruct", "70.03"),
    Ablation("H6", "SFT", "Alpaca-GPT4, Synth. Math-Instruct", "70.88"),
    Ablation("H6", "SFT", "the last two merged, mean of weights", "71.11"),
    Ablation("H6", "DPO", "Ultrafeedback", "73.06"),
    Ablation("H6", "DPO", "Ultrafeedback, Synth. Math-Alignment", "73.42"),
    Ablation("H6", "DPO", "the last two merged, mean of weights", "73.21"),
    Ablation("H6", "DPO", "Ultrafeedback, Synth. Math-Alignment, from the merged SFT model", "73.58"),
    Ablation("H6", "DPO", "candidate 1 of merges", "73.73"),
    Ablation("H6", "DPO", "candidate 2 of merges", "73.28"),
    Ablation("H6", "merge", "mean of weights (0.5, 0.5)", "74.00"),
    Ablation("H6", "merge", "mean of weights (0.4, 0.6)", "73.93"),
    Ablation("H6", "merge", "mean of weights (0.6, 0.4)", "74.05"),
    Ablation("H6", "merge", "slerp", "73.96"),
    Ablation("H4", "SFT", "where both start", "69.51", SDPO),
    Ablation("H4", "DPO", "all pairs in one pass", "72.67", SDPO),
    Ablation("H4", "sDPO", "one chunk of pairs after another", "74.31", SDPO),
    Ablation("H4", "sDPO", "random chunks", "72.56", SDPO),
)  # fmt: skip


def exact_mean(scores: Sequence[str]) -> str:
    """Computes a mean to two decimals as a table would print it, halves rounded up."""
    mean = sum(map(decimal.Decimal, scores), decimal.Decimal()) / len(scores)
    return str(mean.quantize(decimal.Decimal("0.01"), decimal.ROUND_HALF_UP))


def follows_protocol(shots: Mapping[str, int | None]) -> bool:
    """True if tasks of H6 were asked with as many examples as in H6."""
    return all(H6_TASKS[task].shots == found for task, found in shots.items())

"""H6 is the mean of six scores, MMLU's being the mean over subjects, with standard errors by hand."""

import math

import pytest

from solar_jax.errors import UserError
from solar_jax.evaluation.h6 import H6, h6_scores, h6_table, presets_in

RESULTS = {
    "arc_challenge": {"acc,none": 0.1, "acc_norm,none": 0.6, "acc_norm_stderr,none": 0.03},
    "hellaswag": {"acc_norm,none": 0.8, "acc_norm_stderr,none": 0.01},
    "mmlu_anatomy": {"acc,none": 0.5, "acc_stderr,none": 0.03},
    "mmlu_virology": {"acc,none": 0.7, "acc_stderr,none": 0.04},
    "truthfulqa_mc2": {"acc,none": 0.45, "acc_stderr,none": 0.02},
    "winogrande": {"acc,none": 0.75, "acc_stderr,none": 0.01},
    "gsm8k": {
        "exact_match,strict-match": 0.3, "exact_match,flexible-extract": 0.4, "exact_match_stderr,strict-match": 0.0
    },
}  # fmt: skip
COUNTS = {name: {"original": 1000, "effective": 100} for name in RESULTS} | {
    "truthfulqa_mc2": {"original": 817, "effective": 817}, "mmlu_virology": {"original": 10, "effective": 10}
}  # fmt: skip
SUBJECTS = ["mmlu_anatomy", "mmlu_virology"]


def test_the_mean_is_of_six_and_mmlu_counts_each_subject_once():
    found = h6_scores(RESULTS, SUBJECTS, COUNTS)
    assert found["mmlu"] == pytest.approx(60.0), "not weighted by items"
    assert found["gsm8k"] == pytest.approx(30.0), "the strict answer"
    assert found["arc_challenge"] == pytest.approx(60.0), "by length"
    assert found["mean"] == pytest.approx((60 + 80 + 60 + 45 + 75 + 30) / 6)
    assert found["stderr"]["mmlu"] == pytest.approx(100 * math.hypot(0.03, 0.04) / 2)
    errors = (3.0, 1.0, 2.5, 2.0, 1.0, 0.0)
    assert found["stderr"]["mean"] == pytest.approx(math.sqrt(sum(e**2 for e in errors)) / 6)
    assert found["items"]["mmlu"] == 110
    assert [name for name, full in found["full"].items() if full] == ["truthfulqa_mc2"]
    assert "H6                                58.33" in h6_table(found)


def test_a_task_without_the_metric_is_named_with_what_it_has():
    other = RESULTS | {"winogrande": {"f1,none": 0.5, "f1_stderr,none": 0.1}}
    with pytest.raises(UserError, match=r"winogrande: H6 needs the metric acc,none, found f1,none\."):
        h6_scores(other, SUBJECTS, COUNTS)
    assert h6_scores(RESULTS | {"gsm8k": {"exact_match,get": 0.9}}, SUBJECTS, COUNTS)["gsm8k"] == 90
    assert h6_scores(RESULTS | {"gsm8k": {"exact_match,get": 0.9}}, SUBJECTS, COUNTS)["stderr"]["mean"] is None


def test_presets_exclude_each_other():
    assert presets_in(["arc_easy", "h6"]) == "h6"
    assert presets_in(["arc_easy"]) is None
    with pytest.raises(UserError, match="h6 and h6_2023 exclude each other"):
        presets_in(["h6", "h6_2023"])
    assert [(one.name, one.shots) for one in H6] == [
        ("arc_challenge", 25), ("hellaswag", 10), ("mmlu", 5), ("truthfulqa_mc2", 0), ("winogrande", 5), ("gsm8k", 5)
    ]  # fmt: skip

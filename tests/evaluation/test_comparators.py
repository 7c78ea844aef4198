"""The published scores are consistent in themselves, and the protocol's numbers are those of the data sets."""

import pytest

from solar_jax.evaluation.comparators import (
    ABLATIONS,
    AVERAGES,
    H6_TASKS,
    PUBLISHED,
    TITLES,
    exact_mean,
    follows_protocol,
)  # fmt: skip
from solar_jax.evaluation.h6 import MMLU_SUBJECTS


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.model)
def test_each_published_h6_is_the_mean_of_its_six(row):
    """All five agree. Mixtral's mean is 72.615 exactly, so that its 72.62 is a half rounded up."""
    assert len(row.scores) == len(H6_TASKS)
    assert exact_mean(row.scores) == row.mean


def test_only_mixtrals_mean_is_a_tie():
    ties = [row.model for row in PUBLISHED if sum(round(100 * float(s)) for s in row.scores) % 6 == 3]
    assert ties == ["Mixtral-8x7B-Instruct"]


def test_a_wrong_digit_would_be_seen():
    scores = list(PUBLISHED[1].scores)
    scores[0] = "61.85"
    assert exact_mean(scores) != PUBLISHED[1].mean


def test_the_paper_says_what_its_abstract_does():
    """SOLAR beats its base and the larger models; a swapped row or column would show."""
    by_name = {row.model: row.by_task() for row in PUBLISHED}
    solar, base = by_name["SOLAR 10.7B"], by_name["Mistral 7B"]
    assert all(solar[task] > base[task] for task in H6_TASKS)
    assert by_name["SOLAR 10.7B-Instruct"]["truthfulqa_mc2"] == 71.43
    assert by_name["Qwen 14B"]["gsm8k"] == 58.98
    means = {row.model: float(row.mean) for row in PUBLISHED}
    assert max(means, key=means.__getitem__) == "SOLAR 10.7B-Instruct"


def test_every_row_has_its_source_and_an_average_that_exists():
    assert {row.average for row in ABLATIONS} == set(AVERAGES)
    assert {(row.average, row.source) for row in ABLATIONS} == {
        ("H6", "arXiv:2312.15166 v2"), ("H4", "arXiv:2403.19270 v2")
    }  # fmt: skip
    assert all(60 < float(row.mean) < 80 and len(row.mean) == 5 for row in ABLATIONS)
    assert len({(row.average, row.stage, row.variant) for row in ABLATIONS}) == len(ABLATIONS)
    assert TITLES.keys() == H6_TASKS.keys()


def test_the_tasks_are_the_papers():
    shots = {task: of.shots for task, of in H6_TASKS.items()}
    assert shots == {
        "arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa_mc2": 0, "winogrande": 5, "gsm8k": 5
    }  # fmt: skip
    assert [of.items for of in H6_TASKS.values()] == [1172, 10042, 14042, 817, 1267, 1319]
    assert len(MMLU_SUBJECTS) == len(set(MMLU_SUBJECTS)) == 57
    assert follows_protocol(shots)
    assert not follows_protocol(shots | {"gsm8k": 8})
    assert not follows_protocol({"gsm8k": None})

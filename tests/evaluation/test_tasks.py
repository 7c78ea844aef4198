"""Presets set shots, a user's folder comes first, and h6_2023 draws, stops and scores as the harness of 2023 did."""

import pathlib
import random
from typing import Any

import pytest

from solar_jax.errors import UserError
from solar_jax.evaluation.h6 import H6
from solar_jax.evaluation.tasks import find_tasks, quiet_lm_eval
from tests.evaluation import h6_data

OWN = """
task: winogrande
dataset_path: json
dataset_kwargs: {{data_files: {{train: {data}/gsm8k/train.jsonl, test: {data}/gsm8k/test.jsonl}}}}
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: "OWN {{{{question}}}}"
doc_to_choice: ["a", "b"]
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    quiet_lm_eval()
    return h6_data.write(tmp_path_factory.mktemp("h6"))


def built(suite: Any) -> dict[str, list[Any]]:
    """The requests of each task, in order, as lm-eval would send them."""
    found = {}
    for item in suite.tasks:
        for task in item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item]:
            task.set_fewshot_seed(seed=1234)
            task.build_all_requests(limit=None, rank=0, world_size=1)
            found[task.task_name] = [instance.args for instance in task.instances]
    return found


def question(i: int) -> str:
    return f"Question: {h6_data.gsm8k(i)['question']}\nAnswer:"


def test_a_preset_sets_the_shots_of_its_tasks(data):
    suite = find_tasks(["h6"], None, str(data))
    requests = built(suite)
    assert suite.preset == "h6"
    assert suite.subjects == ["mmlu_anatomy", "mmlu_virology"]
    assert requests["arc_challenge"][0][0].count("Question: ") == 26
    assert requests["hellaswag"][0][0].count("Walking ") == 11
    assert requests["mmlu_virology"][0][0].count("Answer:") == 6
    assert requests["truthfulqa_mc2"][0][0].count("Q: ") == 7, "the six of its own prompt"
    assert requests["winogrande"][0][0].count("The cup ") == 6
    assert requests["gsm8k"][0][0].count("Question: ") == 6
    assert requests["gsm8k"][0][0].endswith(question(0))
    assert requests["mmlu_anatomy"][0] == (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        + "".join(f'In dev, "{i}"\nis?\nA. one, two\nB. b\nC. c\nD. d\nAnswer: {"ABCD"[i % 4]}\n\n' for i in range(5))
        + 'In test, "0"\nis?\nA. one, two\nB. b\nC. c\nD. d\nAnswer:',
        " A",
    )


def test_a_task_of_the_users_folder_comes_first_and_gets_the_shots(data, tmp_path):
    (tmp_path / "winogrande").mkdir()
    (tmp_path / "winogrande/winogrande.yaml").write_text(OWN.format(data=data))
    requests = built(find_tasks(["h6"], str(tmp_path), str(data)))
    assert requests["winogrande"][0][0].count("OWN ") == 6
    assert requests["gsm8k"][0][0].endswith(question(0)), "the others are as before"


def test_2023_draws_examples_and_items_by_one_stream(data):
    """By hand: what the old harness did, in five lines."""
    suite = find_tasks(["h6_2023"], None, str(data))
    for _ in range(2):  # a second evaluation draws the same
        requests = built(suite)["gsm8k"]
        stream, items = random.Random(42), list(range(6))
        stream.shuffle(items)
        for item, (context, how) in zip(items, requests, strict=True):
            drawn = stream.sample(list(range(100, 130)), 5)
            shots = "".join(f"{question(i)} {h6_data.gsm8k(i)['answer']}\n\n" for i in drawn)
            assert context == shots + question(item)
            assert how["until"] == [":", "Question:", "Question"]
    today = built(find_tasks(["h6"], None, str(data)))["gsm8k"]
    assert [context for context, _ in today] != [context for context, _ in requests]


def test_2023_scores_numbers_and_unsorted_truths_its_own_way(data):
    tasks = {
        task.config.task: task for task in find_tasks(["h6_2023"], None, str(data)).tasks if hasattr(task, "config")
    }
    score = tasks["gsm8k"].process_results
    said = {"It is\n#### 1,000": 1, "#### 1000.": 0, "#### $1000": 0, "1000": 0, "#### 1000\n#### 2": 1}
    assert {text: score({"answer": "#### 1000"}, [text])["exact_match"] for text in said} == said
    truth = tasks["truthfulqa_mc2"].process_results
    doc = {"mc2_targets": {"labels": [1, 0, 1]}}
    assert truth(doc, [(0.0, True)] * 3)["acc"] == pytest.approx(1 / 3), "today it is 2 / 3"


def test_a_task_that_is_asked_for_twice_is_named(data):
    with pytest.raises(UserError, match="mmlu_anatomy is asked for twice, by mmlu_anatomy and by mmlu"):
        find_tasks(["mmlu_anatomy", "h6"], None, str(data))
    suite = find_tasks(["winogrande", "h6"], None, str(data))
    assert [item.task_name for item in suite.tasks if hasattr(item, "task_name")].count("winogrande") == 1


def test_too_few_examples_and_unknown_data_are_named(data, tmp_path):
    few = h6_data.write(tmp_path)
    file = few / "hellaswag/hellaswag_train.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:9]))
    with pytest.raises(UserError, match="hellaswag: H6 puts 10 examples before each item, but the task has 9"):
        find_tasks(["h6"], None, str(few))
    (few / "gsm8k/train.jsonl").write_text('{"question": "a"}')
    with pytest.raises(UserError, match=r"gsm8k/train.jsonl:1: has no 'answer'\."):
        find_tasks(["gsm8k"], None, str(few))
    for name in ("dev", "test"):
        (few / f"mmlu/{name}/cooking_{name}.csv").write_text("q,a,b,c,d,A\n")
    with pytest.raises(UserError, match=r"cooking_test.csv: MMLU has no subject cooking"):
        find_tasks(["mmlu"], None, str(few))
    assert [one.name for one in H6][2] == "mmlu"

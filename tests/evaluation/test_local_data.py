"""Files of the benchmarks give the hub's records; what is none of a benchmark is named, with file and line."""

import json
import pathlib

import pytest

from solar_jax.errors import UserError
from solar_jax.evaluation.local_data import check_files, splits, subjects_in
from tests.evaluation import h6_data


@pytest.fixture
def data(tmp_path) -> pathlib.Path:
    return h6_data.write(tmp_path)


def test_records_have_the_hubs_keys_and_values(data):
    first = {
        name: splits(data, name) for name in ("arc_challenge", "hellaswag", "truthfulqa_mc2", "winogrande", "gsm8k")
    }
    assert first["arc_challenge"]["test"][1] == {
        "id": "q1", "question": "What is 1?", "answerKey": "B",
        "choices": {"text": ["thing 1", "thing 2", "thing 3", "thing 4"], "label": ["A", "B", "C", "D"]},
    }  # fmt: skip
    assert set(first["arc_challenge"]) == {"train", "test"}, "a validation split is not needed"
    assert first["hellaswag"]["validation"][1]["label"] == "1"
    assert first["truthfulqa_mc2"]["validation"][0]["mc2_targets"] == {
        "choices": ["yes 0", "no 0", "indeed 0", "never 0"], "labels": [1, 0, 1, 0]
    }  # fmt: skip
    assert first["winogrande"]["validation"][1]["answer"] == "2"
    assert splits(data, "mmlu_anatomy")["test"][2] == {
        "question": 'In test, "2"\nis?', "subject": "anatomy", "choices": ["one, two", "b", "c", "d"], "answer": 2
    }  # fmt: skip
    assert subjects_in(data) == list(h6_data.SUBJECTS)


BROKEN = {
    "gsm8k/test.jsonl": [
        ('{"question": "a", "answer": "#### 1"}\n{"question": "a"\n', r"test.jsonl:2: is not JSON"),
        ('{"question": "a"}', r"test.jsonl:1: has no 'answer'"),
        ('{"question": "a", "answer": "it is 1"}', r"test.jsonl:1: the answer has no '#### '"),
        ('["question"]', r"test.jsonl:1: list indices"), ("", r"test.jsonl: has no records"),
    ],
    "arc/ARC-Challenge-Test.jsonl": [
        (json.dumps(h6_data.arc(0) | {"answerKey": "F"}), r"answerKey must be one of .*, found 'F'"),
        (json.dumps(h6_data.arc(0) | {"question": "What?"}), r"Test.jsonl:1: string indices"),
    ],
    "hellaswag/hellaswag_val.jsonl": [
        (json.dumps(h6_data.hellaswag(0) | {"label": 4}), r"label must be below the 4 endings, found 4"),
        (json.dumps(h6_data.hellaswag(0) | {"label": ""}), r"label must be below the 4 endings, found ''"),
    ],
    "winogrande/dev.jsonl": [
        (json.dumps(h6_data.winogrande(0) | {"answer": ""}), r"the answer be '1' or '2'"),
        (json.dumps(h6_data.winogrande(0) | {"sentence": "No gap."}), r"the sentence must have a '_'"),
    ],
    "truthfulqa/mc_task.json": [
        ('{"question": "a"}', r"mc_task.json: must hold a JSON array, found dict"),
        (json.dumps([h6_data.truthfulqa(0) | {"mc2_targets": {"a": 0, "b": 1}}]), r"record 0: mc2_targets must begin"),
        (json.dumps([h6_data.truthfulqa(0) | {"mc1_targets": ["a"]}]), r"record 0: mc1_targets must be an object"),
    ],
    "mmlu/test/anatomy_test.csv": [
        ("question,A,B,C,D,answer\n", r"anatomy_test.csv:1: must have .*, found 6 columns that end in 'answer'"),
        ("q,a,b,c,A\n", r"anatomy_test.csv:1: .*found 5 columns"), ('"q,a,b\n', r"anatomy_test.csv: is not CSV"),
    ],
}  # fmt: skip
CASES = [(name, text, message) for name, cases in BROKEN.items() for text, message in cases]
TASK = {
    "gsm8k": "gsm8k", "arc": "arc_challenge", "hellaswag": "hellaswag", "winogrande": "winogrande",
    "truthfulqa": "truthfulqa_mc2", "mmlu": "mmlu_anatomy",
}  # fmt: skip


@pytest.mark.parametrize(("name", "text", "message"), CASES)
def test_a_record_of_something_else_is_named(data, name, text, message):
    (data / name).write_text(text)
    with pytest.raises(UserError, match=message):
        splits(data, TASK[name.split("/")[0]])


def test_missing_files_are_named(data):
    (data / "hellaswag/hellaswag_train.jsonl").unlink()
    with pytest.raises(UserError, match=r"hellaswag_train.jsonl: no such file, which hellaswag needs"):
        check_files(data, "hellaswag")
    (data / "mmlu/dev/virology_dev.csv").unlink()
    with pytest.raises(UserError, match=r"virology_dev.csv: no such file, but there is mmlu/test/virology_test.csv"):
        check_files(data, "mmlu")
    with pytest.raises(UserError, match=r"mmlu/test: no file SUBJECT_test.csv"):
        subjects_in(data / "arc")

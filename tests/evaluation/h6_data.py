"""A folder of the six benchmarks' files with made-up items, in the form in which their authors publish them."""

import csv
import json
import pathlib
from typing import Any

SUBJECTS = ("anatomy", "virology")


def arc(i: int) -> dict[str, Any]:
    choices = [{"text": f"thing {i + j}", "label": label} for j, label in enumerate("ABCD")]
    return {"id": f"q{i}", "question": {"stem": f"What is {i}?", "choices": choices}, "answerKey": "ABCD"[i % 4]}


def hellaswag(i: int) -> dict[str, Any]:
    endings = [f"goes on {i + j} times." for j in range(4)]
    return {
        "ind": i, "activity_label": f"Walking {i}", "ctx_a": f"A man {i} walks.", "ctx_b": "he", "endings": endings,
        "label": i % 4,
    }  # fmt: skip


def truthfulqa(i: int) -> dict[str, Any]:
    unsorted = {f"yes {i}": 1, f"no {i}": 0, f"indeed {i}": 1, f"never {i}": 0}
    return {"question": f"Is it {i}?", "mc1_targets": {f"yes {i}": 1, f"no {i}": 0}, "mc2_targets": unsorted}


def winogrande(i: int) -> dict[str, Any]:
    return {
        "qID": str(i), "sentence": f"The cup {i} fell off the table because _ was round.", "option1": "the cup",
        "option2": "the table", "answer": str(1 + i % 2),
    }  # fmt: skip


def gsm8k(i: int) -> dict[str, Any]:
    return {"question": f"What is {i} and {i}?", "answer": f"It is {i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}.\n#### {2 * i}"}


def write(folder: pathlib.Path) -> pathlib.Path:
    """Writes 6 items to be asked and 30 examples of each."""
    lines = {
        "arc/ARC-Challenge-Train.jsonl": (arc, range(100, 130)), "arc/ARC-Challenge-Test.jsonl": (arc, range(6)),
        "hellaswag/hellaswag_train.jsonl": (hellaswag, range(100, 130)),
        "hellaswag/hellaswag_val.jsonl": (hellaswag, range(6)),
        "winogrande/train_xs.jsonl": (winogrande, range(100, 130)), "winogrande/dev.jsonl": (winogrande, range(6)),
        "gsm8k/train.jsonl": (gsm8k, range(100, 130)), "gsm8k/test.jsonl": (gsm8k, range(6)),
    }  # fmt: skip
    for name, (make, numbers) in lines.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(make(i)) + "\n" for i in numbers))
    (folder / "truthfulqa").mkdir()
    (folder / "truthfulqa/mc_task.json").write_text(json.dumps([truthfulqa(i) for i in range(6)]))
    for split, count in (("dev", 5), ("test", 6)):
        (folder / "mmlu" / split).mkdir(parents=True)
        for subject in SUBJECTS:
            with (folder / f"mmlu/{split}/{subject}_{split}.csv").open("w", newline="") as file:
                rows = ([f'In {split}, "{i}"\nis?', "one, two", "b", "c", "d", "ABCD"[i % 4]] for i in range(count))
                csv.writer(file).writerows(rows)
    return folder

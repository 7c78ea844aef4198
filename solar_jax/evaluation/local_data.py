"""Files of the six benchmarks as their authors publish them, read into the records that lm-eval's tasks expect."""

import csv
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from solar_jax.errors import UserError

Record = dict[str, Any]
LETTERS = "ABCD"
_MMLU_COLUMNS = len(LETTERS) + 2  # question, answers, letter


def _arc(record: Record) -> Record:
    question, choices = record["question"], record["question"]["choices"]
    labels = [choice["label"] for choice in choices]
    if record["answerKey"] not in labels:
        raise ValueError(f"answerKey must be one of {labels}, found {record['answerKey']!r}")
    texts = [_text(choice, "text") for choice in choices]
    return {
        "id": record["id"], "question": _text(question, "stem"), "choices": {"text": texts, "label": labels},
        "answerKey": record["answerKey"],
    }  # fmt: skip


def _hellaswag(record: Record) -> Record:
    endings, label = record["endings"], record["label"]
    if str(label) not in [str(i) for i in range(len(endings))]:
        raise ValueError(f"label must be below the {len(endings)} endings, found {label!r}")
    kept = {key: _text(record, key) for key in ("activity_label", "ctx_a", "ctx_b")}
    return {"ind": record["ind"], **kept, "endings": endings, "label": str(label)}


def _truthfulqa(record: Record) -> Record:
    def targets(key: str) -> Record:
        found = record[key]
        if not isinstance(found, dict) or not found or set(found.values()) - {0, 1}:
            raise ValueError(f"{key} must be an object of answers with 0 or 1 each")
        labels = list(found.values())
        if labels[0] != 1 or 0 not in labels:
            raise ValueError(f"{key} must begin with a true answer and have a false one")
        return {"choices": list(found), "labels": labels}

    return {"question": _text(record, "question")} | {key: targets(key) for key in ("mc1_targets", "mc2_targets")}


def _winogrande(record: Record) -> Record:
    kept = {key: _text(record, key) for key in ("sentence", "option1", "option2", "answer")}
    if kept["sentence"].count("_") < 1 or kept["answer"] not in ("1", "2"):
        raise ValueError("the sentence must have a '_' and the answer be '1' or '2'")
    return kept


def _gsm8k(record: Record) -> Record:
    kept = {key: _text(record, key) for key in ("question", "answer")}
    if "#### " not in kept["answer"]:
        raise ValueError("the answer has no '#### ' before its number")
    return kept


def _text(record: Record, key: str) -> str:
    if not isinstance(record[key], str):
        raise ValueError(f"{key} must be text, found {record[key]!r}")
    return record[key]


# Task -> converter, and split -> files, the first one that is there; MMLU is apart, as it has a file for each subject.
SETS: dict[str, tuple[Callable[[Record], Record], dict[str, tuple[str, ...]]]] = {
    "arc_challenge": (_arc, {
        "train": ("arc/ARC-Challenge-Train.jsonl",), "validation": ("arc/ARC-Challenge-Dev.jsonl",),
        "test": ("arc/ARC-Challenge-Test.jsonl",),
    }),
    "hellaswag": (_hellaswag, {
        "train": ("hellaswag/hellaswag_train.jsonl",), "validation": ("hellaswag/hellaswag_val.jsonl",),
    }),
    "truthfulqa_mc2": (_truthfulqa, {"validation": ("truthfulqa/mc_task.json",)}),
    "winogrande": (_winogrande, {
        "train": tuple(f"winogrande/train_{size}.jsonl" for size in ("xl", "l", "m", "s", "xs")),
        "validation": ("winogrande/dev.jsonl",),
    }),
    "gsm8k": (_gsm8k, {"train": ("gsm8k/train.jsonl",), "test": ("gsm8k/test.jsonl",)}),
}  # fmt: skip
_NOT_READ = {"arc_challenge": ("validation",)}  # splits that may be missing


def subjects_in(folder: pathlib.Path) -> list[str]:
    """Lists MMLU's subjects in a folder of benchmarks.

    Raises:
      UserError: there is none, or one without examples.
    """
    found = sorted(file.name.removesuffix("_test.csv") for file in (folder / "mmlu/test").glob("*_test.csv"))
    if not found:
        raise UserError(f"{folder}/mmlu/test: no file SUBJECT_test.csv.")
    for subject in found:
        if not (dev := folder / f"mmlu/dev/{subject}_dev.csv").is_file():
            raise UserError(f"{dev}: no such file, but there is mmlu/test/{subject}_test.csv.")
    return found


def check_files(folder: pathlib.Path, task: str) -> None:
    """Raises a UserError that names the first file of a task which is missing."""
    if task == "mmlu":
        subjects_in(folder)
    elif task in SETS:
        for split in SETS[task][1]:
            if split not in _NOT_READ.get(task, ()):
                _file(folder, task, split)


def dataset(*, folder: str, task: str, **_: Any) -> dict[str, Any]:
    """Reads a task's splits for lm-eval, which calls this by its name in a task's YAML.

    Args:
      folder: of the benchmarks, such as arc/ and mmlu/.
      task: of `SETS`, or mmlu_SUBJECT.

    Returns:
      Hugging Face data sets by split.

    Raises:
      UserError: a record is none of this benchmark; the message names file and line.
    """
    import datasets  # comes with lm-eval

    return {split: datasets.Dataset.from_list(records) for split, records in splits(pathlib.Path(folder), task).items()}


def splits(folder: pathlib.Path, task: str) -> dict[str, list[Record]]:
    """Reads the records of a task by split, as `dataset` does."""
    if task.startswith("mmlu_"):
        subject = task.removeprefix("mmlu_")
        return {
            split: list(_mmlu(folder / f"mmlu/{split}/{subject}_{split}.csv", subject)) for split in ("dev", "test")
        }
    convert, files = SETS[task]
    missing = [name for name in _NOT_READ.get(task, ()) if not (folder / files[name][0]).is_file()]
    found = {}
    for split in files:
        if split not in missing:
            file = _file(folder, task, split)
            found[split] = [_converted(convert, record, where) for where, record in _records(file)]
            if not found[split]:
                raise UserError(f"{file}: has no records.")
    return found


def _file(folder: pathlib.Path, task: str, split: str) -> pathlib.Path:
    names = SETS[task][1][split]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder / names[0]}: no such file, which {task} needs.")


def _records(file: pathlib.Path) -> Iterator[tuple[str, Any]]:
    """Yields the records of a JSON array or of JSON lines, each with its place."""
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            records = json.loads(text)
            if not isinstance(records, list):
                raise UserError(f"{file}: must hold a JSON array, found {type(records).__name__}.")
            yield from ((f"{file}, record {i}", record) for i, record in enumerate(records))
            return
    except ValueError as e:
        raise UserError(f"{file}: is not JSON in UTF-8: {e}.") from e
    for i, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{file}:{i}", json.loads(line)
            except ValueError as e:
                raise UserError(f"{file}:{i}: is not JSON: {e}.") from e


def _converted(convert: Callable[[Record], Record], record: Any, where: str) -> Record:
    try:
        return convert(record)
    except KeyError as e:
        raise UserError(f"{where}: has no {e}.") from e
    except (TypeError, ValueError) as e:
        raise UserError(f"{where}: {e}.") from e


def _mmlu(file: pathlib.Path, subject: str) -> Iterator[Record]:
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            reader = csv.reader(lines, strict=True)
            for row in reader:
                if len(row) != _MMLU_COLUMNS or row[-1] not in LETTERS:
                    raise UserError(
                        f"{file}:{reader.line_num}: must have a question, four answers and a letter from A to D, "
                        f"found {len(row)} columns that end in {row[-1] if row else ''!r}."
                    )
                yield {
                    "question": row[0], "subject": subject, "choices": row[1:-1], "answer": LETTERS.index(row[-1])
                }  # fmt: skip
    except (csv.Error, UnicodeDecodeError) as e:
        raise UserError(f"{file}: is not CSV in UTF-8: {e}.") from e

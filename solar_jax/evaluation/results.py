"""Reading of what `evaluate` wrote: the scores of a model on the tasks of H6, the items they are of, and all others."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from solar_jax.errors import UserError, phrase
from solar_jax.evaluation.comparators import H6_TASKS, follows_protocol
from solar_jax.evaluation.h6 import MMLU_SUBJECTS, PRESETS, error_of_mean, mean_of
from solar_jax.storage import paths

Item = tuple[str, str, str]  # subject or "", id and hash of the document
_UNUSED = {"arguments", "resps", "filtered_resps", "doc"}  # most of a file's bytes
_SAME = 0.01  # percent points by which a mean may differ, since scores may be rounded


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """A model's score on a task.

    Attributes:
      percent, stderr: the score and its standard error, in percent points.
      items: how many.
      shots: examples before each question.
      full: whether the items are the task's full set.
      metric: such as acc_norm.
      outcomes: percent of each item; empty where the file has no samples.
    """

    percent: float
    stderr: float | None
    items: int | None
    shots: int | None
    full: bool
    metric: str
    outcomes: Mapping[Item, float]


@dataclasses.dataclass(frozen=True)
class OtherScore:
    """A metric of a task outside H6, in lm-eval's own unit."""

    task: str
    metric: str
    value: float
    stderr: float | None
    items: int | None
    shots: int | None


@dataclasses.dataclass(frozen=True, eq=False)  # a key of dicts
class Evaluation:
    """A file of results; `h6` is the mean of the six and its standard error, in percent points."""

    file: pathlib.Path
    model: str
    preset: str | None
    harness: str
    dtype: str | None
    bos: bool | None
    chat: bool | None
    limit: int | None
    scores: Mapping[str, TaskScore]
    h6: tuple[float, float | None] | None
    others: tuple[OtherScore, ...]

    @property
    def full(self) -> bool:
        """True if it has tasks of H6, all on their full sets."""
        return bool(self.scores) and all(score.full for score in self.scores.values())


def read_results(files: Sequence[pathlib.Path]) -> list[Evaluation]:
    """Reads files that `evaluate` wrote.

    Raises:
      UserError: one is given twice, or is not such a file.
    """
    seen: dict[str, pathlib.Path] = {}
    for file in files:
        place = str(file.resolve()) if paths.is_local(file) else str(file)
        if place in seen:
            also = "" if seen[place] == file else f", also as {seen[place]}"
            raise UserError(f"{file}: is given twice{also}; give each evaluation once.")
        seen[place] = file
    return [_Reader(file).evaluation() for file in files]


class _Reader:
    """One file's content; whatever is not as expected is a UserError with file and key."""

    def __init__(self, file: pathlib.Path):
        self.file = file
        self.content = _load(file)
        if not isinstance(self.content, dict):
            raise self.wrong("the file", "a JSON object", self.content)
        self.results = self.get("results", dict, "an object of tasks, as evaluate writes it")
        for task, metrics in self.results.items():
            if not isinstance(metrics, dict):
                raise self.wrong(f"results.{task}", "an object of metrics", metrics)
        if not self.results:
            raise self.wrong("results", "at least one task", self.results)
        self.preset = self.get("preset", str, f"null or one of {', '.join(PRESETS)}", optional=True)
        if self.preset not in (None, *PRESETS):
            raise self.wrong("preset", f"null or one of {', '.join(PRESETS)}", self.preset)
        self.limit = self.get("limit", int, "null or a number of items", optional=True)
        self.h6 = self.get("h6", dict, "null or an object of scores", optional=True)
        self.shots = self.get("n-shot", dict, "an object of shots by task", optional=True) or {}
        for task, shots in self.shots.items():
            if not isinstance(shots, int | None):
                raise self.wrong(f"n-shot.{task}", "null or a number of examples", shots)
        self.samples = self.get("samples", dict, "an object of items by task", optional=True) or {}

    def wrong(self, key: str, expected: str, found: Any) -> UserError:
        return UserError(f"{self.file}: {key}: expected {expected}, found {_short(found)}.")

    def get(self, key: str, kind: type, expected: str, *, optional: bool = False) -> Any:
        found = self.content.get(key)
        if found is None and optional:
            return None
        if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
            raise self.wrong(key, expected, found if key in self.content else _MISSING)
        return found

    def number(self, key: str, found: Any, least: float = -math.inf, most: float = math.inf) -> float:
        within = f" from {least:g} to {most:g}" if most < math.inf else f" of at least {least:g}" if least == 0 else ""
        if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
            raise self.wrong(key, f"a finite number{within}", found)
        if not least - 1e-9 <= found <= most + 1e-9:
            raise self.wrong(key, f"a number{within}", found)
        return float(found)

    def evaluation(self) -> Evaluation:
        names = {task: self._names(task) for task in H6_TASKS}
        scores = {task: self._score(task, of) for task, of in names.items() if of or self.h6 is not None}
        used = {name for of in names.values() for name in of}
        uses = (self.get("bos", dict, "an object of losses", optional=True) or {}).get("uses")
        return Evaluation(
            self.file, self.get("model", str, "the model's name"), self.preset, self.get("lm_eval", str, "a version"),
            self.get("dtype", str, "a dtype", optional=True), uses if isinstance(uses, bool) else None,
            self.get("chat_template", bool, "true or false", optional=True), self.limit, scores, self._mean(scores),
            tuple(self._others(used)),
        )  # fmt: skip

    # ---- Tasks of H6 -------------------------------------------------------------------------------------------------
    def _names(self, task: str) -> list[str]:
        """The names under which `results` has a task, or MMLU's subjects; none if it was not evaluated."""
        if task != "mmlu":
            return [task] if task in self.results else []
        names = [name for subject in MMLU_SUBJECTS if (name := f"mmlu_{subject}") in self.results]
        return names if len(names) == (self.h6 or {}).get("subjects", len(MMLU_SUBJECTS)) else []

    def _score(self, task: str, names: Sequence[str]) -> TaskScore:
        """The score that `h6` states, else that of `results`; both if both are there, and then they must agree."""
        key, percent, stderr = self._metric_key(task, names), math.nan, None
        if key is not None:
            values = [100 * self.number(f"results.{n}.{key}", self.results[n].get(key), 0, 1) for n in names]
            percent, stderr = mean_of(values), error_of_mean([self._stderr(n, key, 100) for n in names])
        if self.h6 is not None:
            given = self.number(f"h6.{task}", self.h6.get(task, _MISSING), 0, 100)
            if abs(given - percent) > _SAME:  # never so beside NaN
                raise self.wrong(f"h6.{task}", f"{percent:.4f}, as results has it", given)
            percent, stderr = given, self._error_of_h6(task)
        items = self._items(task, names)
        whole = self.limit is None and items == H6_TASKS[task].items and self._of_h6("full").get(task, True) is True
        shots = {self.shots.get(name) for name in names} or {H6_TASKS[task].shots}  # the preset's
        return TaskScore(
            percent, stderr, items, shots.pop() if len(shots) == 1 else None, whole,
            H6_TASKS[task].metric, self._outcomes(task, names, key, percent),
        )  # fmt: skip

    def _metric_key(self, task: str, names: Sequence[str]) -> str | None:
        """The key of a task's score in `results`; None if only `h6` says it."""
        one = H6_TASKS[task]
        key = f"{one.metric},{one.filter}"
        found = [k for k in (self.results[names[0]] if names else ()) if k.startswith(f"{one.metric},")]
        if key in found or len(found) == 1:  # a task of the user's own may have one filter of another name
            return key if key in found else found[0]
        if self.h6 is None:
            raise self.wrong(f"results.{names[0]}", key, sorted(self.results[names[0]]))
        return None

    def _error_of_h6(self, task: str) -> float | None:
        found = self._of_h6("stderr").get(task)
        return None if found is None else self.number(f"h6.stderr.{task}", found, 0)

    def _stderr(self, name: str, key: str, scale: float = 1) -> float | None:
        metric, _, kind = key.partition(",")
        found = self.results[name].get(f"{metric}_stderr,{kind}")
        return scale * found if isinstance(found, int | float) and math.isfinite(found) else None  # else "N/A"

    def _of_h6(self, key: str) -> dict[str, Any]:
        found = (self.h6 or {}).get(key, {})
        if not isinstance(found, dict):
            raise self.wrong(f"h6.{key}", "an object by task", found)
        return found

    def _items(self, task: str, names: Sequence[str]) -> int | None:
        given = self._of_h6("items").get(task)
        if given is not None:
            return int(self.number(f"h6.items.{task}", given, 0))
        counts = [n for name in names if (n := self._count(name)) is not None]
        return sum(counts) if counts and len(counts) == len(names) else None

    def _count(self, name: str) -> int | None:
        found = self.results[name].get("sample_len")
        if isinstance(found, int):
            return found
        return len({_item("", sample) for sample in self._listed(name)}) or None

    def _outcomes(self, task: str, names: Sequence[str], key: str | None, percent: float) -> dict[Item, float]:
        """Percent of each item; empty if the file lacks a part of them."""
        found, means = {}, []
        if key is None:
            return {}
        for name in names:
            own = dict(self._of_samples(name, name.rpartition("mmlu_")[2] if task == "mmlu" else "", key))
            if not own:
                return {}
            found |= own
            means.append(mean_of(list(own.values())))
        if abs(mean_of(means) - percent) > _SAME:  # then these are not the items that the score is of
            expected = f"items of mean {key.partition(',')[0]} {percent:.4f}, the score"
            raise UserError(f"{self.file}: samples of {task}: expected {expected}, found {mean_of(means):.4f}.")
        return found

    def _listed(self, name: str) -> list[dict[str, Any]]:
        listed = self.samples.get(name, [])
        if not isinstance(listed, list) or not all(isinstance(sample, dict) for sample in listed):
            raise self.wrong(f"samples.{name}", "a list of items", listed)
        return listed

    def _of_samples(self, name: str, subject: str, key: str) -> Iterator[tuple[Item, float]]:
        metric, _, kind = key.partition(",")
        for sample in self._listed(name):
            if sample.get("filter", kind) == kind and metric in sample:
                value = int(sample[metric]) if isinstance(sample[metric], bool) else sample[metric]
                yield _item(subject, sample), 100 * self.number(f"samples.{name}: {metric}", value, 0, 1)

    def _mean(self, scores: Mapping[str, TaskScore]) -> tuple[float, float | None] | None:
        """H6: as the file says, or of six scores that followed its protocol."""
        if scores.keys() != H6_TASKS.keys():
            return None
        mean = mean_of([score.percent for score in scores.values()])
        if self.h6 is None:
            asked = follows_protocol({task: score.shots for task, score in scores.items()})
            return (mean, error_of_mean([score.stderr for score in scores.values()])) if asked else None
        given = self.number("h6.mean", self.h6.get("mean", _MISSING), 0, 100)
        if abs(given - mean) > _SAME:
            raise self.wrong("h6.mean", f"{mean:.4f}, the mean of the six", given)
        return given, self._error_of_h6("mean")

    # ---- Others ------------------------------------------------------------------------------------------------------
    def _others(self, used: set[str]) -> Iterator[OtherScore]:
        """Metrics of the tasks that are none of H6's; groups that only sum up MMLU's subjects are left out."""
        covered = used | {"mmlu"} if used & {f"mmlu_{subject}" for subject in MMLU_SUBJECTS} else used
        groups = {"mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities"} if "mmlu" in covered else set()
        for name, metrics in self.results.items():
            if name in covered | groups:
                continue
            for key, value in metrics.items():
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                if "," in key and "_stderr," not in key and is_number:
                    metric = key.removesuffix(",none")
                    yield OtherScore(
                        name, metric, value, self._stderr(name, key), self._count(name), self.shots.get(name)
                    )


_MISSING = object()


def _short(found: Any) -> str:
    if found is _MISSING:
        return "no such key"
    text = repr(found) if isinstance(found, str | float) else json.dumps(found)
    return text if len(text) <= 80 else f"{type(found).__name__} {text[:60]}..."


def _item(subject: str, sample: Any) -> Item:
    return subject, str(sample.get("doc_id")), str(sample.get("doc_hash"))


def _load(file: pathlib.Path) -> Any:
    """A file's JSON without its prompts and answers, which may be hundreds of megabytes."""
    try:
        text = file.read_bytes().decode()
        return json.loads(text, object_pairs_hook=lambda pairs: {k: v for k, v in pairs if k not in _UNUSED})
    except OSError as e:
        raise UserError(f"{file}: cannot be read: {phrase(e)}.") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: is not JSON: {e}.") from e

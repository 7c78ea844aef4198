"""lm-eval's tasks by name: from a folder of the user's, from files of the benchmarks, or lm-eval's own."""

import dataclasses
import logging
import pathlib
import random
import re
import tempfile
from collections.abc import Sequence
from typing import Any

import datasets
import lm_eval.api.model
import lm_eval.api.task
import lm_eval.tasks
import numpy as np
import tqdm
import yaml
from lm_eval.api.group import Group
from lm_eval.api.samplers import ContextSampler, FirstNSampler
from lm_eval.api.task import Task
from lm_eval.filters import build_filter_ensemble
from lm_eval.tasks import TaskManager

from solar_jax.errors import UserError
from solar_jax.evaluation import local_data
from solar_jax.evaluation.h6 import H6, presets_in

# Task -> where lm-eval defines it, for tasks that read the user's files.
_DEFINED = {
    "arc_challenge": "arc/arc_challenge.yaml", "hellaswag": "hellaswag/hellaswag.yaml",
    "truthfulqa_mc2": "truthfulqa/truthfulqa_mc2.yaml", "winogrande": "winogrande/default.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
}  # fmt: skip
_SHUFFLE = 42  # seed of h6_2023
_NUMBER = re.compile(r"#### (\-?[0-9\.\,]+)")


@dataclasses.dataclass(frozen=True)
class Suite:
    """Tasks that are evaluated together."""

    tasks: list[Task | Group]
    subjects: list[str]  # names of MMLU's tasks, where a preset is among them
    preset: str | None  # of `h6.PRESETS`
    manager: TaskManager  # that knows them


def quiet_lm_eval() -> None:
    """Silences what lm-eval and its data sets print about every task; errors are still shown."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    for module in (lm_eval.api.task, lm_eval.api.model):  # a bar for each of MMLU's 57 tasks
        vars(module)["tqdm"] = _no_bar


def _no_bar(*args: Any, **kwargs: Any) -> Any:
    return tqdm.tqdm(*args, **kwargs | {"disable": True})


def find_tasks(names: Sequence[str], include_path: str | None = None, data: str | None = None) -> Suite:
    """Finds tasks and reads their data.

    Args:
      names: lm-eval's names, or a preset of `h6`, which stands for its six benchmarks and sets their shots.
      include_path: folder of tasks in lm-eval's layout, which come first.
      data: folder of the benchmarks' files, which come second; lm-eval's own tasks, from the hub, come last.

    Raises:
      UserError: an unknown name, or data that cannot be read.
    """
    preset = presets_in(list(names))
    wanted = [name for name in names if name != preset]
    benchmarks = [one.name for one in H6 if one.name not in wanted] if preset else []
    with tempfile.TemporaryDirectory() as folder:
        places: list[str | pathlib.Path] = [include_path] if include_path else []
        if data:
            own = [] if not include_path else TaskManager(include_path=include_path, include_defaults=False).all_tasks
            places.insert(0, _write_local(pathlib.Path(folder), pathlib.Path(data), [*wanted, *benchmarks], own))
        manager = _manager(places, [*wanted, *benchmarks], include_path, data)
        loaded = {name: _load(manager, name) for name in [*wanted, *benchmarks]}
    _check_once(loaded)
    subjects: list[str] = []
    if preset:
        for one in H6:
            for task in _leaves(loaded[one.name]):
                task.set_config("num_fewshot", one.shots)
                _check_shots(task, one.shots)
                if preset == "h6_2023":
                    _as_in_2023(task)
            if one.name == "mmlu":
                subjects = [task.task_name for task in _leaves(loaded[one.name])]
    return Suite([item for items in loaded.values() for item in items], subjects, preset, manager)


def _manager(
    places: list[str | pathlib.Path], names: Sequence[str], include_path: str | None, data: str | None
) -> TaskManager:
    """A manager that knows all names; lm-eval's own thousands of tasks are looked up only if one is among them."""
    manager = TaskManager(include_path=places, include_defaults=False)
    if all(name in manager.all_tasks for name in names):
        return manager
    manager = TaskManager(include_path=places, include_defaults=True)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        where = f"in {include_path} nor " if include_path else ""
        where = f"{where}in {data} nor " if data else where
        among = f"{'neither ' if where else 'not '}{where}among lm-eval's {len(manager.all_tasks):,} tasks"
        raise UserError(f"--tasks: {unknown[0]!r} is {among}.")
    return manager


def _load(manager: TaskManager, name: str) -> list[Task | Group]:
    """Builds the task, the group, or the tasks of a tag."""
    try:
        found = manager.load(name)
    except UserError:
        raise
    except Exception as e:  # whatever a task's data set may raise, most of all without a network
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(
            f"--tasks: {name}: its data cannot be loaded ({reason}); local files: --data DIR, --include_path DIR."
        ) from e
    inside = {child for children in found.get("group_map", {}).values() for child in children}
    both = {**found["tasks"], **found.get("groups", {})}
    return [item for key, item in both.items() if key not in inside]


def _leaves(items: Sequence[Task | Group]) -> list[Any]:
    found: list[Any] = []
    for item in items:
        found += item.get_all_tasks() if isinstance(item, Group) else [item]
    return found


def _check_once(loaded: dict[str, list[Task | Group]]) -> None:
    """Raises a UserError for a task that is asked for twice, by its own name and by a group's."""
    asked: dict[str, str] = {}
    for name, items in loaded.items():
        for task in _leaves(items):
            if (other := asked.setdefault(task.task_name, name)) != name:
                raise UserError(f"--tasks: {task.task_name} is asked for twice, by {other} and by {name}.")


def _check_shots(task: Any, shots: int) -> None:
    if shots and (count := len(list(task.fewshot_docs() or []))) < shots:
        raise UserError(f"{task.task_name}: H6 puts {shots} examples before each item, but the task has {count}.")


# ---- Files of the benchmarks -----------------------------------------------------------------------------------------
def _write_local(folder: pathlib.Path, data: pathlib.Path, names: Sequence[str], known: Sequence[str]) -> pathlib.Path:
    """Writes lm-eval's definitions with the user's files as their data; `known` are defined elsewhere."""
    root = pathlib.Path(lm_eval.tasks.__file__).parent
    for name in names:
        if name in known:
            continue
        local_data.check_files(data, name)
        if name in _DEFINED:
            _write_yaml(folder, name, root / _DEFINED[name], data)
    mmlu = [name for name in names if (name == "mmlu" or name.startswith("mmlu_")) and name not in known]
    if mmlu:
        subjects = local_data.subjects_in(data)
        for subject in subjects:
            defined = root / f"mmlu/default/mmlu_{subject}.yaml"
            if not defined.is_file():
                raise UserError(f"{data}/mmlu/test/{subject}_test.csv: MMLU has no subject {subject}.")
            _write_yaml(folder, f"mmlu_{subject}", defined, data)
        group = {
            "group": "mmlu", "task": [f"mmlu_{subject}" for subject in subjects],
            "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        }  # fmt: skip
        (folder / "mmlu.yaml").write_text(yaml.safe_dump(group))
    return folder


def _write_yaml(folder: pathlib.Path, name: str, defined: pathlib.Path, data: pathlib.Path) -> None:
    arguments = yaml.safe_dump({"dataset_kwargs": {"folder": str(data.resolve()), "task": name}})
    reader = f"custom_dataset: !function {local_data.__name__}.{local_data.dataset.__name__}\n"
    (folder / f"{name}.yaml").write_text(f"include: {defined}\n{reader}{arguments}")


# ---- 2023 ------------------------------------------------------------------------------------------------------------
class _Sampler2023(ContextSampler):
    """Draws examples by the random stream that shuffled the items before, however often it is begun again."""

    def __init__(self, examples: Sequence[Any], items: int):
        self._items = items
        super().__init__(examples)

    def set_rnd(self, rnd: int | None) -> "_Sampler2023":
        del rnd
        self.rnd = random.Random(_SHUFFLE)
        self.rnd.shuffle(list(range(self._items)))
        return self

    def sample(self, n: int, eval_doc: Any = None, df: Any = None, **kwargs: Any) -> Sequence[Any]:
        """Draws `n` examples; today's harness draws one more where it thinks that they are among the items."""
        del eval_doc, df, kwargs
        return self.rnd.sample(list(self.df), n)


def _as_in_2023(task: Any) -> None:
    """Changes a task to what the harness did at the paper's commit; see `h6.PRESETS`."""
    split = task.config.test_split or task.config.validation_split
    items = task.dataset[split]
    if hasattr(task, "sampler") and not isinstance(task.sampler, FirstNSampler):
        task.sampler = _Sampler2023(list(task.fewshot_docs() or []), len(items))
    order = list(range(len(items)))
    random.Random(_SHUFFLE).shuffle(order)
    task.dataset = {**task.dataset, split: items.select(order)}
    if task.task_name == "gsm8k":
        task.set_config("generation_kwargs", {"until": [":", "Question:", "Question"], "do_sample": False})
        task.set_config("process_results", _numbers_equal)
        task._filters = [build_filter_ensemble("strict-match", [("take_first", None)])]
    if task.task_name == "truthfulqa_mc2":
        task.set_config("process_results", _true_before_the_first_false)


def _numbers_equal(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    said, label = (_NUMBER.search(text) for text in (results[0], doc["answer"]))
    same = said is not None and label is not None and _plain(said) == _plain(label)
    return {"exact_match": float(same)}


def _true_before_the_first_false(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    chances = np.exp(np.array([total for total, _ in results]))
    return {"acc": float(np.sum((chances / np.sum(chances))[: doc["mc2_targets"]["labels"].index(0)]))}


def _plain(match: re.Match[str]) -> str:
    return match[1].strip().replace(",", "")

"""Tasks are measured on live parameters, whatever trains, and leave the run's losses as they are, bit by bit."""

import json
import pathlib

import pytest

from solar_jax import train
from solar_jax.errors import UserError
from solar_jax.evaluate import evaluate_tasks
from tests.evaluation import h6_data
from tests.test_train import make_config, metrics

pytestmark = pytest.mark.slow  # lm-eval imports for ten seconds
TASKS = ("winogrande", "gsm8k")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    return h6_data.write(tmp_path_factory.mktemp("h6"))


def scores(folder: pathlib.Path) -> dict[tuple[str, int], dict[str, float]]:
    lines = map(json.loads, (folder / "task_scores.jsonl").read_text().splitlines())
    return {(r["arm"], r["step"]): r["scores"] for r in lines}


WHAT = {"new layers": {"train_trainable": "new"}, "lora on a mesh": {"lora_rank": 2, "mesh_fsdp": 4, "mesh_tensor": 2}}


@pytest.mark.parametrize("what", WHAT)
def test_scores_in_training_are_those_of_the_exported_model_and_change_no_loss(tiny, text, data, tmp_path, what):
    changes = {"evaluation_tasks": TASKS, "evaluation_task_every": 3, "evaluation_task_data": str(data)} | WHAT[what]
    train.run(make_config(tiny, text, **changes), tmp_path / "with")
    train.run(make_config(tiny, text, **WHAT[what]), tmp_path / "without")
    assert metrics(tmp_path / "with") == metrics(tmp_path / "without")
    losses = [(tmp_path / name / "evals.jsonl").read_text() for name in ("with", "without")]
    assert losses[0] == losses[1]
    found = scores(tmp_path / "with")
    assert list(found) == [("healed", step) for step in (0, 3, 6)]
    after = evaluate_tasks(
        str(tmp_path / "with/hf"), TASKS, tmp_path / "after.json", data=str(data), check_bos=False
    )["results"]  # fmt: skip
    wanted = {f"{task}/{key.split(',')[0]}": value for task, result in after.items() for key, value in result.items()
              if "," in key and "stderr" not in key}  # fmt: skip
    assert found["healed", 6] == wanted
    assert set(wanted) == {"winogrande/acc", "gsm8k/exact_match"}


def test_an_unknown_task_and_a_limit_without_tasks_are_refused_before_the_run_begins(tiny, text, data, tmp_path):
    with pytest.raises(UserError, match=r"config.evaluation.task_limit=5 needs config.evaluation.tasks, found none"):
        make_config(tiny, text, evaluation_task_limit=5)
    with pytest.raises(UserError, match=r"--tasks: 'arcade' is neither in .* nor among lm-eval's"):
        train.run(make_config(tiny, text, evaluation_tasks=("arcade",), evaluation_task_data=str(data)), tmp_path / "a")
    assert not (tmp_path / "a").exists()

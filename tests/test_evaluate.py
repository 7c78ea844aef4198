"""The evaluate command gives lm-eval's numbers, item by item, resumes after a kill, and refuses what cannot be."""

import json
import pathlib
from typing import Any

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from solar_jax.errors import UserError
from solar_jax.evaluate import evaluate_tasks
from solar_jax.evaluation.bos import check_bos_setting
from solar_jax.evaluation.harness import SolarModel
from tests.conftest import hf_model, save_hf

pytestmark = pytest.mark.slow  # lm-eval imports for ten seconds
CHOICE = """
task: small_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}/items.jsonl, train: {data}/items.jsonl}}}}
output_type: multiple_choice
test_split: test
fewshot_split: train
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
num_fewshot: 2
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITTEN = """
task: small_written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}/items.jsonl}}}}
output_type: generate_until
test_split: test
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n", "Q"], max_gen_toks: 12}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("tasks")
    items = [
        {"question": f"number {i}", "choices": ["one", "two two", "three"], "answer": i % 3} for i in range(7)
    ]  # fmt: skip
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    for name, text in (("small_choice", CHOICE), ("small_written", WRITTEN)):
        (folder / f"{name}.yaml").write_text(text.format(data=folder))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return save_hf(hf_model(), tmp_path_factory.mktemp("evaluate") / "model")


NAMES = ["small_choice", "small_written"]


def samples(content: dict[str, Any]) -> dict[str, list[Any]]:
    """Of each item, the prompts, what the model said and what it got."""
    kept = {}
    for name, items in content["samples"].items():
        ordered = sorted(items, key=lambda item: item["doc_id"])
        kept[name] = [
            (item["doc_id"], json.dumps(item["arguments"], default=str), item["filtered_resps"]) for item in ordered
        ]
    return kept


def test_every_item_is_lm_evals(folder, tasks, tmp_path):
    ours = evaluate_tasks(str(folder), NAMES, tmp_path / "out.json", str(tasks), check_bos=False)
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1), tasks=NAMES,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False), bootstrap_iters=0,
    )  # fmt: skip
    assert json.loads((tmp_path / "out.json").read_text())["results"].keys() == set(NAMES)
    a, b = samples(ours), samples(theirs)
    for name in NAMES:
        assert len(a[name]) == 7
        for (number, prompt, said), (other, other_prompt, other_said) in zip(a[name], b[name], strict=True):
            assert (number, prompt) == (other, other_prompt)
            if name == "small_written":
                assert said == other_said
            else:
                assert [x for x, _ in said] == pytest.approx([x for x, _ in other_said], abs=1e-3)
                assert [y for _, y in said] == [y for _, y in other_said]
        for metric, value in theirs["results"][name].items():
            if "stderr" not in metric and isinstance(value, float):
                assert ours["results"][name][metric] == value
    assert ours["tokens"]["computed"] < 0.7 * ours["tokens"]["asked"]
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_a_killed_evaluation_goes_on_and_ends_in_the_same_results(folder, tasks, tmp_path, monkeypatch):
    whole = evaluate_tasks(str(folder), NAMES, tmp_path / "whole.json", str(tasks), check_bos=False)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SolarModel, "generate_until", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate_tasks(str(folder), NAMES, tmp_path / "out.json", str(tasks), check_bos=False)
    assert not (tmp_path / "out.json").exists()
    found = evaluate_tasks(str(folder), NAMES, tmp_path / "out.json", str(tasks), check_bos=False)
    assert whole.pop("date") <= found.pop("date")
    assert found == whole, "to the last digit of a log-likelihood"


def test_an_unknown_task_is_named_before_the_model_is_loaded(tasks, tmp_path):
    with pytest.raises(UserError, match=r"--tasks: 'arc' is neither in .* nor among lm-eval's [0-9,]+ tasks"):
        evaluate_tasks("/not/there", ["arc"], tmp_path / "out.json", str(tasks))


def test_a_bos_setting_that_reads_text_worse_stops_and_names_the_flag(folder, monkeypatch):
    model = SolarModel(str(folder))
    found = check_bos_setting(model, stops=False)
    assert not found.uses
    assert model.scorer.counts.asked == 0
    losses = iter([(0, 1.0), (1, 1.5)])

    class Total:
        def __init__(self, loss: float, count: int):
            self.total = -loss * count

    def scores(queries):
        for number, loss in losses:
            yield number, Total(loss, len(queries[number].targets))

    monkeypatch.setattr(model.scorer, "scores", scores)
    with pytest.raises(UserError, match=r"without it, at 1\.50 .* way has 1\.00; give --add_bos_token=true"):
        check_bos_setting(model)

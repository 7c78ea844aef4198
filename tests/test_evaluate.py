"""The evaluate command gives lm-eval's numbers, item by item, resumes after a kill, and refuses what cannot be."""

import json
import pathlib
import subprocess
import sys
from typing import Any

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from solar_jax.errors import UserError
from solar_jax.evaluate import evaluate_tasks
from solar_jax.evaluation.bos import check_bos_setting
from solar_jax.evaluation.h6 import H6
from solar_jax.evaluation.harness import SolarModel
from tests.conftest import hf_model, save_hf
from tests.evaluation import h6_data

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
    """Each item's prompts, what the model said and what it got."""
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


def test_h6_gives_the_six_scores_their_mean_and_a_report(folder, tmp_path_factory, tmp_path, capsys):
    data = h6_data.write(tmp_path_factory.mktemp("h6"))
    found = evaluate_tasks(str(folder), ["h6_2023"], tmp_path / "h6.json", data=str(data), limit=2, check_bos=False)
    assert json.loads((tmp_path / "h6.json").read_text()) == found
    six = [found["h6"][one.name] for one in H6]
    assert found["h6"]["mean"] == pytest.approx(sum(six) / 6)
    assert found["h6"]["items"] == {one.name: 4 if one.name == "mmlu" else 2 for one in H6}
    assert found["n-shot"]["arc_challenge"] == 25
    assert set(found["samples"]) == {*(one.name for one in H6), "mmlu_anatomy", "mmlu_virology"} - {"mmlu"}
    assert (found["preset"], found["dtype"], found["bos"]["uses"]) == ("h6_2023", "float32", False)
    said = capsys.readouterr().out
    assert "h6_2023 differs from h6: gsm8k, stops: ':'" in said
    assert f"H6{found['h6']['mean']:>37.2f}" in said
    assert {file.name for file in tmp_path.iterdir()} == {"h6.json", "h6.md", "h6.png"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num_fewshot=3"], "--num_fewshot: h6 sets the shots of its tasks"),
        (["--apply_chat_template"], "--apply_chat_template: h6 is measured without"),
        (["--data=/not/there"], "--data=/not/there: no such folder"),
        (["--limit=0"], "--limit must be at least 1, found 0"),
    ],
)
def test_flags_that_contradict_h6_are_refused(flags, said, tmp_path):
    command = [sys.executable, "-m", "solar_jax.evaluate", "--model=smollm2", "--tasks=h6", f"--out={tmp_path}/a.json"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert not list(tmp_path.iterdir())


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

"""Whole studies on a tiny model: what they leave and say, that they go on exactly, and that one arm may fail."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pyarrow.parquet
import pytest

from solar_jax import study as command
from solar_jax.errors import UserError
from solar_jax.studying import schedule
from tests.studying.studies import ARMS, content, made, make_parts

ROOT = pathlib.Path(__file__).parents[1]
PICTURES = {"zero_token.png", "loss_over_tokens.png", "loss_over_flops.png", "differences.png", "ranks.png"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> pathlib.Path:
    return make_parts(tmp_path_factory.mktemp("study"))


def run(study, folder):
    return command.run_study(study, folder, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory):
    """An uninterrupted study."""
    folder = tmp_path_factory.mktemp("studies") / "whole"
    return folder, run(made(parts), folder)


def table(folder: pathlib.Path, name: str = "results") -> list[dict]:
    return pyarrow.parquet.read_table(folder / f"{name}.parquet").to_pylist()


def test_a_study_leaves_a_row_for_every_arm_rate_seed_evaluation_and_split(whole):
    folder, _ = whole
    rows = table(folder)
    first = {(r["arm"], r["rate"], r["step"], r["split"]) for r in rows if r["seed"] == 0}
    steps = {"base": (0, 2, 4), "base_flops": (0, 2, 6), "dus": (0, 2, 4), "block": (0, 2, 4), "pro": (0, 2, 4)}
    splits = ("validation", "test")
    assert first == {(a, r, s, k) for a in steps for r in (3e-3, 1e-3) for s in steps[a] for k in splits}
    assert {r["arm"] for r in rows if r["seed"] == 1} >= {"base", "base_flops", "dus", "block"}
    chosen = {r["arm"]: r["rate"] for r in rows if r["chosen"]}
    assert all(r["rate"] == chosen[r["arm"]] for r in rows if r["seed"] == 1)
    (one,) = (r for r in rows if (r["arm"], r["rate"], r["seed"], r["step"], r["split"]) == ("dus", 3e-3, 0, 4, "test"))
    assert (one["operator"], one["control"], one["layers"], one["trainable"]) == ("dus(m=1)", "", 6, "all")
    assert one["tokens"] == 4 * 4 * 32
    assert one["flops"] == one["tokens"] * 1_560_576  # worked out in tests/studying/test_arms.py
    documents = [
        d
        for d in table(folder, "documents")
        if (d["arm"], d["rate"], d["seed"], d["step"], d["split"]) == ("dus", 3e-3, 0, 4, "test")
    ]
    assert len(documents) == one["documents"]
    assert sum(d["tokens"] for d in documents) == one["document_tokens"]
    loss = sum(d["loss"] * d["tokens"] for d in documents) / one["document_tokens"]
    assert one["loss"] == pytest.approx(loss)
    assert {p.name for p in folder.iterdir()} == PICTURES | {
        "results.parquet", "documents.parquet", "report.md", "study.json", "runs",
    }  # fmt: skip
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in PICTURES)


def test_the_report_answers_plainly_and_its_numbers_are_those_of_the_table(whole):
    folder, found = whole
    text = (folder / "report.md").read_text()
    rows = [r for r in table(folder) if r["chosen"] and r["split"] == "test"]
    for one in found.arms:
        ends = [r["loss"] for r in rows if (r["arm"], r["step"]) == (one.arm.name, one.arm.steps)]
        assert found.curves[one.arm.name][-1] == pytest.approx(np.mean(ends))
    count = next(r["documents"] for r in rows)
    assert count < 20
    assert f"**Only {count} test documents**" in text.split("## Arms")[0]
    assert "block's lead over dus" in text or "no clear lead of block over dus" in text
    for kind in ("equal tokens", "equal FLOPs"):
        assert f"the base at {kind}" in text.split("## Arms")[0]
    for said in ("undecided", "rank correlation", "sees the same rows in the same order", "Epochs of", "Sunk cost"):
        assert said in text
    assert {(c.arm, c.control) for c in found.comparisons} == {
        (arm, control) for arm in ("dus", "block", "pro") for control in ("base", "base_flops")
    }
    by_hand = found.curves["dus"][-1] - found.curves["base"][-1]
    (compared,) = (c for c in found.comparisons if (c.arm, c.control) == ("dus", "base"))
    assert compared.seeds == 2
    assert compared.difference.value == pytest.approx(by_hand)


def test_a_study_that_is_killed_between_arms_goes_on_to_the_same_table(whole, parts, tmp_path, monkeypatch):
    folder, _ = whole
    ran, train = [], schedule.train_arm_of_study

    def killed(bench, run, *rest):
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(run)
        return train(bench, run, *rest)

    monkeypatch.setattr(schedule, "train_arm_of_study", killed)
    with pytest.raises(KeyboardInterrupt):
        run(made(parts), tmp_path / "s")
    assert not (tmp_path / "s" / "results.parquet").exists()
    before = list(ran)
    monkeypatch.setattr(schedule, "train_arm_of_study", lambda bench, r, *a: ran.append(r) or train(bench, r, *a))
    run(made(parts), tmp_path / "s")
    assert len(set(ran)) == len(ran)  # nothing ran twice
    assert ran[:3] == before
    for name in ("results.parquet", "documents.parquet"):
        assert (tmp_path / "s" / name).read_bytes() == (folder / name).read_bytes()
    ran.clear()
    run(made(parts), tmp_path / "s")
    assert ran == []


def test_an_arm_that_fails_is_told_the_others_go_on_and_it_is_tried_again(whole, parts, tmp_path, monkeypatch, capsys):
    folder, _ = whole
    train = schedule.train_arm_of_study

    def failing(bench, run, *rest):
        if run.arm.name == "dus":
            raise RuntimeError("out of memory\nwith a second line")
        return train(bench, run, *rest)

    monkeypatch.setattr(schedule, "train_arm_of_study", failing)
    found = run(made(parts, seeds=(0,)), tmp_path / "s")
    said = "RuntimeError: out of memory with a second line"
    assert f"dus, rate 0.003, seed 0: failed: {said}" in capsys.readouterr().out
    assert [one.arm.name for one in found.arms] == ["base", "base_flops", "block", "pro"]
    report = (tmp_path / "s" / "report.md").read_text()
    assert f"- dus, rate 0.003, seed 0: {said}\n" in report
    assert "block's lead over dus: not measured" in report
    assert "Without a finished run: dus." in report
    failed = json.loads((tmp_path / "s" / "runs" / "dus" / "0.003_0.failed.json").read_text())
    assert failed["failed"] == said
    monkeypatch.setattr(schedule, "train_arm_of_study", train)
    found = run(made(parts), tmp_path / "s")  # seeds may be added
    assert not list((tmp_path / "s" / "runs").rglob("*.failed.json"))
    assert (tmp_path / "s" / "results.parquet").read_bytes() == (folder / "results.parquet").read_bytes()


def test_where_every_run_fails_that_is_the_sentence(parts, tmp_path, monkeypatch):
    def failing(*_):
        raise UserError("it is too large")

    monkeypatch.setattr(schedule, "train_arm_of_study", failing)
    with pytest.raises(UserError, match="every run failed, the first with: it is too large"):
        run(made(parts, seeds=(0,)), tmp_path / "s")


def test_arms_side_by_side_on_sub_meshes_have_the_same_losses(whole, parts, tmp_path):
    folder, _ = whole
    few = made(parts, arms=(ARMS[0], *ARMS[2:4]), rates=(3e-3,), seeds=(0,), devices_per_arm=2)
    command.run_study(few, tmp_path / "s", devices=jax.devices()[:5])
    alone = {tuple(r[k] for k in ("arm", "rate", "seed", "step", "split")): r["loss"] for r in table(folder)}
    rows = table(tmp_path / "s")
    assert {r["arm"] for r in rows} == {"base", "dus", "block"}
    for r in rows:
        assert r["loss"] == pytest.approx(
            alone[tuple(r[k] for k in ("arm", "rate", "seed", "step", "split"))], rel=1e-5
        )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run_optimizer_weight_decay": 0.5}, "config.run.optimizer.weight_decay was 0.1 and is 0.5 now"),
        ({"document_tokens": 9}, "config.document_tokens was 0 and is 9 now"),
        ({"run_data_holdout_every": 5}, "config.run.data.holdout_every was 4 and is 5 now"),
        (
            {"arms": (*ARMS[:3], {**ARMS[3], "b": 3}, ARMS[4])},
            "is of an arm block whose operator was 'block_rep",
        ),
    ],
)
def test_results_of_another_study_are_refused_and_kept(whole, parts, changes, said):
    folder, _ = whole
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(UserError) as e:
        run(made(parts, **changes), folder)
    assert said in str(e.value)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before


def test_a_folder_that_is_no_study_is_refused(parts, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds files but no study\.json, so it is no study's folder"):
        run(made(parts), tmp_path)


def test_more_passes_than_a_source_allows_are_refused(parts, tmp_path):
    with pytest.raises(UserError, match=r"config.data.sources: .*docs.jsonl has"):
        run(made(parts, run_train_steps=400), tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.mark.slow  # another process
def test_the_command_says_its_plan_and_takes_changes_of_any_key(parts, tmp_path):
    file = tmp_path / "study_tiny.py"
    file.write_text(
        f"from tests.studying.studies import content\nimport pathlib\n\n\n"
        f"def get_config():\n    return content(pathlib.Path({str(parts)!r}))\n"
    )
    assert content(parts).name == "tiny"

    def ran(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "solar_jax.study", f"--config={file}", *arguments], cwd=ROOT, capture_output=True,
            text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    done = ran(
        "--config.run.train.steps=40", "--config.run.data.holdout_every=3", "--dry_run", f"--workdir={tmp_path}/s"
    )
    assert done.returncode == 0, done.stderr
    assert "base_flops" in done.stdout
    assert "58     7,424" in done.stdout  # 40 x 1.4432, x 4 x 32
    assert not (tmp_path / "s").exists()
    done = ran("--config.run.train.stepz=40")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: config.run.train.stepz is not a key of the config; did you mean")
    done = ran("--config=configs/dus_48l.py:smollm2")
    assert (done.returncode, done.stderr) == (
        2, "error: --config must be a study, a file with arms, such as configs/study_smollm2.py.\n",
    )  # fmt: skip

"""Several processes over loopback do what one does: training, and conversions of which each writes its share."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import free_port, save_model_and_text
from tests.evaluation import h6_data

REPO = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run_together(count: int, module: str, *arguments: str) -> None:
    """Runs a command in `count` processes of one CPU device each, and shows what they said if one fails."""
    common = os.environ | {
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
    }
    if count == 1:
        del common["JAX_COORDINATOR_ADDRESS"]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments], cwd=REPO, env=common | {"JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(count)
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[0] for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(said)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
    return save_model_and_text(tmp_path_factory.mktemp("source"), words=3000)


def train(count: int, source: pathlib.Path, workdir: pathlib.Path, *more: str) -> None:
    run_together(
        count, "solar_jax.train", f"--config={REPO}/configs/dus_48l.py:smollm2", f"--workdir={workdir}",
        f"--config.source={source / 'model'}", "--config.growth.m=1", f"--config.data.sources={source / 'corpus.txt'}",
        "--config.data.sequence_length=32", "--config.train.steps=4", "--config.train.batch_size=4",
        "--config.optimizer.warmup_steps=1", "--config.evaluation.every=2", "--config.evaluation.windows=6",
        "--config.checkpoint.every=2", "--config.train.control=False", *more,
    )  # fmt: skip


def lines(file: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def assert_same_run(found: pathlib.Path, expected: pathlib.Path) -> None:
    """Every loss within 1e-5, each recorded once."""
    for name, key in (("metrics.jsonl", "loss"), ("metrics.jsonl", "grad_norm"), ("evals.jsonl", "loss")):
        a, b = lines(found / name), lines(expected / name)
        assert [r["step"] for r in a] == [r["step"] for r in b]
        np.testing.assert_allclose([r[key] for r in a], [r[key] for r in b], rtol=1e-5)


def test_two_and_four_processes_train_with_the_losses_of_one(source, tmp_path):
    train(1, source, tmp_path / "1")
    train(2, source, tmp_path / "2", "--config.data.workers=1")  # a process of each that makes its batches
    # Two slices of two processes, each of which has half of the tokens of its slice's rows.
    train(4, source, tmp_path / "4", "--config.mesh.slice=2", "--config.mesh.context=2", "--config.mesh.fsdp=1")
    for count in (2, 4):
        assert_same_run(tmp_path / str(count), tmp_path / "1")
        assert (tmp_path / str(count) / "hf" / "model.safetensors").stat().st_size == (
            tmp_path / "1" / "hf" / "model.safetensors"
        ).stat().st_size


def test_processes_that_convert_together_write_what_one_writes(source, tmp_path):
    for count in (1, 2):
        grow = ("--operator=dus", "--m=1", f"--source={source / 'model'}", "--verify")
        run_together(count, "solar_jax.upscale", *grow, f"--out={tmp_path / f'hf{count}'}", "--max_shard_size=100KB")
        run_together(count, "solar_jax.convert", *grow, f"--out={tmp_path / f'own{count}'}", "--to=orbax")
        run_together(
            count, "solar_jax.convert", f"--source={tmp_path / f'own{count}'}", "--to=hf",
            f"--out={tmp_path / f'back{count}'}", "--max_shard_size=100KB",
        )  # fmt: skip
    files = {f.name for f in (tmp_path / "hf1").iterdir()}
    assert len([name for name in files if name.endswith(".safetensors")]) > 4
    for name in files - {"lineage.json", "certificate.json", "README.md"}:
        for folder in ("hf2", "back1", "back2"):
            assert (tmp_path / folder / name).read_bytes() == (tmp_path / "hf1" / name).read_bytes()


def test_two_processes_tune_on_pairs_with_the_losses_of_one(source, tmp_path):
    records = [
        {"prompt": f"question {i}", "chosen": f"yes {i * i}", "rejected": "no " * (1 + i % 3)} for i in range(60)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    for count in (1, 2):
        run_together(
            count, "solar_jax.train", f"--config={REPO}/configs/sdpo.py:smollm2", f"--workdir={tmp_path / str(count)}",
            f"--config.source={source / 'model'}", f"--config.data.sources={tmp_path / 'pairs.jsonl'}",
            "--config.data.sequence_length=128", "--config.data.template=solar", "--config.train.steps=3",
            "--config.train.batch_size=4", "--config.preferences.chunks=random:2", "--config.evaluation.every=2",
            "--config.evaluation.windows=4", "--config.evaluation.batch_size=4", "--config.checkpoint.every=2",
        )  # fmt: skip
    assert_same_run(tmp_path / "2", tmp_path / "1")
    for part in ("1", "2"):
        assert lines(tmp_path / part / "chunk1" / "metrics.jsonl")[0]["loss"] == pytest.approx(np.log(2), abs=1e-3)


def test_two_processes_evaluate_as_one(source, tmp_path):
    """Each builds every request; the first alone writes."""
    data = h6_data.write(tmp_path)
    common = [f"--model={source / 'model'}", "--tasks=winogrande,gsm8k", f"--data={data}", "--nocheck_bos"]
    for count in (1, 2):
        run_together(count, "solar_jax.evaluate", *common, f"--out={tmp_path / f'{count}.json'}")
    one, two = (json.loads((tmp_path / f"{count}.json").read_text()) for count in (1, 2))
    assert len(one["samples"]["winogrande"]) == 6
    for task, items in one["samples"].items():
        for a, b in zip(items, two["samples"][task], strict=True):
            assert a["arguments"] == b["arguments"]
            if task == "gsm8k":
                assert a["resps"] == b["resps"]
            else:
                values = [[float(r[0][0]) for r in item["resps"]] for item in (a, b)]
                np.testing.assert_allclose(*values, atol=1e-4)

"""The command as a user meets it: killed, on a Ray cluster, with bad flags."""

import dataclasses
import operator
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time

import pytest

from solar_jax import train
from solar_jax.config import ShapeConfig
from solar_jax.data.prepared import engines
from solar_jax.errors import UserError
from solar_jax.prepare import Options, prepare
from solar_jax.storage.atomic_folder import partial
from tests.data.prepared.test_build import config, content, jsonl, random_texts
from tests.test_train import make_config, metrics

ROOT = pathlib.Path(__file__).parents[1]

# As `python -m solar_jax.prepare`, with small blocks and shards, so that there are many.
RUN = """
import sys
from solar_jax import prepare
from solar_jax.cli import command
from solar_jax.data import packing
from solar_jax.data.prepared import shards
packing._BLOCK_CHARACTERS, packing._ROWS_A_BLOCK, shards.BLOCKS_A_SHARD = 20000, 1, 4
if __name__ == "__main__":
    prepare._WORTH_A_PROCESS = int(sys.argv.pop(1))
    command.begin(prepare.define_flags, prepare.check)
    command.start(prepare.main)
"""


def start(source, texts: pathlib.Path, out: pathlib.Path, *flags: str, script: pathlib.Path) -> subprocess.Popen:
    script.write_text(RUN)
    command = [
        sys.executable, str(script), "1000000000", "--config=configs/dus_48l.py:smollm2", f"--config.source={source}",
        "--config.data.packing=best_fit", "--config.data.mask_documents=true", "--config.data.sequence_length=64",
        f"--config.data.sources={texts}", f"--out={out}", "--dedup", *flags,
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.slow
def test_kill_9_at_any_moment_then_the_same_command_completes_the_same_bytes(tiny, tmp_path):
    texts = jsonl(tmp_path / "texts.jsonl", [t for k in range(8) for t in random_texts(k, 4000)])
    whole, out, script = tmp_path / "whole", tmp_path / "killed" / "out", tmp_path / "run.py"
    process = start(tiny, texts, whole, script=script)
    begin = time.monotonic()
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert "0 duplicates" not in stdout
    shards = len(list(whole.glob("*.array_record")))
    assert shards > 12
    rng, kills, kept = random.Random(0), 0, 0
    for part in (0, 0.3, 0.6, 0.8):
        process = start(tiny, texts, out, script=script)
        made = partial(out) / "shards"
        while process.poll() is None and not (
            made.exists() and len(list(made.glob("*.json"))) >= part * shards and time.monotonic() > begin
        ):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.communicate()
        if process.returncode == 0:  # it was faster
            shutil.rmtree(out)
            continue
        kills += 1
        assert [f.name for f in out.parent.iterdir()] == [".out.partial"]
        kept = max(kept, len(list(made.glob("*.json"))))
    assert kills >= 2
    assert kept > 2
    process = start(tiny, texts, out, script=script)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert "Resuming" in stdout
    assert content(out) == content(whole)


@pytest.mark.slow
def test_ray_makes_the_same_bytes(tiny, tmp_path, monkeypatch):
    # Ray reads this when it is imported: under `uv run` it would install the whole environment again, for its workers.
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    import ray  # seconds to import; a part of the extra test

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # its workers need this package
    texts = jsonl(tmp_path / "texts.jsonl", random_texts(0, 300))
    cfg = config(tiny, texts)
    prepare(cfg, tmp_path / "local", Options(1, dedup=True))
    prepare(cfg, tmp_path / "ray", Options(2, engine="ray", dedup=True))
    assert content(tmp_path / "ray") == content(tmp_path / "local")
    assert not ray.is_initialized()


def test_rows_for_a_model_from_scratch_are_those_of_the_model_whose_tokenizer_it_takes(tiny, tmp_path):
    texts = jsonl(tmp_path / "texts.jsonl", random_texts(0, 200))
    shape = ShapeConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    own = config(tiny, texts)
    new = dataclasses.replace(own, source=f"scratch:{tiny}", model=shape)
    for name, its in (("own", own), ("new", new)):
        prepare(its, tmp_path / name, Options(workers=1))
    own_rows, new_rows = (
        {name: x for name, x in content(tmp_path / folder).items() if not name.endswith(".json")}
        for folder in ("own", "new")
    )
    assert own_rows
    assert own_rows == new_rows


def test_results_come_in_order_and_no_further_than_asked():
    taken = []

    def items():
        for i in range(50):
            taken.append(i)
            yield i

    results = engines.local(operator.neg, items(), 2)
    assert next(results) == 0
    assert len(taken) <= 5  # two a worker are handed out, and one is back
    assert list(results) == [-i for i in range(1, 50)]


def test_an_error_of_a_worker_is_raised_and_its_death_is_told():
    with pytest.raises(TypeError):
        list(engines.local(operator.neg, ["x"], 2))
    with pytest.raises(UserError, match="a worker process died"):
        list(engines.local(os._exit, [3], 2))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--out=x"], "prepare needs --config FILE and --out DIR"),
        (["--config=configs/dus_48l.py:smollm2", "--out=gs://b/x"], "ArrayRecord only writes local files"),
        (["--config=configs/dus_48l.py:smollm2", "--out=x", "--engine=beam"], "engine"),
    ],
)
@pytest.mark.slow
def test_bad_flags_are_one_sentence(tmp_path, flags, expected):
    flags = [f.replace("configs", str(ROOT / "configs")) for f in flags]
    found = subprocess.run(
        [sys.executable, "-m", "solar_jax.prepare", *flags], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert found.returncode == 2
    assert found.stderr.startswith("error: ")
    assert expected in found.stderr
    assert found.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_training_on_a_prepared_folder_is_training_on_its_text(tiny, tmp_path):
    text = jsonl(tmp_path / "text.jsonl", random_texts(4, 400))
    runs = []
    for source in (text, tmp_path / "prepared"):
        cfg = make_config(tiny, source, data_holdout_every=4)
        if source != text:
            prepare(make_config(tiny, text, data_holdout_every=4), source, Options(1))
        folder = tmp_path / f"run{len(runs)}"
        summary = train.run(cfg, folder)
        runs.append((metrics(folder), summary["final_loss"], summary["heldout_targets"]))
    assert runs[0] == runs[1]
    assert len(runs[0][0]) == 6

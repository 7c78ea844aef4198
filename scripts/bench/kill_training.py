"""Kills a training run with SIGKILL again and again, at random: during start-up, steps or saves.

    uv run --extra test python scripts/bench/kill_training.py --work DIR [--kills 50] [--seed 0] [--bucket]

Every start must resume from the newest checkpoint that was complete when the process died; no checkpoint may be lost or
incomplete, and a finished run must have bitwise the same losses and weights as an uninterrupted run. The model is tiny,
so that most of the time goes into starting Python and jax. With --bucket the run is in an emulated bucket on loopback,
where in addition every 151st request fails; the uninterrupted run is local.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from etils import epath

from solar_jax.storage.paths import is_local

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

EVERY = 5  # steps between checkpoints
MOMENTS = ("start-up", "steps", "save")
MARKER = "commit_success.txt"


def make_source(folder: pathlib.Path) -> None:
    """Makes a tiny model and a text."""
    from tests.conftest import hf_model, save_hf

    save_hf(hf_model(num_hidden_layers=4), folder / "model")
    rng = random.Random(0)
    (folder / "corpus.txt").write_text(" ".join(rng.choices(["depth", "up", "scaling", "grows", "a", "model"], k=4000)))


def command(source: pathlib.Path, workdir: pathlib.Path) -> list[str]:
    flags = {
        "source": source / "model", "growth.m": 1, "data.sources": source / "corpus.txt", "data.sequence_length": 32,
        "train.steps": 40, "train.batch_size": 4, "train.control": False, "optimizer.warmup_steps": 1,
        "evaluation.every": 10, "evaluation.windows": 6, "checkpoint.every": EVERY,
    }  # fmt: skip
    config = [f"--config.{key}={value}" for key, value in flags.items()]
    start = [sys.executable, "-u", "-m", "solar_jax.train", "--config=configs/dus_48l.py:smollm2"]
    return [*start, f"--workdir={workdir}", *config]


def whole_steps(workdir: pathlib.Path) -> list[int]:
    """Returns the steps of the checkpoints that have their marker, ascending."""
    return sorted(int(f.name) for f in saves(workdir) if f.name.isdigit() and (f / MARKER).exists())


def saves(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Returns the folders of checkpoints, complete or not."""
    try:
        return list((workdir / "checkpoints").iterdir())
    except FileNotFoundError:  # e.g. a bucket folder that the run has just emptied
        return []


def metrics(workdir: pathlib.Path) -> list[tuple]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r["loss"], r["grad_norm"], r["learning_rate"], r["tokens"]) for r in lines]


def result(workdir: pathlib.Path) -> tuple:
    """Returns the parts of a finished run that must be bitwise reproducible."""
    return metrics(workdir), (workdir / "evals.jsonl").read_bytes(), (workdir / "hf" / "model.safetensors").read_bytes()


def wait_for(process: subprocess.Popen, happened: Callable[[], bool]) -> None:
    while process.poll() is None and not happened():
        time.sleep(0.002)


def kill_one(
    process: subprocess.Popen,
    said: pathlib.Path,
    workdir: pathlib.Path,
    moment: str,
    rng: random.Random,
    startup: float,
) -> None:
    """Kills a run that was just started, and writes to `said`, at a random moment of the given kind."""
    slower = 1 if is_local(workdir) else 8
    if moment == "start-up":
        time.sleep(rng.uniform(0, startup))
    elif moment == "steps":
        wait_for(process, lambda: "healed step " in said.read_text())
        time.sleep(rng.uniform(0, 0.6 * slower))
    else:
        whole = whole_steps(workdir)  # what the last kill left incomplete is not a save of this start
        left = {f.name for f in saves(workdir)} - set(map(str, whole))
        wait_for(process, lambda: any(f.name not in left and not (f / MARKER).exists() for f in saves(workdir)))
        time.sleep(rng.uniform(0, 0.15 * slower))
    process.kill()
    process.wait()


def check_left(workdir: pathlib.Path, before: list[int]) -> list[int]:
    """Checks that a killed run lost no complete checkpoint, except to newer ones, and that the newest can be read.

    Returns:
      Their steps.
    """
    from solar_jax.orbax_store import checksums

    steps = whole_steps(workdir)
    assert not before or (steps and steps[-1] >= before[-1]), f"checkpoint {before[-1]} was lost, there are {steps}"
    for step in steps[-1:]:
        folder = workdir / "checkpoints" / str(step)
        names = checksums.stored_shapes(folder, ("params", "opt_state"))
        found, seal = checksums.stored_sums(folder, names), checksums.read_seal(folder)
        assert seal is None or checksums.differing(seal["sums"], found) is None, folder
    return steps


def run(work: pathlib.Path, kills: int, seed: int, bucket: bool = False) -> dict[str, int]:
    """Kills until `kills` are counted and the current run has finished.

    Returns:
      Kills by moment, finished runs, and the most steps that one start had to repeat.
    """
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    with emulated_bucket() if bucket else contextlib.nullcontext(work) as place:
        return kill_again_and_again(work, place / "run", kills, random.Random(seed))


@contextlib.contextmanager
def emulated_bucket() -> Iterator[pathlib.Path]:
    """Serves a bucket on loopback in which every 151st request fails."""
    from solar_jax.storage import paths
    from tests.bucket import serving

    with serving() as (url, faults):
        faults.every = 151
        yield paths.path(url)


def kill_again_and_again(work: pathlib.Path, workdir: pathlib.Path, kills: int, rng: random.Random) -> dict[str, int]:
    """Does the work of `run`; `workdir` may be in a bucket."""
    counts = dict.fromkeys((*MOMENTS, "finished", "most_again"), 0)
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "XDG_CACHE_HOME": str(work / "cache")}
    make_source(work)
    begin = time.monotonic()
    subprocess.run(command(work, work / "whole"), cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
    startup = 0.7 * (time.monotonic() - begin)
    expected, before = result(work / "whole"), []
    while True:
        with (work / "said.txt").open("w") as out:
            process = subprocess.Popen(
                command(work, workdir), cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT
            )  # fmt: skip
            moment = rng.choice(MOMENTS)
            if sum(counts[m] for m in MOMENTS) < kills:
                kill_one(process, work / "said.txt", workdir, moment, rng, startup)
            else:
                process.wait()
        said = (work / "said.txt").read_text()
        lines = [line for line in said.splitlines() if line.startswith("healed step ")]
        if before and lines:
            assert f"resuming from the checkpoint of step {before[-1]}" in said, said
        if process.returncode == 0:
            assert result(workdir) == expected
            counts["finished"] += 1
            epath.Path(workdir).rmtree()
            before = []
            if sum(counts[m] for m in MOMENTS) >= kills:
                return counts
            continue
        assert process.returncode == -9, said
        counts[moment] += 1
        before = check_left(workdir, before)
        if lines:
            reached = int(lines[-1].split()[2].split("/")[0])
            counts["most_again"] = max(counts["most_again"], reached - (before[-1] if before else 0))
        print(f"killed in {moment:<8} whole checkpoints {before}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bucket", action="store_true")
    args = parser.parse_args()
    counts = run(args.work, args.kills, args.seed, args.bucket)
    print(f"{sum(counts[m] for m in MOMENTS)} kills: {', '.join(f'{counts[m]} in {m}' for m in MOMENTS)}")
    print(f"{counts['finished']} finished runs, each bit by bit the one that nobody killed")
    print(f"at most {counts['most_again']} steps taken again, checkpoints every {EVERY}")


if __name__ == "__main__":
    main()

"""Saves and restores a state, next to a plain write and read of the same bytes to the same disk, in turns.

    uv run --extra demo python scripts/bench/checkpoint.py --work DIR [--gigabytes 2] [--rounds 3]

The plain write is one file, written in 64 MB pieces and followed by fsync; the plain read comes after the file's pages
were dropped from the page cache, as do the restores. The save that is compared with it also has the machine to itself,
until the checkpoint is committed; the read-back that follows is reported separately. For a second save, with a step
running beside it, two times are reported: that of the call that begins it, in which training stands still, and how much
longer than usual the next step takes, which on a CPU needs new memory, since the bytes being written are the old state
itself. Each round begins with memory that was touched before, to exclude a virtual machine's first touch of a page. DIR
needs three times the state's disk space.
"""

import argparse
import os
import pathlib
import shutil
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from solar_jax.config import CheckpointConfig
from solar_jax.orbax_store.layout import FOLDER
from solar_jax.orbax_store.store import CheckpointStore

PIECE = 1 << 26


def make_state(gigabytes: float) -> dict:
    """Makes stacked float32 layers as a model has them, and two moments of each."""
    layers = max(1, round(gigabytes * 1e9 / (3 * 4 * 4 * 1024 * 1024)))
    keys = iter(jax.random.split(jax.random.key(0), 12))

    def arrays() -> dict:
        return {"layers": {f"w{i}": jax.random.normal(next(keys), (layers, 1024, 1024)) for i in range(4)}}

    return {"params": arrays(), "opt_state": {"mu": arrays(), "nu": arrays()}}


def forget(folder: pathlib.Path) -> None:
    """Drops a folder's pages from the page cache, as far as the system allows."""
    os.sync()
    for file in folder.rglob("*") if folder.is_dir() else [folder]:
        if file.is_file():
            with file.open("rb") as f:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(gigabytes: float) -> None:
    """Touches memory and frees it: a virtual machine's first touch of a page can cost ten times a later one."""
    memory = np.empty(int(gigabytes * 1e9), np.uint8)
    memory[::4096] = 1


def plain_write(file: pathlib.Path, state: dict) -> float:
    os.sync()
    begin = time.perf_counter()
    with file.open("wb", buffering=0) as f:
        for x in jax.tree.leaves(state):
            content = memoryview(np.asarray(x)).cast("B")
            for i in range(0, len(content), PIECE):
                f.write(content[i : i + PIECE])
        os.fsync(f.fileno())
    return time.perf_counter() - begin


def plain_read(file: pathlib.Path) -> float:
    forget(file)
    buffer = bytearray(PIECE)
    begin = time.perf_counter()
    with file.open("rb", buffering=0) as f:
        while f.readinto(buffer):
            pass
    return time.perf_counter() - begin


def save(store: CheckpointStore, number: int, state: dict) -> dict[str, float]:
    """Saves with nothing running beside it; returns seconds by name."""
    os.sync()
    begin = time.perf_counter()
    store.begin(number, **state, host={"step": number})
    wait_for(store, number)
    there = time.perf_counter() - begin
    settle(store)
    return {"save": there, "read back": time.perf_counter() - begin - there}


def save_while_stepping(store: CheckpointStore, number: int, state: dict, step) -> tuple[dict, dict[str, float]]:
    """Begins a save and takes a step; returns the new state and seconds by name."""
    usual = []
    for _ in range(3):
        begin = time.perf_counter()
        state = jax.block_until_ready(step(state))
        usual.append(time.perf_counter() - begin)
    os.sync()
    begin = time.perf_counter()
    store.begin(number, **state, host={"step": number})
    called = time.perf_counter() - begin
    after = time.perf_counter()
    state = jax.block_until_ready(step(state))
    next_step = time.perf_counter() - after - statistics.median(usual)
    wait_for(store, number)
    there = time.perf_counter() - begin
    settle(store)
    return state, {"call": called, "next step": next_step, "with a step": there}


def wait_for(store: CheckpointStore, number: int) -> None:
    marker = store._folder / str(number) / "commit_success.txt"
    while not marker.exists():
        time.sleep(0.005)


def settle(store: CheckpointStore) -> None:
    if problem := store.settle():
        raise SystemExit(problem)


def restore(store: CheckpointStore, folder: pathlib.Path, state: dict) -> float:
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    forget(folder)
    begin = time.perf_counter()
    found = store.restore_newest(abstract)
    assert found is not None
    jax.block_until_ready((found["params"], found["opt_state"]))
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    state = make_state(args.gigabytes)
    size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e9
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0.999, s), donate_argnums=0)
    state = jax.block_until_ready(step(state))
    rounds: list[dict[str, float]] = []
    with CheckpointStore(args.work, CheckpointConfig(keep=1)) as store:
        for number in range(1, args.rounds + 1):
            warm(5 * size)
            seconds = {"plain write": plain_write(args.work / "plain", state)}
            seconds |= save(store, 2 * number, state)
            warm(5 * size)
            state, with_step = save_while_stepping(store, 2 * number + 1, state, step)
            warm(5 * size)
            seconds |= with_step | {"plain read": plain_read(args.work / "plain")}
            (args.work / "plain").unlink()
            seconds["restore"] = restore(store, args.work / FOLDER / str(2 * number + 1), state)
            rounds.append(seconds)
    shutil.rmtree(args.work)
    median = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    print(f"{size:.2f} GB, medians of {args.rounds}")
    for name, value in median.items():
        print(f"{name:<12}{value:8.2f} s{size / value:8.2f} GB/s" if value > 0.3 else f"{name:<12}{value:8.3f} s")

    def ratio(a: str, b: str) -> float:
        return statistics.median(r[a] / r[b] for r in rounds)

    print(f"save         {ratio('plain write', 'save'):.2f} of the plain write's speed")
    print(f"restore      {ratio('plain read', 'restore'):.2f} of the plain read's speed, its sums compared")
    print(f"stand-still  {100 * ratio('call', 'with a step'):.1f} % of the save with a step in the call")
    stalled = statistics.median((r["call"] + r["next step"]) / r["with a step"] for r in rounds)
    print(f"             {100 * stalled:.1f} % with the next step's extra")


if __name__ == "__main__":
    main()

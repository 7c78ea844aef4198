"""Compares the planner's HBM and step time, from shapes, with what the TPU compiler allocates and schedules.

    python scripts/bench/planner.py [--only v5p] [--full]

Needs the extra `tpu` (libtpu) and no TPU. For every combination of model, slice, rows and remat policy, the step is
compiled for all of the slice's devices until the compiler has assigned buffers: the total that it checks against the
chip's HBM is compared with the prediction. With `--full` it compiles to the end, for minutes each, and step times are
compared too: the planner's with the compiled program's, in its own order.
"""

import argparse
import dataclasses
import glob
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from solar_jax.config import Config, DataConfig, GrowthConfig, MeshConfig, ModelConfig, TrainConfig
from solar_jax.growth.operators import make_layer_map
from solar_jax.hardware.slices import Slice, find_slice
from solar_jax.planning import aot, search
from solar_jax.training.partition import make_partition

GIB = 2**30
MODELS = {
    "solar": ModelConfig(32000, 4096, 14336, 48, 32, 8, 128),
    "mistral": ModelConfig(32000, 4096, 14336, 32, 32, 8, 128),
    "qwen2.5-7b": ModelConfig(152064, 3584, 18944, 28, 28, 4, 128, attention_bias="qkv"),
    "llama3.2-1b": ModelConfig(128256, 2048, 8192, 16, 32, 8, 64, tie_word_embeddings=True),
    "llama3-70b": ModelConfig(128256, 8192, 28672, 80, 64, 8, 128),
    "small": ModelConfig(32000, 1024, 4096, 8, 8, 8, 128),
    "mixtral": ModelConfig(32000, 4096, 14336, 32, 32, 8, 128, num_local_experts=8, num_experts_per_tok=2),
}
MODELS["solar-new"] = MODELS["solar"]  # with train.trainable=new: the 16 layers that dus(m=8) adds to Mistral's 32
PARTITIONS = {"solar-new": make_partition("new", make_layer_map(32, GrowthConfig("dus", m=8)))}
MODELS = {name: dataclasses.replace(m, rope_theta=1e4, rms_norm_eps=1e-5) for name, m in MODELS.items()}

# model, slice, rows per device, tokens per row, remat policy, (data, fsdp, tensor, context), microbatches
PLAIN = (1, -1, 1, 1)
COMBINATIONS = (
    ("solar", "v5p-128", 4, 4096, "full", PLAIN, 1),
    ("solar", "v5p-128", 4, 4096, "attention", PLAIN, 1),
    ("solar", "v5p-128", 4, 4096, "mid", PLAIN, 1),
    ("solar", "v5p-128", 4, 4096, "half_mlp", PLAIN, 1),
    ("solar", "v5p-128", 4, 4096, "matmuls", PLAIN, 1),
    ("solar", "v5p-128", 2, 8192, "half_mlp", PLAIN, 1),
    ("solar", "v5p-128", 8, 4096, "mid", (1, -1, 2, 1), 1),
    ("solar", "v6e-256", 2, 4096, "mid", PLAIN, 1),
    ("solar", "v5e-256", 1, 4096, "full", PLAIN, 1),
    ("solar", "v4-256", 2, 4096, "qkv", PLAIN, 1),
    ("solar-new", "v5p-128", 4, 4096, "mid", PLAIN, 1),
    ("solar-new", "v6e-256", 2, 4096, "mid", PLAIN, 1),
    ("mistral", "v5p-64", 4, 4096, "mid", PLAIN, 2),
    ("qwen2.5-7b", "v5p-64", 2, 4096, "mid", PLAIN, 1),
    ("llama3.2-1b", "v5e-16", 1, 4096, "mid", PLAIN, 1),
    ("small", "v5p-8", 4, 4096, "mid", PLAIN, 1),
    ("solar", "tpu7x-128", 4, 4096, "matmuls", PLAIN, 1),
    ("solar", "2xv5p-128", 4, 4096, "matmuls", PLAIN, 1),
    ("llama3-70b", "v5p-1024", 2, 4096, "mid", PLAIN, 1),
    ("solar", "v5p-128", 1, 32768, "mid", PLAIN, 1),
    ("solar", "v5p-256", 1, 131072, "mid", (1, -1, 1, 4), 1),
    ("mixtral", "v5p-128", 4, 4096, "mlp", PLAIN, 1),
    ("mixtral", "v6e-256", 2, 4096, "mid", PLAIN, 1),
)


def run_of(combination: tuple) -> tuple[ModelConfig, Config, Slice]:
    name, where, rows, length, remat, mesh, microbatches = combination
    wanted = find_slice(where)
    batch = rows * microbatches * wanted.devices // (mesh[2] * mesh[3])
    config = Config(
        name=name,
        data=DataConfig(sequence_length=length),
        train=TrainConfig(10, batch, microbatches, remat=remat),
        mesh=MeshConfig(*mesh),
    )
    return MODELS[name], config, wanted


def planned(cfg: ModelConfig, config: Config, wanted: Slice) -> tuple[float, float]:
    """Returns the planner's estimates: bytes per device, and seconds of a step."""
    partition = PARTITIONS.get(config.name)
    option = search.options(cfg, config, search.of_slice(wanted), partition)[0]
    assert option.time
    return search.need(cfg, option, partition).total, option.time.total


def allotted(index: int) -> float:
    """Returns the bytes per device that the compiler allocates to a combination, from its report; stops it there."""
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"XLA_FLAGS": f"--xla_dump_to={folder} --xla_dump_hlo_as_text"}
        command = [sys.executable, __file__, f"--compile={index}"]
        child = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        done = f"{folder}/*jit_train_step*after_buffer_assignment.txt"  # written right after the report
        while child.poll() is None and not glob.glob(done):
            time.sleep(0.5)
        child.kill()
        said = child.communicate()[1]
        reports = glob.glob(f"{folder}/*jit_train_step*memory-usage-report.txt")
        if not reports:
            raise SystemExit(f"the compiler wrote no report:\n{said[-2000:]}")
        found = re.search(r"\(color=0\)\nTotal bytes: (\d+)", pathlib.Path(reports[0]).read_text())
        assert found
        return float(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of a row's name, as printed")
    parser.add_argument("--full", action="store_true", help="compile to the end")
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)  # what `allotted` starts
    args = parser.parse_args()
    if args.compile is not None:
        combination = COMBINATIONS[args.compile]
        aot.compile_step(*run_of(combination), partition=PARTITIONS.get(combination[0]))
        return
    print(f"{'model, slice, rows x length, remat, mesh':60}{'GiB: planned':>14}{'compiled':>10}{'error':>8}", end="")
    print(f"{'s: planned':>12}{'hidden':>8}{'scheduled':>10}{'serial':>8}{'error':>8}" if args.full else "")
    errors: dict[str, list[float]] = {"memory": [], "time": []}
    for index, combination in enumerate(COMBINATIONS):
        name, where, rows, length, remat, mesh, microbatches = combination
        cfg, config, wanted = run_of(combination)
        split = "".join(f", {axis} {n}" for axis, n in (("tensor", mesh[2]), ("context", mesh[3])) if n > 1)
        split += f", {microbatches} microbatches" if microbatches > 1 else ""
        what = f"{name}, {where}, {rows} x {length}, {remat}{split}"
        if args.only not in what:
            continue
        need, seconds = planned(cfg, config, wanted)
        if args.full:
            step = aot.compile_step(cfg, config, wanted, partition=PARTITIONS.get(name))
            total, (hidden, serial), scheduled = step.total, step.program.seconds(), step.program.scheduled_seconds()
            errors["time"].append(seconds / scheduled - 1)
            more = f"{seconds:12.3f}{hidden:8.3f}{scheduled:10.3f}{serial:8.3f}{errors['time'][-1]:+8.1%}"
        else:
            total, more = allotted(index), ""
        errors["memory"].append(need / total - 1)
        print(f"{what:60}{need / GIB:14.2f}{total / GIB:10.2f}{errors['memory'][-1]:+8.1%}{more}", flush=True)
    for kind, found in errors.items():
        if found:
            print(f"largest error of {kind} {max(map(abs, found)):.1%}")


if __name__ == "__main__":
    main()

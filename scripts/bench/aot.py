"""Compiles the training step for a TPU slice, without having one, next to MaxText's: memory, time, compilation.

    python scripts/bench/aot.py --slice v5p-128 --batch 4 --length 4096 --remat matmuls,attention
    python scripts/bench/aot.py --slice v5p-128 --remat matmuls \
        --peer MAXTEXT_ENV/bin/python --peer_remat minimal_with_context,full

Needs the extra `tpu` (libtpu) and no TPU; `--peer` is the python of an environment with maxtext[tpu]==0.2.5. Both
programs are compiled for the same devices, rows and options, one after the other. Their step times are read by the same
reader, `solar_jax/planning/hlo_cost.py`, from the compiler's annotations of each operation; for compilation, the CPU
time is reported.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # the peer has its own

from solar_jax.config import Config, ModelConfig, resolve
from solar_jax.growth.apply import grown_config
from solar_jax.growth.operators import make_layer_map
from solar_jax.hardware.chips import compiler_options
from solar_jax.hardware.slices import Slice, described_devices, find_slice
from solar_jax.model.flops import flops_per_token
from solar_jax.planning import hlo_cost
from solar_jax.planning.aot import compile_step
from solar_jax.planning.hlo_cost import read_program

ROOT = pathlib.Path(__file__).parents[2]
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Result:
    """Compiled step; bytes and seconds."""

    name: str  # program and remat policy
    seconds: float  # CPU time of tracing and compilation
    arguments: int
    temporaries: int
    program: hlo_cost.Program
    text: str


def recipe(config_file: str, layers: int) -> tuple[ModelConfig, Config]:
    """Returns the grown model of a config file, at the requested depth, and its run."""
    path, _, argument = config_file.partition(":")
    spec = importlib.util.spec_from_file_location("recipe", ROOT / path)
    assert spec
    assert spec.loader
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = resolve(module.get_config(*([argument] if argument else [])))
    cfg = grown_config(config.model.architecture, make_layer_map(config.model.num_hidden_layers, config.growth))
    return dataclasses.replace(cfg, num_hidden_layers=layers or cfg.num_hidden_layers), config


def ours(
    cfg: ModelConfig, config: Config, wanted: Slice, remat: str, precision: str, options: dict[str, str]
) -> Result:
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, remat=remat, precision=precision))
    begin = time.process_time()
    step = compile_step(cfg, config, wanted, options)
    spent = time.process_time() - begin
    name = f"solar_jax {remat}" + (f" {precision}" if precision != "mixed" else "")
    return Result(name, spent, step.arguments, step.temporaries, step.program, step.text)


def peers(python: str, cfg: ModelConfig, args: argparse.Namespace, wanted: Slice, options: dict[str, str],
          remat: str) -> Result:  # fmt: skip
    """Compiles MaxText's step of the same model and rows: its stock Mistral-7B, as deep as ours."""
    flags = " ".join(f"--{name}={value}" for name, value in options.items())
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "program.txt"
        settings = {
            "compile_topology": wanted.name, "base_num_decoder_layers": cfg.num_hidden_layers, "remat_policy": remat,
            "per_device_batch_size": args.batch, "max_target_length": args.length,
            "ici_context_parallelism": args.context,
        }  # fmt: skip
        settings |= dict(pair.split("=", 1) for pair in args.peer_settings.split(",") if pair)
        command = [python, str(pathlib.Path(__file__).parent / "maxtext_step.py"), str(out)]
        command += [f"{key}={value}" for key, value in settings.items()]
        command += [f"compile_xla_flags={flags}"] if flags else []
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
        if done.returncode:
            raise SystemExit(f"MaxText failed:\n{done.stderr[-3000:]}")
        found, text = json.loads(done.stdout.splitlines()[-1]), out.read_text()
    program = read_program(text, wanted.facts)
    return Result(f"MaxText {remat}", found["seconds"], found["arguments"], found["temporaries"], program, text)


def mfus(result: Result, flops: float) -> tuple[float, ...]:
    """Returns the (overlapped, serial) per cent of the chip's peak."""
    return tuple(100 * flops / seconds / result.program.chip.peak for seconds in result.program.seconds())


def row(result: Result, flops: float) -> str:
    overlapped, serial = mfus(result, flops)
    memory = f"{result.arguments / GIB:6.2f} {result.temporaries / GIB:6.2f}"
    return f"{result.name:50} {memory} {overlapped:8.1f} {serial:7.1f} {result.seconds:9.0f}"


def ratios(results: list[Result], flops: float, budgets: list[float]) -> Iterator[str]:
    """Compares the best of ours with the peer's best within each budget of temporaries, in GiB per chip."""
    for budget in budgets:
        best = {}
        for name in ("solar_jax", "MaxText"):
            fitting = [r for r in results if r.name.startswith(name) and r.temporaries <= budget * GIB]
            if fitting:
                best[name] = max(fitting, key=lambda r: mfus(r, flops)[0])
        if len(best) == 2:
            pairs = zip(*(mfus(best[n], flops) for n in ("solar_jax", "MaxText")), strict=True)
            over, serial = (a / b for a, b in pairs)
            names = " / ".join(r.name for r in best.values())
            yield f"within {budget:g} GiB: {over:.3f} overlapped, {serial:.3f} serial ({names})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/dus_48l.py")
    parser.add_argument("--slice", default="v5p-128", help="as Google names it, e.g. v6e-256 or 2xv5p-2048")
    parser.add_argument("--layers", type=int, default=0, help="0: as many as the config's grown model has")
    parser.add_argument("--batch", type=float, default=4, help="rows a device; a fraction with --context")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--context", type=int, default=1, help="devices that share a row, of both programs")
    parser.add_argument("--remat", default="matmuls", help="names of model.remat.REMAT, by commas")
    parser.add_argument("--precision", default="mixed", help="of ours, names of model.precision.PRECISIONS, by commas")
    parser.add_argument("--offload", action="store_true", help="collectives run on SparseCores, of both programs")
    parser.add_argument("--options", default="default", help="default, none, or NAME=VALUE,... beside the defaults")
    parser.add_argument("--peer", help="python of an environment with MaxText")
    parser.add_argument("--peer_remat", default="minimal_with_context", help="names of its remat_policy, by commas")
    parser.add_argument("--peer_settings", default="", help="NAME=VALUE,... of its config")
    parser.add_argument("--peer_options", default="same", help="same, or none: as it comes")
    parser.add_argument("--budgets", default="16,32,64,90", help="of temporaries, GiB a chip, for ratios")
    parser.add_argument("--hlo", type=pathlib.Path, help="folder to keep the compiled programs in")
    args = parser.parse_args()

    # What is compiled: the recipe on the slice's devices.
    cfg, config = recipe(args.config, args.layers)
    wanted = find_slice(args.slice)
    if not (args.batch * wanted.devices).is_integer():
        parser.error(f"--batch {args.batch:g} on {wanted.devices} devices is {args.batch * wanted.devices:g} rows")
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, batch_size=round(args.batch * wanted.devices)),
        mesh=dataclasses.replace(config.mesh, context=args.context),
        data=dataclasses.replace(config.data, sequence_length=args.length),
    )
    options = {} if args.options == "none" else compiler_options(described_devices(wanted)[0], args.offload)
    if args.options not in ("default", "none"):
        options |= dict(o.split("=", 1) for o in args.options.split(","))
    flops = flops_per_token(cfg, args.length) * args.batch * args.length
    print(f"{wanted.name}: {cfg.num_hidden_layers} layers, {args.batch:g} x {args.length} tokens a device")
    print(f"options {options}")
    print(f"{'':50} {'GiB a device':>13} {'MFU %':>16} {'compiled':>9}")
    print(f"{'':50} {'args':>6} {'temp':>6} {'overlap.':>8} {'serial':>7} {'CPU s':>9}", flush=True)

    # Compiled as a run compiles it, and read.
    results = []
    ways = itertools.product(args.remat.split(","), args.precision.split(","))
    jobs: list[Any] = [(ours, (cfg, config, wanted, remat, precision, options)) for remat, precision in ways]
    if args.peer:
        peer_options = options if args.peer_options == "same" else {}
        jobs += [(peers, (args.peer, cfg, args, wanted, peer_options, remat)) for remat in args.peer_remat.split(",")]
    for compile_one, arguments in jobs:
        result = compile_one(*arguments)
        results.append(result)
        print(row(result, flops), flush=True)
        if args.hlo:
            args.hlo.mkdir(parents=True, exist_ok=True)
            (args.hlo / f"{wanted.name}_{result.name.replace(' ', '_')}.txt").write_text(result.text)
    for result in results:
        print(f"\n{result.name}\n{result.program.report(args.batch * args.length, flops)}")
    print("\n" + "\n".join(ratios(results, flops, [float(b) for b in args.budgets.split(",")])), flush=True)


if __name__ == "__main__":
    sys.exit(main())

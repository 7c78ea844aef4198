"""Weak scaling on paper: one training step with constant work per chip, compiled for slices of growing size.

    python scripts/bench/scaling.py --slices v5p-32,v5p-128,v5p-512,v5p-2048,2xv5p-2048 --batch 4 --length 4096

Needs the extra `tpu` (libtpu) and no TPU; a 48-layer step compiles in minutes. `solar_jax/planning/hlo_cost.py` reads
from each program the step time, MFU and the bytes that a chip moves within its slice and to other slices; the ICI and
DCN bandwidths of a chip are in `solar_jax/hardware/chips.py`.
"""

import argparse
import dataclasses
import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from aot import GIB, recipe

from solar_jax.config import Config, ModelConfig
from solar_jax.hardware.slices import find_slice
from solar_jax.model.flops import flops_per_token
from solar_jax.parallel.mesh import AXES, mesh_shape
from solar_jax.planning.aot import Compiled, compile_step

HEAD = f"{'slice':>12} {'chips':>6}  {'mesh':24} {'GiB a device':>13} {'step s':>14} {'MFU %':>11} {'GB a chip':>15}\n"
HEAD += f"{'':44} {'args':>6} {'temp':>6} {'overl. serial':>14} {'':>11} {'links network':>15}"


def step_on(name: str, cfg: ModelConfig, config: Config, rows: int) -> Compiled:
    """Compiles the step with `rows` rows per device for a slice."""
    wanted = find_slice(name)
    train = dataclasses.replace(config.train, batch_size=rows * wanted.devices)
    return compile_step(cfg, dataclasses.replace(config, train=train), wanted)


def row(name: str, config: Config, step: Compiled, flops: float) -> tuple[str, list[float]]:
    """Returns a line of the table and its (overlapped, serial) MFU in per cent."""
    wanted, program = find_slice(name), step.program
    sizes = dict(zip(AXES, mesh_shape(config.mesh, wanted.devices, wanted.count), strict=True))
    mesh = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
    seconds = program.seconds()
    mfu = [100 * flops / s / program.chip.peak for s in seconds]
    links, network = sum(program.moved.values()) / 1e9, program.network / 1e9
    return (
        f"{wanted.name:>12} {wanted.chips:6}  {mesh:24} {step.arguments / GIB:6.2f} {step.temporaries / GIB:6.2f} "
        f"{seconds[0]:7.3f}{seconds[1]:7.3f} {mfu[0]:5.1f} {mfu[1]:5.1f} {links:8.2f} {network:6.3f}"
    ), mfu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/dus_48l.py")
    parser.add_argument("--slices", default="v5p-32,v5p-128,v5p-512,v5p-2048,2xv5p-2048", help="names, by commas")
    parser.add_argument("--layers", type=int, default=0, help="0: as many as the config's grown model has")
    parser.add_argument("--batch", type=int, default=4, help="rows a device")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--remat", default="matmuls", help="a name of model.remat.REMAT that fits all of them")
    parser.add_argument("--hlo", type=pathlib.Path, help="folder to keep the compiled programs in")
    args = parser.parse_args()

    cfg, config = recipe(args.config, args.layers)
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, remat=args.remat, accumulation=1),
        data=dataclasses.replace(config.data, sequence_length=args.length),
    )
    flops = flops_per_token(cfg, args.length) * args.batch * args.length
    print(f"{cfg.num_hidden_layers} layers, {args.batch} x {args.length} tokens a device, remat {args.remat}\n{HEAD}")
    found = []
    for name in args.slices.split(","):
        step = step_on(name, cfg, config, args.batch)
        line, mfu = row(name, config, step, flops)
        found.append(mfu)
        print(line, flush=True)
        if args.hlo:
            args.hlo.mkdir(parents=True, exist_ok=True)
            (args.hlo / f"{name}.txt").write_text(step.text)
    over, serial = (100 * (last / first - 1) for first, last in zip(found[0], found[-1], strict=True))
    print(f"MFU from the first to the last: {over:+.1f} % overlapped, {serial:+.1f} % serial")


if __name__ == "__main__":
    sys.exit(main())

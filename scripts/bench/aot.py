"""The training step compiled for a TPU slice that is not here, and its time by the compiler's own figures.

    python scripts/bench/aot.py --slice v5p-128 --layers 48 --batch 4 --length 4096 --remat matmuls

Needs the extra `tpu` (libtpu) and no TPU. Prints what the step takes of a
chip's memory, how long it compiled, and the step time that `roofline.py` reads from the compiled program.
"""

import argparse
import dataclasses
import importlib.util
import os
import pathlib
import sys
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from solar_jax.config import Config, ModelConfig, resolve
from solar_jax.growth.apply import grown_config
from solar_jax.growth.plan import make_plan
from solar_jax.parallel.chips import compiler_options
from solar_jax.parallel.slices import described_devices, find_slice
from solar_jax.training.aot import compile_step
from solar_jax.training.metrics import flops_per_token

ROOT = pathlib.Path(__file__).parents[2]
GIB = 2**30


def recipe(config_file: str, layers: int) -> tuple[ModelConfig, Config]:
    """The grown model of a config file, as deep as asked, and its run."""
    path, _, argument = config_file.partition(":")
    spec = importlib.util.spec_from_file_location("recipe", ROOT / path)
    assert spec
    assert spec.loader
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = resolve(module.get_config(*([argument] if argument else [])))
    cfg = grown_config(config.model, make_plan(config.model.num_hidden_layers, config.growth))
    return dataclasses.replace(cfg, num_hidden_layers=layers or cfg.num_hidden_layers), config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/dus_48l.py")
    parser.add_argument("--slice", default="v5p-128", help="as Google names it, e.g. v6e-256 or 2xv5p-2048")
    parser.add_argument("--layers", type=int, default=0, help="0: as many as the config's grown model has")
    parser.add_argument("--batch", type=int, default=4, help="rows a device")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--remat", default="", help="a name of model.llama.REMAT; empty: the config's")
    parser.add_argument("--options", default="default", help="default, none, or NAME=VALUE,... beside the defaults")
    parser.add_argument("--hlo", type=pathlib.Path, help="file to keep the compiled program in")
    args = parser.parse_args()

    # What is compiled: the recipe on the slice's devices.
    cfg, config = recipe(args.config, args.layers)
    wanted = find_slice(args.slice)
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(
            config.train, batch_size=args.batch * wanted.devices, remat=args.remat or config.train.remat
        ),
        data=dataclasses.replace(config.data, sequence_length=args.length),
    )
    options = {} if args.options == "none" else dict(compiler_options(described_devices(wanted)[0]))
    if args.options not in ("default", "none"):
        options |= dict(o.split("=", 1) for o in args.options.split(","))

    # Compiled as a run compiles it.
    step = compile_step(cfg, config, wanted, options)
    if args.hlo:
        args.hlo.write_text(step.text)

    tokens = args.batch * args.length
    flops = flops_per_token(cfg, args.length) * tokens
    print(f"{args.slice}, {cfg.num_hidden_layers} layers, {args.batch} x {args.length} a device, {config.train.remat}")
    print(f"options {options}")
    print(
        f"traced {step.traced_seconds:.0f} s, compiled {step.compiled_seconds:.0f} s, arguments "
        f"{step.arguments / GIB:.2f} GiB, temporaries {step.temporaries / GIB:.2f} GiB, "
        f"model FLOPs a device {flops:.6g}"
    )
    print(step.program.report(tokens, flops), flush=True)


if __name__ == "__main__":
    sys.exit(main())

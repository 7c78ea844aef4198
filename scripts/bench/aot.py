"""The training step compiled for a TPU slice that is not here, and its time by the compiler's own figures.

    python scripts/bench/aot.py --slice v5p-128 --layers 48 --batch 4 --length 4096 --remat matmuls

Needs libtpu (`pip install libtpu`, or a folder with it on PYTHONPATH) and no TPU. Prints what the step takes of a
chip's memory, how long it compiled, and the step time that `roofline.py` reads from the compiled program.
"""

import argparse
import dataclasses
import importlib.util
import os
import pathlib
import sys
import time
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import roofline
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from solar_jax.config import Config, ModelConfig, resolve
from solar_jax.growth.apply import grown_config
from solar_jax.growth.plan import make_plan
from solar_jax.parallel import chips, rules
from solar_jax.parallel.mesh import AXES, mesh_shape
from solar_jax.training.metrics import flops_per_token
from solar_jax.training.optimizer import make_optimizer
from solar_jax.training.step import abstract_state, make_train_step, state_shardings

ROOT = pathlib.Path(__file__).parents[2]
GIB = 2**30

# name of a slice -> (chip, its topology as libtpu names it)
SLICES = {
    "v5p-8": ("v5p", "v5p:2x2x1"),
    "v5p-128": ("v5p", "v5p:4x4x4"),
    "v5p-256": ("v5p", "v5p:4x4x8"),
    "v5e-256": ("v5e", "v5e:16x16"),
    "v6e-256": ("v6e", "v6e:16x16"),
}
BATCH_TYPES = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), jnp.int32) | {"weights": jnp.float32}


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
    parser.add_argument("--slice", default="v5p-128", choices=SLICES)
    parser.add_argument("--layers", type=int, default=0, help="0: as many as the config's grown model has")
    parser.add_argument("--batch", type=int, default=4, help="rows a chip")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--remat", default="", help="a name of model.llama.REMAT; empty: the config's")
    parser.add_argument("--options", default="default", help="default, none, or NAME=VALUE,... beside the defaults")
    parser.add_argument("--hlo", type=pathlib.Path, help="file to keep the compiled program in")
    args = parser.parse_args()

    # What is compiled: the recipe on the slice's devices.
    cfg, config = recipe(args.config, args.layers)
    chip, topology = SLICES[args.slice]
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    devices = described.devices
    shape = mesh_shape(config.mesh, len(devices))
    laid_out = topologies.make_mesh(described, shape, AXES).devices
    mesh = Mesh(laid_out, AXES, axis_types=(AxisType.Auto,) * 3)
    rows = args.batch * len(devices)
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, batch_size=rows, remat=args.remat or config.train.remat),
        data=dataclasses.replace(config.data, sequence_length=args.length),
    )
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state = abstract_state(cfg, optimizer, state_shardings(cfg, optimizer, mesh))
    sharding = rules.batch_sharding(mesh)
    batch = {k: jax.ShapeDtypeStruct((rows, args.length), d, sharding=sharding) for k, d in BATCH_TYPES.items()}

    # Compiled as a run compiles it.
    options = {} if args.options == "none" else dict(chips.compiler_options(devices[0]))
    if args.options not in ("default", "none"):
        options |= dict(o.split("=", 1) for o in args.options.split(","))
    begin = time.perf_counter()
    lowered = make_train_step(cfg, config, optimizer, mesh).trace(state, batch).lower(lowering_platforms=("tpu",))
    traced = time.perf_counter() - begin
    begin = time.perf_counter()
    compiled = lowered.compile(options or None)
    seconds = time.perf_counter() - begin
    m = compiled.memory_analysis()
    text = compiled.as_text()
    if args.hlo:
        args.hlo.write_text(text)

    tokens = args.batch * args.length
    flops = flops_per_token(cfg, args.length) * tokens
    print(f"{args.slice}, {cfg.num_hidden_layers} layers, {args.batch} x {args.length} a chip, {config.train.remat}")
    print(f"options {options}")
    print(
        f"traced {traced:.0f} s, compiled {seconds:.0f} s, arguments {m.argument_size_in_bytes / GIB:.2f} GiB, "
        f"temporaries {m.temp_size_in_bytes / GIB:.2f} GiB, model FLOPs a chip {flops:.6g}"
    )
    print(roofline.read(text, chip).report(tokens, flops), flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Compiles the steps of supervised fine-tuning, DPO and LoRA for a TPU slice, without having one: HBM and time.

    python scripts/bench/tuning_aot.py --slice v5p-128 --kinds sft,dpo [--batch 128] [--length 2048] [--remat matmuls]
    python scripts/bench/tuning_aot.py --slice v5e-8 --kinds lora --batch 8 --length 4096 --remat full

Needs the extra `tpu` (libtpu) and no TPU; minutes a step at full size. SOLAR 10.7B with the recipes of configs/, on the
same mesh, rows and tokens. Time is read from the compiler's annotations of each operation
(`solar_jax/planning/hlo_cost.py`).
"""

import argparse
import dataclasses
import os
import pathlib
import runpy

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

from solar_jax.config import Config, resolve
from solar_jax.growth.apply import grown_config
from solar_jax.growth.operators import make_layer_map
from solar_jax.hardware.slices import find_slice
from solar_jax.planning.aot import compile_step
from solar_jax.training.partition import make_partition

ROOT = pathlib.Path(__file__).parents[2]
GIB = 2**30
RECIPES = {"sft": "sft", "dpo": "dpo", "lora": "sft", "lora_dpo": "dpo"}


def recipe(kind: str, args: argparse.Namespace) -> Config:
    config = runpy.run_path(str(ROOT / "configs" / f"{RECIPES[kind]}.py"))["get_config"]()
    config.train.batch_size, config.data.sequence_length = args.batch, args.length
    config.train.remat, config.train.accumulation = args.remat, args.accumulation
    config.mesh.fsdp, config.mesh.data, config.mesh.tensor, config.mesh.context = -1, 1, args.tensor, 1
    if kind.startswith("lora"):
        config.lora.rank = 16
    return resolve(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slice", default="v5p-128")
    parser.add_argument("--kinds", default="sft,dpo", help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--batch", type=int, default=128, help="rows over all devices")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--remat", default="matmuls")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--layers", type=int, default=0, help="another depth, for a quick look")
    args = parser.parse_args()
    wanted, first = find_slice(args.slice), None
    for kind in args.kinds.split(","):
        config = recipe(kind, args)
        if args.layers:
            model = dataclasses.replace(config.model, num_hidden_layers=args.layers)
            config = dataclasses.replace(config, model=model)
        layer_map = make_layer_map(config.model.num_hidden_layers, config.growth)
        partition = make_partition(config.train.trainable, layer_map, config.lora)
        step = compile_step(grown_config(config.model.architecture, layer_map), config, wanted, partition=partition)
        overlapped, serial = step.program.seconds()
        compared = ""
        if first is not None:
            compared = (
                f"; of {args.kinds.split(',')[0]}'s memory {step.total / first[0]:.3f}, of its time "
                f"{overlapped / first[1]:.3f} / {serial / first[2]:.3f}"
            )
        first = first or (step.total, overlapped, serial)
        print(
            f"{kind:<9}{args.slice}  {args.batch} x {args.length}, remat {args.remat}: {step.total / GIB:6.2f} GiB a "
            f"device (arguments {step.arguments / GIB:.2f}, temporaries {step.temporaries / GIB:.2f}), step "
            f"{overlapped:.3f} / {serial:.3f} s (overlapped / serial), compiled in {step.compiled_seconds:.0f} s"
            f"{compared}",
            flush=True,
        )


if __name__ == "__main__":
    main()

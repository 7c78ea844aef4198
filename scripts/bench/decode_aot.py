"""Compiles the decode step for TPU slices, without having one: its time by the compiler next to the limit of HBM.

    python scripts/bench/decode_aot.py [--slices v5e-8,v6e-8] [--rows 1,32,128] [--length 2048] [--quantize int8]

Needs the extra `tpu` (libtpu) and no TPU. A step feeds one token of every row of the 10.7B model, in bfloat16, heads
and MLP split over the chips. The limit is the time in which a chip reads its share of the weights and of the cache. Two
times are given, with communication hidden behind computation and exposed, as the compiler annotates each operation.
"""

import argparse
import functools
import os
import pathlib
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
import numpy as np
from aot import recipe
from jax.sharding import NamedSharding, PartitionSpec

from solar_jax.config import MeshConfig
from solar_jax.decoding.forward import Layout, cache_bytes, empty_cache
from solar_jax.decoding.programs import make_programs
from solar_jax.decoding.sampling import Sampling, settings_of
from solar_jax.decoding.weights import laid_out
from solar_jax.hardware.chips import compiler_options
from solar_jax.hardware.slices import described_devices, find_slice
from solar_jax.model.lora import INPUTS
from solar_jax.model.shapes import param_shapes
from solar_jax.parallel import rules
from solar_jax.parallel.mesh import make_mesh
from solar_jax.planning.hlo_cost import read_program

GIB, DTYPE = 2**30, jnp.bfloat16


def with_sharding(shapes, sharding):
    """Abstract arrays laid out by a sharding or by a tree of them."""
    shardings = sharding if isinstance(sharding, dict) else jax.tree.map(lambda _: sharding, shapes)
    return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings)


def matrix_shardings(cfg, mesh):
    """Shardings of `laid_out`'s parameters: o and down are split by inputs, the other projections by outputs."""
    plain = rules.parameter_shardings(cfg, mesh)
    spec = {1: (None, None, "tensor"), 2: (None, "tensor", None)}
    ends = {name: 2 if name in ("o", "down") else 1 for name in INPUTS}
    split = {f"{name}_proj": NamedSharding(mesh, PartitionSpec(*spec[end])) for name, end in ends.items()}
    apart = jax.tree.map(lambda s: NamedSharding(mesh, PartitionSpec(*s.spec[1:])), plain["layers"] | split)
    return plain | {"layers": (apart,) * cfg.num_hidden_layers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/dus_48l.py")
    parser.add_argument("--slices", default="v5e-8,v6e-8")
    parser.add_argument("--rows", default="1,32,128")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--options", action="store_true", help="with the compiler options of training")
    parser.add_argument("--hlo", type=pathlib.Path, help="folder for the programs' text")
    args = parser.parse_args()
    cfg, _ = recipe(args.config, args.layers)
    print(f"{'':14}{'GiB read':>10}{'limit ms':>10}{'hidden ms':>11}{'of limit':>9}{'exposed ms':>12}{'of limit':>9}"
          f"{'tokens/s':>10}{'compiled s':>12}")  # fmt: skip
    for name in args.slices.split(","):
        wanted = find_slice(name)
        devices = described_devices(wanted)
        mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=len(devices)), devices)
        layout = Layout(mesh=mesh)
        weights = with_sharding(param_shapes(cfg, DTYPE), rules.parameter_shardings(cfg, mesh))
        lay_out = functools.partial(laid_out, cfg=cfg, compute_dtype=DTYPE)
        params = with_sharding(jax.eval_shape(lay_out, weights), matrix_shardings(cfg, mesh))
        held = sum(x.size for x in jax.tree.leaves(params)) - params["embed"].size  # one row of it is read
        for rows in map(int, args.rows.split(",")):
            programs = make_programs(cfg, rows, DTYPE, layout)
            whole = rules.replicated(mesh)
            cache = jax.eval_shape(functools.partial(empty_cache, cfg, rows, args.length, DTYPE, Layout()))
            cache = with_sharding(cache, NamedSharding(mesh, layout.cache_spec))
            seen = jax.ShapeDtypeStruct((rows, cfg.vocab_size), bool, sharding=whole)
            numbers = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=whole)
            settings = settings_of([Sampling()] * rows)
            settings = {k: jax.ShapeDtypeStruct(np.shape(a), a.dtype, sharding=whole) for k, a in settings.items()}
            begin = time.perf_counter()
            lowered = programs.decode.trace(
                params, cache, seen, numbers, numbers, settings, numbers, plain=True
            ).lower(lowering_platforms=("tpu",))  # fmt: skip
            done = lowered.compile(dict(compiler_options(devices[0])) if args.options else None)
            spent = time.perf_counter() - begin
            text = done.as_text()
            if args.hlo:
                args.hlo.mkdir(parents=True, exist_ok=True)
                (args.hlo / f"{name}-{rows}.txt").write_text(text)
            program = read_program(text, wanted.facts)
            read = (2 * held + cache_bytes(cfg, rows, args.length, DTYPE)) / len(devices)
            limit = read / wanted.facts.bandwidth
            hidden, exposed = program.seconds()
            # Weights that are prefetched have no cycles of their own: a step takes the time of its bytes at least.
            hidden, exposed = max(limit, hidden), max(limit, hidden) + exposed - hidden
            row = f"{read / GIB:>10.2f}{1e3 * limit:>10.2f}{1e3 * hidden:>11.2f}{limit / hidden:>9.2f}"
            row += f"{1e3 * exposed:>12.2f}{limit / exposed:>9.2f}{rows / exposed:>10.0f}{spent:>12.0f}"
            print(f"{name:<8}{rows:>6}{row}", flush=True)
            memory = done.memory_analysis()
            print(f"{'':14}{memory.argument_size_in_bytes / GIB:.2f} GiB of arguments, "
                  f"{memory.temp_size_in_bytes / GIB:.2f} of temporaries a chip", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

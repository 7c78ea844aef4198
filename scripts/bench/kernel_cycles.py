"""Reads the TPU compiler's own schedule of the attention kernels of whole rows: cycles, and share of the chip's peak.

    python scripts/bench/kernel_cycles.py --length 4096

Needs the extra `tpu` (libtpu) and no TPU; of libtpu 0.0.50 the profiler works for a v5p, and fails for v5e and v6e.
libtpu writes a static profile of each operation that it compiles, in which a kernel's loops are followed with all its
scalar operands taken as 0. For `flash` they are, if each row is one document: the first key block of every query is
block 0. Kernels whose scalars say which blocks to skip cannot be read so. FLOPs are those of half of the scores, as
in `solar_jax/planning/hlo_cost.py`, which takes all kernels at half of the peak.
"""

import argparse
import functools
import os
import pathlib
import re
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
from jax.sharding import SingleDeviceSharding

from solar_jax.checking.kernels import Case, both_ways, make_arrays
from solar_jax.hardware.chips import compiler_options
from solar_jax.hardware.slices import described_devices, find_slice
from solar_jax.model.flash import flash_attention
from solar_jax.planning.step_time import BACKWARD_KERNEL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", default="v5p", help="generation of TPU")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--width", type=int, default=128, help="of a head")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as profiles:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_static_llo_profile_to={profiles}"  # read when libtpu starts
        report(args.chip, args.length, args.width, pathlib.Path(profiles))


def report(chip: str, length: int, width: int, profiles: pathlib.Path) -> None:
    """Compiles the kernels, forward and backward, and prints what libtpu writes of them into `profiles`."""
    wanted = find_slice(f"{chip}-8")
    device = described_devices(wanted)[0]
    case = Case("bfloat16", width, heads=8, kv_heads=2, length=length, rows=1)
    place = SingleDeviceSharding(device)
    arrays = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), jax.eval_shape(lambda: make_arrays(case))
    )
    run = jax.jit(both_ways(functools.partial(flash_attention, sliding_window=0, interpret=False)))
    run.trace(*arrays).lower(lowering_platforms=("tpu",)).compile(compiler_options(device) or None)

    print(f"{chip}: {case}")
    flops = 4 * case.rows * case.heads * case.width * case.length**2 / 2
    for kernel, units in (("flash_attention_fwd", 1.0), ("flash_attention_dkv_fused", BACKWARD_KERNEL)):
        (profile,) = (file for file in profiles.iterdir() if kernel in file.name)
        found = re.search(r"estimated_cycles: (\d+)", profile.read_text())
        assert found
        cycles = int(found[1])
        share = units * flops / (cycles / wanted.facts.clock) / wanted.facts.peak
        print(f"{kernel:28}{cycles:>12,} cycles{share:8.2f} of the peak")


if __name__ == "__main__":
    sys.exit(main())

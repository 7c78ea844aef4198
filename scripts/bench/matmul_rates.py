"""Compares the TPU compiler's cycles of one matmul in bfloat16, int8 and float8, on every chip, without having one.

    uv run --extra tpu python scripts/bench/matmul_rates.py

[8192, 4096] x [4096, 14336], one layer's gate projection; `solar_jax.hardware.chips.CHIPS` has the rates next to
bfloat16's. `weights` is an int8 product that sums over rows, as a weight's gradient does, `transposed` the same with
the first operand's rows last.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from solar_jax.hardware.chips import compiler_options
from solar_jax.hardware.slices import described_devices, find_slice
from solar_jax.planning.hlo_cost import read_program

SLICES = ("v4-8", "v5e-8", "v5p-8", "v6e-8", "tpu7x-8")
ROWS, INPUTS, OUTPUTS = 8192, 4096, 14336


def product(subscripts: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns an einsum of two operands that is accumulated in 32 bits and returned in bfloat16."""

    def multiplied(x: jax.Array, y: jax.Array) -> jax.Array:
        total = jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32
        return jnp.einsum(subscripts, x, y, preferred_element_type=total).astype(jnp.bfloat16)

    return multiplied


def cycles(slice_name: str, subscripts: str, dtype: Any) -> float:
    wanted = find_slice(slice_name)
    device = described_devices(wanted)[0]
    size = {"m": ROWS, "d": INPUTS, "f": OUTPUTS}
    operands = [
        jax.ShapeDtypeStruct([size[a] for a in letters], dtype, sharding=SingleDeviceSharding(device))
        for letters in subscripts.split("->")[0].split(",")
    ]
    lowered = jax.jit(product(subscripts)).trace(*operands).lower(lowering_platforms=("tpu",))
    text = lowered.compile(dict(compiler_options(device)) or None).as_text()
    assert text is not None
    return read_program(text, wanted.facts).cycles


def main() -> None:
    print(f"{'':8}{'bfloat16':>12}{'int8':>8}{'float8':>8}{'weights':>9}{'transposed':>12}   next to bfloat16's cycles")
    for name in SLICES:
        plain = cycles(name, "md,df->mf", jnp.bfloat16)
        rates = [
            plain / cycles(name, subscripts, dtype)
            for subscripts, dtype in (
                ("md,df->mf", jnp.int8),
                ("md,df->mf", jnp.float8_e4m3fn),
                ("md,mf->df", jnp.int8),
                ("dm,mf->df", jnp.int8),
            )
        ]
        print(f"{name:8}{plain:>12,.0f}{rates[0]:>8.2f}{rates[1]:>8.2f}{rates[2]:>9.2f}{rates[3]:>12.2f}", flush=True)


if __name__ == "__main__":
    main()

"""Rates of a device, measured, beside those that the planner takes from its tables."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from solar_jax.checking.kernels import KERNELS, Case, both_ways, make_arrays, planned_flops
from solar_jax.hardware import chips
from solar_jax.hardware.chips import Chip
from solar_jax.parallel.attention import local_kernel
from solar_jax.planning.hlo_cost import FLOAT32_PASSES, HOST, KERNEL_RATE

BUDGET = 0.2  # seconds that one of the rounds takes, about
ROUNDS = 3  # the fastest counts
# (matmul's side, bytes of the streamed array, of the gathered one and of a copy to the host), by platform. A streamed
# array is larger than all of a chip's VMEM, in which XLA would otherwise keep it.
SIZES = {"cpu": (1024, 2**27, 2**24, 2**26), "tpu": (8192, 2**30, 2**29, 2**28), "gpu": (8192, 2**30, 2**29, 2**28)}
KERNEL_CASE = Case("bfloat16", 128, heads=8, kv_heads=2, length=4096)  # of one device, in a step of a 7B model
NO_ROW = "the table has no row"


@dataclasses.dataclass(frozen=True)
class Rate:
    """One measured rate, in FLOP/s or bytes/s of one device."""

    name: str
    unit: str  # "TFLOP/s" or "GB/s"
    found: float | None  # None if it was not measured
    table: float | None  # what the planner takes; None if its table has no row
    note: str = ""  # why there is no number, or what the table's is

    @property
    def ratio(self) -> float | None:
        """The measured rate in units of the table's."""
        return self.found / self.table if self.found and self.table else None


def rates(chip: Chip | None) -> Iterator[Rate]:
    """Measures rate after rate on this machine's devices.

    Args:
      chip: the row of the planner's table; None if it has none.
    """
    device = jax.local_devices()[0]
    side, streamed, gathered, copied = SIZES[device.platform]
    peak = chips.peak_flops(device)
    fraction = chip.matmul_rate if chip else 1.0
    narrow = peak * fraction if peak else None
    said = f"{fraction:.0%} of the peak" if peak else NO_ROW
    yield Rate("matmul, bfloat16", "TFLOP/s", matmul_rate(side, "bfloat16"), narrow, said)
    wide = narrow / FLOAT32_PASSES if narrow and chip else None
    said = f"{FLOAT32_PASSES} bfloat16 passes" if wide else NO_ROW
    yield Rate("matmul, float32", "TFLOP/s", matmul_rate(side // 2, "float32"), wide, said)
    if device.platform != "cpu":
        for kernel in KERNELS[device.platform]:
            table = KERNEL_RATE * peak if peak else None
            said = f"{KERNEL_RATE:.0%} of the peak, assumed" if peak else NO_ROW
            yield Rate(f"attention, {kernel}", "TFLOP/s", kernel_rate(kernel, KERNEL_CASE), table, said)
    row = "" if chip else NO_ROW
    yield Rate("HBM" if chip else "memory", "GB/s", stream_rate(streamed), chip.bandwidth if chip else None, row)
    if jax.device_count() > 1:
        yield Rate("all-gather", "GB/s", gather_rate(gathered), chip.links if chip else None, row)
    else:
        yield Rate("all-gather", "GB/s", None, chip.links if chip else None, "one device has no links")
    for name, measure in (("host to device", upload_rate), ("device to host", download_rate)):
        if device.platform == "cpu":
            yield Rate(name, "GB/s", None, None, "a CPU's arrays lie in the host's memory")
        else:
            yield Rate(name, "GB/s", measure(copied), HOST if chip else None, "assumed" if chip else NO_ROW)


def matmul_rate(side: int, dtype: str) -> float:
    """Measures FLOP/s of square matmuls; float32 ones in full precision, as a training step's."""
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    weights = jnp.full((side, side), 1 / side, dtype)  # keeps a matrix of ones as it is
    multiply = jax.jit(lambda x, w: jnp.matmul(x, w, precision=precision))  # a constant one would become a sum
    return 2 * side**3 / seconds_per_call(lambda x: multiply(x, weights), jnp.ones((side, side), dtype))


def stream_rate(size: int) -> float:
    """Measures bytes/s read and written while an array of `size` bytes is added to in place."""
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    return 2 * size / seconds_per_call(add, jnp.zeros(size // 4, jnp.float32))


def kernel_rate(kernel: str, case: Case) -> float:
    """Measures FLOP/s of an attention kernel, forward and backward, as the planner counts them."""
    *inputs, gradient = make_arrays(case)
    run = jax.jit(both_ways(local_kernel(kernel, case.window, interpret=False)))
    compiled = run.lower(*inputs, gradient).compile(chips.compiler_options(jax.local_devices()[0]) or None)
    return planned_flops(case) / seconds_per_call(lambda last: compiled(*inputs, gradient), None)


def gather_rate(size: int) -> float:
    """Measures bytes/s of a device that gathers an array of `size` bytes from all devices, the whole array counted."""
    devices = np.array(jax.devices())
    mesh = jax.sharding.Mesh(devices, "d")
    one = PartitionSpec("d")
    gather = jax.jit(
        jax.shard_map(
            functools.partial(jax.lax.all_gather, axis_name="d", tiled=True), mesh=mesh, in_specs=one,
            out_specs=PartitionSpec(), check_vma=False,
        )
    )  # fmt: skip
    count = size // 4 // devices.size * devices.size
    sharded = jax.jit(lambda: jnp.zeros(count, jnp.float32), out_shardings=NamedSharding(mesh, one))()
    return 4 * count / seconds_per_call(lambda last: gather(sharded), None)


def upload_rate(size: int) -> float:
    """Measures bytes/s of a copy from the host to a device."""
    array, device = np.ones(size // 4, np.float32), jax.local_devices()[0]
    return size / seconds_per_call(lambda last: jax.device_put(array, device), None)


def download_rate(size: int) -> float:
    """Measures bytes/s of a copy from a device to the host; each copies a new array, since jax keeps a copy it made."""
    make, fastest = jax.jit(lambda i: jnp.full(size // 4, i, jnp.float32)), float("inf")
    for i in range(ROUNDS):
        array = jax.block_until_ready(make(float(i)))
        begin = time.perf_counter()
        np.asarray(array)
        fastest = min(fastest, time.perf_counter() - begin)
    return size / fastest


def seconds_per_call(call: Callable[[Any], Any], first: Any) -> float:
    """Measures a call that is given its last result, in the fastest of `ROUNDS` rounds; calls of a round are queued.

    Args:
      call: compiles when it is first called.
      first: the first call's argument.
    """
    last = jax.block_until_ready(call(first))
    begin = time.perf_counter()
    last = jax.block_until_ready(call(last))
    count = max(1, min(50, int(BUDGET / max(time.perf_counter() - begin, 1e-6))))
    fastest = float("inf")
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for _ in range(count):
            last = call(last)
        jax.block_until_ready(last)
        fastest = min(fastest, (time.perf_counter() - begin) / count)
    return fastest

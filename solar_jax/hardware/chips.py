"""Accelerator specifications and prices in one table, and memory and FLOP/s queries for local devices."""

import dataclasses
import os
import pathlib
import time

import jax
import jax.numpy as jnp

from solar_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU generation. A device is what jax counts as one; a TPU7x chip has two."""

    kinds: tuple[str, ...]  # `device.device_kind`
    devices: int  # per chip
    cores: int  # per chip, as counted in slice names: a v5p-128 has 64 chips
    peak: float  # dense bfloat16 FLOP/s of a device, as published
    matmul_rate: float  # fraction of peak that a training step's matmuls reach, by the compiler's estimate
    clock: float  # Hz
    memory: float  # GiB of HBM per device that the compiler lets a program use
    bandwidth: float  # HBM bytes/s of a device
    links: float  # ICI bytes/s of a device over all torus axes together, both directions
    network: float  # DCN bytes/s of a device to other slices, through its host
    price: float  # US dollars per chip-hour, on demand
    vector_memory: int  # MiB of VMEM per core, the compiler's limit for a kernel
    int8: float  # rate of int8 matmuls next to bfloat16's, by the compiler (scripts/bench/matmul_rates.py)
    fp8: float  # the same of float8
    exposed: float = 1.0  # share of a step's ICI time that nothing hides, in the order of compiled programs
    reduce_factor: float = 1.0  # bytes moved to add up sharded gradients, next to their size; 2 is an all-reduce
    scoped_memory: bool = True  # whether `compiler_options` raises the scoped VMEM limit of fusions
    offloaded: tuple[str, ...] = ()  # collectives that the compiler can give to SparseCores, as its options name them


# Rates from Google's page on each chip (cloud.google.com/tpu/docs/v4 ... /tpu7x), ICI at 90 % of the stated bandwidth;
# the clock is the one at which the matrix units reach the peak; memory as reported by libtpu 0.0.44's compiler.
# Prices: cloud.google.com/tpu/pricing, on-demand list prices of 2025 in US regions.
CHIPS = {
    "v4": Chip(
        kinds=("TPU v4",), devices=1, cores=2, peak=275e12, matmul_rate=0.93, clock=1.05e9, memory=30.75,
        bandwidth=1.228e12, links=3 * 9e10, network=6.25e9, price=3.22, vector_memory=16,
        int8=0.83, fp8=0.79, scoped_memory=False,
    ),
    "v5e": Chip(
        kinds=("TPU v5 lite", "TPU v5e"), devices=1, cores=1, peak=197e12, matmul_rate=0.95, clock=1.5e9, memory=15.75,
        bandwidth=8.19e11, links=2 * 9e10, network=3.125e9, price=1.20, vector_memory=128, int8=2.0, fp8=1.0,
        exposed=0.62, reduce_factor=2.0,
    ),
    "v5p": Chip(
        kinds=("TPU v5", "TPU v5p"), devices=1, cores=2, peak=459e12, matmul_rate=0.98, clock=1.75e9, memory=95.73,
        bandwidth=2.765e12, links=3 * 1.8e11, network=6.25e9, price=4.20, vector_memory=64, int8=2.0, fp8=1.0,
        offloaded=("all_gather", "2d_all_gather", "3d_all_gather", "all_reduce", "reduce_scatter", "nd_reduce_scatter"),
    ),
    "v6e": Chip(
        kinds=("TPU v6 lite", "TPU v6e"), devices=1, cores=1, peak=918e12, matmul_rate=0.83, clock=1.75e9, memory=31.24,
        bandwidth=1.64e12, links=2 * 1.8e11, network=12.5e9, price=2.70, vector_memory=128, int8=1.37, fp8=1.0,
        reduce_factor=2.0, offloaded=("all_gather", "2d_all_gather", "all_reduce"),
    ),
    "tpu7x": Chip(
        kinds=("TPU7x",), devices=2, cores=2, peak=1153.5e12, matmul_rate=0.80, clock=2.2e9, memory=94.74,
        bandwidth=3.69e12, links=3 * 9e10, network=6.25e9, price=12.00, vector_memory=64,
        int8=0.75, fp8=2.0, scoped_memory=False,
    ),
}  # fmt: skip

# `device.device_kind` of a GPU -> dense bfloat16 FLOP/s per device
GPU_PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}

# A scoped VMEM limit above the default lets matmul fusions keep full operand tiles: 98 % of peak on a v5p instead of
# 74 to 93 %, by the compiler's estimate.
_SCOPED = {"xla_tpu_scoped_vmem_limit_kib": "98304"}
OFFLOADED_EXPOSED = 0.1  # `Chip.exposed` of collectives on SparseCores
_OFFLOAD = "xla_tpu_enable_sparse_core_collective_offload_"
_NOT_FUSED = {"xla_tpu_enable_async_collective_fusion_fuse_all_gather": "false"}  # the other way to run them beside


def chip_name(device: jax.Device | jax.sharding.AbstractDevice) -> str | None:
    """Returns the name in `CHIPS` of a device's chip, or None if it is not a TPU."""
    return next((name for name, chip in CHIPS.items() if device.device_kind in chip.kinds), None)


def vector_memory(device: jax.Device | jax.sharding.AbstractDevice | None) -> int:
    """Returns the bytes of VMEM that a kernel may use; for anything but a TPU, as much as any chip has."""
    name = chip_name(device) if device else None
    return (CHIPS[name].vector_memory if name else 128) * 2**20


def compiler_options(
    device: jax.Device | jax.sharding.AbstractDevice | None, offload_collectives: bool = False
) -> dict[str, str]:
    """Returns the options to pass to `.compile()` for a training step on such devices.

    Args:
      device: one of them.
      offload_collectives: give collectives to the SparseCores, so that they run beside matmuls.

    Raises:
      UserError: collectives cannot be offloaded on such a device.
    """
    name = chip_name(device) if device else None
    options = dict(_SCOPED) if name and CHIPS[name].scoped_memory else {}
    if not offload_collectives:
        return options
    if not name or not CHIPS[name].offloaded:
        able = ", ".join(name for name, chip in CHIPS.items() if chip.offloaded)
        kind = device.device_kind if device else "no device"
        raise UserError(f"config.train.offload_collectives needs a TPU of {able}, found {kind}.")
    return options | _NOT_FUSED | {_OFFLOAD + kind: "true" for kind in CHIPS[name].offloaded}


def peak_flops(device: jax.Device) -> float | None:
    """Returns the peak bfloat16 FLOP/s of a device, or None if unknown, as for a CPU."""
    name = chip_name(device)
    return CHIPS[name].peak if name else GPU_PEAK_FLOPS.get(device.device_kind)


def memory_bytes(device: jax.Device) -> int:
    """Returns the bytes that a program may use on a device; CPU devices share the host memory available now."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return host_memory_bytes() // max(1, jax.local_device_count())


def host_memory_bytes() -> int:
    """Returns the bytes of memory available on this machine, capped by its container's limit."""
    try:
        lines = dict(line.split(":", 1) for line in pathlib.Path("/proc/meminfo").read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux: fall back to total memory
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(available, int(pathlib.Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or no limit set
        return available


def measured_flops(dtype: jnp.dtype) -> float:
    """Measures FLOP/s of one large matmul on one device, for devices in no table; CPU devices share the same cores."""
    n = 1536
    x = jnp.ones((n, n), dtype)
    matmul = jax.jit(lambda a: a @ a)
    matmul(x).block_until_ready()
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        matmul(x).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return 2 * n**3 / min(seconds)


def memory_peaks() -> list[float] | None:
    """Returns peak memory in GiB per local device, or None if any device does not report it."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] / 2**30 for s in stats if s and "peak_bytes_in_use" in s]
    return peaks if len(peaks) == len(stats) else None

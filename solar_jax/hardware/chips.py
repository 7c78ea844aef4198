"""What accelerators can do and cost, in one table of chips, and how much memory a device here has."""

import dataclasses
import os
import pathlib
import time

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of TPU; a device is what jax counts as one, which of a TPU7x are two a chip."""

    kinds: tuple[str, ...]  # `device.device_kind`
    devices: int  # a chip
    cores: int  # a chip, as slices are named by: a v5p-128 has 64 chips
    peak: float  # dense bfloat16 FLOP/s of a device, as its maker states it
    matmul_rate: float  # of the peak, that a training step's matmuls reach by the compiler's figures
    clock: float  # Hz
    memory: float  # GiB of a device's HBM that the compiler lets a program use
    bandwidth: float  # bytes/s between a device and its HBM
    links: float  # bytes/s of a device over the axes of the torus together, both ways
    network: float  # bytes/s of a device to other slices, over its host's network
    price: float  # US dollars a chip and hour, on demand
    vector_memory: int  # MiB of a core, as the compiler bounds a kernel's
    scoped_memory: bool = True  # whether `compiler_options` widens the vector memory of a fusion


# Rates from Google's pages on each chip (cloud.google.com/tpu/docs/v4 ... /tpu7x), links at 90 % of what is stated;
# the clock is the one at which the matrix units reach the peak; memory as libtpu 0.0.44's compiler names it.
# Prices: cloud.google.com/tpu/pricing, on demand in us regions, list prices of 2025.
CHIPS = {
    "v4": Chip(
        kinds=("TPU v4",), devices=1, cores=2, peak=275e12, matmul_rate=0.93, clock=1.05e9, memory=30.75,
        bandwidth=1.228e12, links=3 * 9e10, network=6.25e9, price=3.22, vector_memory=16, scoped_memory=False,
    ),
    "v5e": Chip(
        kinds=("TPU v5 lite", "TPU v5e"), devices=1, cores=1, peak=197e12, matmul_rate=0.95, clock=1.5e9, memory=15.75,
        bandwidth=8.19e11, links=2 * 9e10, network=3.125e9, price=1.20, vector_memory=128,
    ),
    "v5p": Chip(
        kinds=("TPU v5", "TPU v5p"), devices=1, cores=2, peak=459e12, matmul_rate=0.98, clock=1.75e9, memory=95.73,
        bandwidth=2.765e12, links=3 * 1.8e11, network=6.25e9, price=4.20, vector_memory=64,
    ),
    "v6e": Chip(
        kinds=("TPU v6 lite", "TPU v6e"), devices=1, cores=1, peak=918e12, matmul_rate=0.79, clock=1.75e9, memory=31.24,
        bandwidth=1.64e12, links=2 * 1.8e11, network=12.5e9, price=2.70, vector_memory=128,
    ),
    "tpu7x": Chip(
        kinds=("TPU7x",), devices=2, cores=2, peak=1153.5e12, matmul_rate=0.80, clock=2.2e9, memory=94.74,
        bandwidth=3.69e12, links=3 * 9e10, network=6.25e9, price=12.00, vector_memory=64, scoped_memory=False,
    ),
}  # fmt: skip

# `device.device_kind` -> dense bfloat16 FLOP/s of one device that is no TPU
GPU_PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}

# More vector memory for a fusion's operands than the default lets matmuls keep whole tiles of them: 98 % of peak on a
# v5p where it was 74 to 93 %, by the compiler.
_SCOPED = {"xla_tpu_scoped_vmem_limit_kib": "98304"}


def chip_name(device: jax.Device) -> str | None:
    """The name in `CHIPS` of a device's chip; None of what is no TPU."""
    return next((name for name, chip in CHIPS.items() if device.device_kind in chip.kinds), None)


def vector_memory(device: jax.Device) -> int:
    """Bytes that a kernel may use of a core's vector memory; of what is no TPU, as much as any has."""
    name = chip_name(device)
    return (CHIPS[name].vector_memory if name else 128) * 2**20


def compiler_options(device: jax.Device) -> dict[str, str]:
    """What to pass to `.compile()` for a training step on such devices."""
    name = chip_name(device)
    return _SCOPED if name and CHIPS[name].scoped_memory else {}


def peak_flops(device: jax.Device) -> float | None:
    """bfloat16 FLOP/s of a device; None where it is not known, as for a CPU."""
    name = chip_name(device)
    return CHIPS[name].peak if name else GPU_PEAK_FLOPS.get(device.device_kind)


def memory_bytes(device: jax.Device) -> int:
    """Bytes that a program may use on a device; CPU devices share what the machine has available now."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return host_memory_bytes() // max(1, jax.local_device_count())


def host_memory_bytes() -> int:
    """Bytes of memory available on this machine, within the limit of its container."""
    try:
        lines = dict(line.split(":", 1) for line in pathlib.Path("/proc/meminfo").read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux: all there is
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(available, int(pathlib.Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        return available


def measured_flops(dtype: jnp.dtype) -> float:
    """FLOP/s of one large matmul on one device, where no table tells: CPU devices share the same cores."""
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
    """The most GiB of memory that each device of this process has held; None where a device does not tell."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] / 2**30 for s in stats if s and "peak_bytes_in_use" in s]
    return peaks if len(peaks) == len(stats) else None

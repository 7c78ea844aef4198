"""What accelerators can do: peak rates by device kind, and how much memory a device has."""

import os
import pathlib
import time

import jax
import jax.numpy as jnp

# `device.device_kind` -> dense bfloat16 FLOP/s of one device, as its maker states it
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}

# `device.device_kind` -> options for the compiler of a training step. More vector memory for a fusion's operands than
# the default lets matmuls keep whole tiles of them: 98 % of peak on a v5p where it was 74 to 93 %, by the compiler.
_SCOPED = {"xla_tpu_scoped_vmem_limit_kib": "98304"}
COMPILER_OPTIONS: dict[str, dict[str, str]] = {
    "TPU v5": _SCOPED,
    "TPU v5p": _SCOPED,
    "TPU v5 lite": _SCOPED,
    "TPU v5e": _SCOPED,
    "TPU v6 lite": _SCOPED,
    "TPU v6e": _SCOPED,
}


def compiler_options(device: jax.Device) -> dict[str, str]:
    """What to pass to `.compile()` for a training step on such devices."""
    return COMPILER_OPTIONS.get(device.device_kind, {})


def peak_flops(device: jax.Device) -> float | None:
    """bfloat16 FLOP/s of a device; None where it is not known, as for a CPU."""
    return PEAK_FLOPS.get(device.device_kind)


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

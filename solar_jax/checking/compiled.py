"""Attention kernels compiled for a slice that need not exist, beside what the planner says of them."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from solar_jax.checking.kernels import KERNELS, Case, both_ways, first_line, make_arrays, planned_flops
from solar_jax.hardware import chips
from solar_jax.hardware.slices import Slice, described_devices
from solar_jax.model import flash, flash_streamed
from solar_jax.parallel.attention import local_kernel
from solar_jax.planning.hlo_cost import KERNEL_RATE, read_program

# VMEM by kernel; splash streams blocks that fit everywhere.
NEEDED_MEMORY = {"flash": flash.needed_memory, "streamed": flash_streamed.streamed_memory}


@dataclasses.dataclass(frozen=True)
class KernelCompilation:
    """One kernel, forward and backward, as compiled for one device; bytes and seconds."""

    kernel: str
    case: Case
    vector_memory: int  # that the planner reckons with; 0 for splash, which streams blocks
    vector_memory_limit: int  # of the chip
    kernel_seconds: float | None = None  # by the planner: FLOPs at half of the peak
    other_cycles: float | None = None  # by the compiler, of all operations around the kernels
    other_seconds: float | None = None  # those, at the chip's clock
    memory: int | None = None  # HBM, by the compiler
    compile_seconds: float = 0.0
    problem: str = ""  # "" if it compiles

    @property
    def foreseen(self) -> bool:
        """True where the planner says that it does not fit, so that no run would take it."""
        return self.vector_memory > self.vector_memory_limit


def cases_to_compile() -> list[Case]:
    """Returns what a kernel is compiled for: rows of a training run, in each dtype and width of heads."""
    sizes = {"heads": 8, "kv_heads": 2, "length": 4096}
    masked = [
        Case(dtype, width, segmented=True, window=1024, **sizes) for dtype in ("float32", "bfloat16")
        for width in (64, 128)
    ]  # fmt: skip
    return [*masked, Case("bfloat16", 128, **sizes)]


def kernel_compilations(wanted: Slice) -> Iterator[KernelCompilation]:
    """Compiles every kernel of TPUs for one device of a slice, case by case.

    Raises:
      UserError: no TPU compiler is installed.
    """
    device = described_devices(wanted)[0]
    for kernel in KERNELS["tpu"]:
        for case in cases_to_compile():
            yield compile_kernel(kernel, case, device, wanted)


def compile_kernel(kernel: str, case: Case, device: Any, wanted: Slice) -> KernelCompilation:
    """Compiles a kernel for a described device of a slice; one that does not compile is a problem, no exception."""
    width = jnp.dtype(case.dtype).itemsize
    needed = NEEDED_MEMORY[kernel](case.length, case.width, width) if kernel in NEEDED_MEMORY else 0
    found = KernelCompilation(kernel, case, needed, chips.vector_memory(device))
    if found.foreseen:
        return dataclasses.replace(found, problem="does not fit in VMEM, by the planner; not compiled")
    place = SingleDeviceSharding(device)
    arrays = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), jax.eval_shape(lambda: make_arrays(case))
    )
    run = jax.jit(both_ways(local_kernel(kernel, case.window, interpret=False)))
    begin = time.perf_counter()
    try:
        lowered = run.trace(*arrays).lower(lowering_platforms=("tpu",))
        compiled = lowered.compile(chips.compiler_options(device) or None)
    except Exception as e:  # Pallas, Mosaic and XLA raise exceptions of many kinds
        return dataclasses.replace(found, problem=f"does not compile: {first_line(e)}")
    program = read_program(compiled.as_text() or "", wanted.facts)
    memory = compiled.memory_analysis()
    return dataclasses.replace(
        found, kernel_seconds=planned_flops(case) / (KERNEL_RATE * wanted.facts.peak), other_cycles=program.cycles,
        other_seconds=program.parts()["compute"], memory=memory.total_allocation_bytes if memory else None,
        compile_seconds=time.perf_counter() - begin,
    )  # fmt: skip

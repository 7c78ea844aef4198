"""Attention kernels against plain attention on one device, forward and backward."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from solar_jax.hardware import chips
from solar_jax.model.attention import Attend, attention
from solar_jax.model.flash_blocks import block_size
from solar_jax.model.rope import apply_rope
from solar_jax.parallel.attention import local_kernel
from solar_jax.planning.hlo_cost import FLOAT32_PASSES
from solar_jax.planning.step_time import BACKWARD_KERNEL

_OF_TPUS = ("flash", "streamed", "splash")
KERNELS = {"tpu": _OF_TPUS, "gpu": ("cudnn",), "cpu": _OF_TPUS}  # by platform
# Largest distance of a token's vector in a head from that of plain attention in float32 over the same inputs, over the
# sum of that vector's norm, the root mean square of the norms and a tenth of the largest. The largest alone would not
# do: the first tokens, which see few others, have such long vectors that wrong ones of later tokens would pass. Without
# it, queries that see one key would not: their gradient is 0, a difference of numbers that were rounded.
# Float32 kernels multiply in full and differ by rounding; one bfloat16 pass in their place is 3e-3 away. Bfloat16 ones
# round weights and gradients of scores to 8 bits before their second products, as plain attention does; their dq is up
# to 2e-2 away in rows of 8,192.
TOLERANCES = {"float32": 1e-4, "bfloat16": 4e-2}
OUTPUTS = ("out", "dq", "dk", "dv")
BLOCK = 512  # queries whose scores plain attention holds at a time

Arrays = tuple[Any, ...]  # q, k, v, cosines, sines, segment ids or None, gradient of the output


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and mask of one comparison."""

    dtype: str  # a key of `TOLERANCES`
    width: int  # H
    heads: int = 4  # N
    kv_heads: int = 4  # K
    segmented: bool = False  # several documents in a row
    window: int = 0  # keys each query sees, including itself; 0: all earlier ones
    length: int = 2048  # T
    rows: int = 2  # B

    def __str__(self) -> str:
        mask = (", documents" if self.segmented else "") + (f", window {self.window}" if self.window else "")
        heads = f"{self.heads}/{self.kv_heads} heads of {self.width}"
        return f"{self.dtype}, {self.rows} x {self.length}, {heads}{mask}"


@dataclasses.dataclass(frozen=True)
class Errors:
    """Differences of one kernel from plain attention, by name of `OUTPUTS`."""

    absolute: dict[str, float]  # the largest of a value
    relative: dict[str, float]  # the largest of a vector, as `TOLERANCES` says
    tolerance: float  # of the relative ones

    @property
    def worst(self) -> str:
        """Name of the output with the largest relative difference; one that is not finite is larger than any."""
        return max(OUTPUTS, key=lambda name: (not np.isfinite(self.relative[name]), self.relative[name]))

    @property
    def wrong(self) -> str:
        """The problem in words; "" if all outputs are within the tolerance."""
        found = self.relative[self.worst]
        return "" if found <= self.tolerance else f"{self.worst} differs by {found:.1e}, more than {self.tolerance:.0e}"


def make_cases(kernel: str, *, small: bool) -> list[Case]:
    """Returns what a kernel is compared on: dtypes, widths of heads, masks, and query heads that share a key head.

    Args:
      kernel: a name of `KERNELS`.
      small: rows short enough for interpret mode; still of several blocks.
    """
    length, rows = (640, 1) if small else (2048, 2)  # blocks of 128, or of 512
    sizes = {"length": length, "rows": rows}
    everything = {"kv_heads": 1, "segmented": True, "window": length // 5 + 7, **sizes}
    dtypes = ("bfloat16",) if kernel == "cudnn" else tuple(TOLERANCES)
    cases = [Case(dtype, width, **everything) for dtype in dtypes for width in (64, 128)]
    return [*cases, Case("bfloat16", 128, **sizes), Case("bfloat16", 128, kv_heads=2, segmented=True, **sizes)]


def planned_flops(case: Case) -> float:
    """Returns the FLOPs of a kernel, forward and backward, as the planner counts them: T / 2 keys, or the window."""
    keys = min(case.length / 2, case.window or case.length)
    passes = FLOAT32_PASSES if case.dtype == "float32" else 1
    return passes * (1 + BACKWARD_KERNEL) * 4 * case.rows * case.heads * case.width * case.length * keys


def make_arrays(case: Case, seed: int = 0) -> Arrays:
    """Draws normal arrays, angles that differ in each place, and documents with borders apart from those of blocks."""
    rng = np.random.default_rng(seed)
    B, T, N, K, H = case.rows, case.length, case.heads, case.kv_heads, case.width

    def normal(heads: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal((B, T, heads, H), np.float32), case.dtype)

    q, k, v, gradient = normal(N), normal(K), normal(K), normal(N)
    angles = rng.uniform(0, 2 * np.pi, (B, T, H // 2)).astype(np.float32)
    borders = np.sort(rng.integers(1, T, (B, 1, 3)), axis=-1)
    ids = jnp.asarray((np.arange(T)[:, None] >= borders).sum(-1), jnp.int32) if case.segmented else None
    return q, k, v, jnp.cos(angles), jnp.sin(angles), ids, gradient


def plain_by_blocks(
    q: jax.Array, k: jax.Array, v: jax.Array, rope: tuple[jax.Array, jax.Array], segment_ids: jax.Array | None, *,
    sliding_window: int,
) -> jax.Array:  # fmt: skip
    """`rotated_attention` of long rows: it holds the scores of `BLOCK` queries at a time, also in its backward pass.

    Args:
      q, k, v, rope: as in `Attend`; T a multiple of `flash_blocks.LANES`.
      segment_ids: [B, T]; None if every row is one document.
      sliding_window: keys each query sees, including itself; 0 for all earlier ones.
    """
    q, k, key = apply_rope(q, rope), apply_rope(k, rope), jnp.arange(k.shape[1])
    size = block_size(q.shape[1], BLOCK)

    @jax.checkpoint
    def one(start: jax.Array) -> jax.Array:
        own = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
        age = own(key, axis=0)[:, None] - key[None]
        seen = (age >= 0) & (age < (sliding_window or key.size))
        if segment_ids is not None:
            seen = seen & (own(segment_ids, axis=1)[:, :, None] == segment_ids[:, None])
        return attention(own(q, axis=1), k, v, jnp.broadcast_to(seen, (q.shape[0], size, key.size)))

    blocks = jax.lax.map(one, jnp.arange(0, q.shape[1], size))  # [T / size, B, size, N, H]
    return jnp.moveaxis(blocks, 0, 1).reshape(q.shape)


def both_ways(attend: Attend) -> Callable[..., tuple[jax.Array, ...]]:
    """Returns a function of `Arrays` that gives `OUTPUTS` in float32: the result and the gradients of q, k and v."""

    def run(q: Any, k: Any, v: Any, cos: Any, sin: Any, ids: Any, gradient: Any) -> tuple[jax.Array, ...]:
        out, pull_back = jax.vjp(lambda q, k, v: attend(q, k, v, (cos, sin), ids), q, k, v)
        return tuple(x.astype(jnp.float32) for x in (out, *pull_back(gradient)))

    return run


def kernel_errors(attend: Attend, case: Case) -> Errors:
    """Runs a kernel and plain attention, and returns by how much they differ.

    Args:
      attend: takes the arrays of one device.
      case: shapes, dtype and mask, which `attend` must apply itself.

    Raises:
      Exception: whatever the compiler or the device says of the kernel.
    """
    arrays = make_arrays(case)
    found = _run(both_ways(attend), arrays)
    plain = functools.partial(plain_by_blocks, sliding_window=case.window)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == case.dtype else x, arrays)
    expected = _run(both_ways(plain), wide)
    absolute, relative = {}, {}
    for name, a, b in zip(OUTPUTS, found, expected, strict=True):
        absolute[name], relative[name] = map(float, _differences(a, b))  # NaN stays NaN
    return Errors(absolute, relative, TOLERANCES[case.dtype])


@jax.jit
def _differences(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the absolute and the relative difference of a from b, float32 [B, T, N, H]."""
    norms = jnp.linalg.norm(b, axis=-1)
    scale = norms + jnp.sqrt(jnp.mean(norms**2)) + 0.1 * jnp.max(norms)
    return jnp.max(jnp.abs(a - b)), jnp.max(jnp.linalg.norm(a - b, axis=-1) / scale)


def _run(f: Callable[..., tuple[jax.Array, ...]], arrays: Arrays) -> tuple[jax.Array, ...]:
    """Compiles as a training step is compiled, and runs, on the first local device."""
    device = jax.local_devices()[0]
    arrays = jax.device_put(arrays, device)
    return jax.jit(f).lower(*arrays).compile(chips.compiler_options(device) or None)(*arrays)


@dataclasses.dataclass(frozen=True)
class KernelCheck:
    """One kernel on one case."""

    kernel: str
    case: Case
    errors: Errors | None  # None if it did not run
    problem: str  # "" if it is right


def comparisons(platform: str) -> Iterator[KernelCheck]:
    """Compares every kernel that a platform has, case by case; off TPU and GPU kernels are interpreted, and small."""
    for kernel in KERNELS[platform]:
        for case in make_cases(kernel, small=platform == "cpu"):
            attend = local_kernel(kernel, case.window, interpret=platform == "cpu")
            yield compared(kernel, attend, case)


def compared(kernel: str, attend: Attend, case: Case) -> KernelCheck:
    """Compares a kernel by its name; one that does not compile or run is a problem and not an exception."""
    try:
        errors = kernel_errors(attend, case)
    except Exception as e:  # Pallas, Mosaic, XLA and CUDA raise exceptions of many kinds
        return KernelCheck(kernel, case, None, f"does not run: {first_line(e)}")
    return KernelCheck(kernel, case, errors, errors.wrong)


def first_line(e: BaseException) -> str:
    """Returns the type and the first line of an exception, at most 200 characters."""
    lines = str(e).strip().splitlines() or [""]
    return f"{type(e).__name__}: {lines[0]}"[:200].rstrip(": ")

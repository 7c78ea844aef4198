"""Attention implementation of a mesh: TPU or GPU kernels, or array operations that XLA partitions."""

import functools
from collections.abc import Callable

import jax
from jax.sharding import AbstractMesh, Mesh

from solar_jax.config import ModelConfig, TrainConfig
from solar_jax.errors import UserError
from solar_jax.hardware import chips
from solar_jax.model import flash, flash_streamed
from solar_jax.model.attention import Attend, Shard, library_attention, sharded_attention
from solar_jax.model.flash import flash_attention
from solar_jax.model.flash_blocks import LANES
from solar_jax.model.flash_streamed import streamed_attention
from solar_jax.model.precision import compute_dtype
from solar_jax.model.splash import splash_attention
from solar_jax.parallel.mesh import platform
from solar_jax.parallel.rules import ACTIVATIONS, spec

ATTENTION = ("auto", "flash", "streamed", "splash", "cudnn", "xla")  # train.attention


def attention_choice(cfg: ModelConfig, train: TrainConfig, length: int, mesh: Mesh | AbstractMesh) -> str:
    """Selects the attention implementation.

    Args:
      cfg: the model.
      train: the run's; its attention, precision and mesh count.
      length: T.
      mesh: of devices that need not exist.

    Returns:
      "flash" or "streamed", our TPU kernels for rows that fit in VMEM and for others; "splash", jax's; "cudnn", GPU
      kernels; or "xla", array operations.

    Raises:
      UserError: unknown choice, requested kernels do not support the shapes, or context does not divide a row.
    """
    wanted, context = train.attention, mesh.shape["context"]
    if wanted not in ATTENTION:
        raise UserError(f"config.train.attention must be one of {', '.join(ATTENTION)}, found {wanted!r}.")
    chunks = 1 if context == 1 else 2 * context  # runs of consecutive tokens per row; each lies on one device
    if length % chunks:
        raise UserError(
            f"config.mesh.context={context} needs a config.data.sequence_length that is a multiple of {chunks}, "
            f"found {length}."
        )
    if wanted == "flash" and context > 1:
        raise UserError(
            f"config.train.attention='flash' needs whole rows, config.mesh.context=1, found {context}; 'streamed' and "
            "'splash' take split ones."
        )
    multiple = chunks * LANES
    if wanted in ("flash", "streamed", "splash") and length % multiple:
        raise UserError(
            f"config.train.attention={wanted!r} needs a config.data.sequence_length that is a multiple of {multiple}, "
            f"found {length}."
        )
    needed, has = {}, _vector_memory(mesh)
    if length % multiple == 0:
        width, itemsize = cfg.head_dim, compute_dtype(train).itemsize
        needed["flash"] = flash.needed_memory(length, width, itemsize)
        needed["streamed"] = flash_streamed.streamed_memory(
            length // context, width, itemsize, max(1, chunks // context)
        )
    if needed.get(wanted, 0) > has:
        raise UserError(
            f"config.train.attention={wanted!r} needs {needed[wanted] / 2**20:.0f} MiB of VMEM for a "
            f"config.data.sequence_length of {length}, found {has / 2**20:.0f} MiB; 'splash' takes rows of any length."
        )
    narrow = compute_dtype(train).itemsize == 2
    taken = narrow and cfg.head_dim % 8 == 0 and cfg.head_dim <= 128 and context == 1
    if wanted == "cudnn" and not taken:
        raise UserError(
            "config.train.attention='cudnn' needs 16-bit matmuls (config.train.precision), a head_dim of at most 128 "
            f"and a multiple of 8, and config.mesh.context=1; found {train.precision!r}, {cfg.head_dim} and "
            f"{context}."
        )
    if wanted != "auto":
        return wanted
    if platform(mesh) == "tpu" and needed:
        ours = ("flash", "streamed") if context == 1 else ("streamed",)
        return next((name for name in ours if needed[name] <= has), "splash")
    return "cudnn" if platform(mesh) == "gpu" and taken else "xla"


def _vector_memory(mesh: Mesh | AbstractMesh) -> int:
    """Returns the bytes of VMEM that a kernel may use on the mesh's devices."""
    return chips.vector_memory(mesh.devices.flat[0] if isinstance(mesh, Mesh) else mesh.abstract_device)


def local_kernel(choice: str, sliding_window: int, *, interpret: bool) -> Callable[..., jax.Array]:
    """Returns the kernel for the arrays of one device; an `Attend`; "streamed" and "splash" also take a `shard`.

    Args:
      choice: "flash", "streamed", "splash" or "cudnn".
      sliding_window: keys each query sees, including itself; 0 for all earlier ones.
      interpret: run Pallas kernels in interpret mode, for machines without a TPU.
    """
    if choice == "cudnn":
        return functools.partial(library_attention, sliding_window=sliding_window, implementation="cudnn")
    kernel = {"flash": flash_attention, "streamed": streamed_attention, "splash": splash_attention}[choice]
    return functools.partial(kernel, sliding_window=sliding_window, interpret=interpret)


def attention_kernel(cfg: ModelConfig, train: TrainConfig, length: int, mesh: Mesh) -> Attend | None:
    """Returns the kernel for `mesh`, or None to let XLA partition array operations; off TPU, it is interpreted."""
    choice = attention_choice(cfg, train, length, mesh)
    if choice == "xla":
        plain = functools.partial(sharded_attention, sliding_window=cfg.sliding_window)
        return per_device(mesh, plain) if mesh.shape["context"] > 1 else None
    return per_device(mesh, local_kernel(choice, cfg.sliding_window, interpret=platform(mesh) != "tpu"))


def per_device(mesh: Mesh, kernel: Callable[..., jax.Array]) -> Attend:
    """Wraps a per-device kernel in shard_map, so that each device runs it on its own rows, heads and queries.

    Segment ids are unsharded along T: [B, T] in text order. Where a row is split, the kernel gets its `shard`.
    """
    q, k, angles, ids = (spec(letters, ACTIVATIONS) for letters in ("BTNH", "BTKH", "BTH", "B."))

    def local(
        q: jax.Array, k: jax.Array, v: jax.Array, rope: tuple[jax.Array, jax.Array], segment_ids: jax.Array | None
    ) -> jax.Array:
        split = {"shard": context_shard(mesh)} if mesh.shape["context"] > 1 else {}
        return kernel(q, k, v, rope, segment_ids, **split)

    # check_vma is off: kernels do not declare over which axes their results vary.
    return jax.shard_map(local, mesh=mesh, in_specs=(q, k, k, angles, ids), out_specs=q, check_vma=False)


def context_shard(mesh: Mesh) -> Shard:
    """Returns the device's `Shard` of row tokens; call inside a `shard_map` over `mesh`."""
    gather = functools.partial(jax.lax.all_gather, axis_name="context")
    return Shard(mesh.shape["context"], jax.lax.axis_index("context"), gather)

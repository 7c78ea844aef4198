"""Writes a parameters-only checkpoint in blocks, without ever holding a full array in memory."""

import functools
import pathlib
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from solar_jax.model.shapes import Params
from solar_jax.orbax_store.arrays import BlockWriter
from solar_jax.orbax_store.layout import COMMITTED, FOLDER
from solar_jax.orbax_store.store import saving_context
from solar_jax.parallel import processes
from solar_jax.storage.paths import is_local
from solar_jax.storage.retry import retry


def write_streamed(
    workdir: pathlib.Path,
    dtypes: Params,
    write_arrays: Callable[[BlockWriter], None],
    progress: Callable[[int], None],
) -> None:
    """Writes a checkpoint of step 0 that holds only `params`, without ever holding a full array in memory.

    Orbax writes the checkpoint with one-element arrays, which the real ones then replace. What an earlier, killed run
    wrote is kept, so that `write_arrays` can resume.

    Args:
      workdir: the folder above `checkpoints/`, local or in a bucket.
      dtypes: the tree of parameters, with a dtype in place of each array.
      write_arrays: creates and writes every array.
      progress: called with the bytes written since its last call.
    """
    folder = workdir / FOLDER / "0"
    if not (folder / COMMITTED).exists():
        processes.wait(f"{folder} is not there")  # every process has seen this
        with tempfile.TemporaryDirectory(prefix="solar_jax_empty_") as temporary:
            _save_empty(pathlib.Path(temporary), dtypes)
            if processes.is_first():
                _copy(pathlib.Path(temporary) / "0", folder)
    processes.wait(f"{folder} is there")
    writer = BlockWriter(folder / "params", progress)
    write_arrays(writer)
    writer.flush()


def _save_empty(local: pathlib.Path, dtypes: Params) -> None:
    """Saves a checkpoint of one-element arrays; each process writes it to its own folder."""
    context = saving_context()
    saving = context.array.saving
    # No separate layout metadata beside the arrays: their own metadata has it.
    saving.array_metadata_store = None
    saving.enable_write_sharding_file = False
    if processes.index_and_count()[1] > 1:
        context.multiprocessing_options.primary_host = None  # no process writes for another
        saving.use_replica_parallel = False
    with ocp.training.Checkpointer(str(local), context=context) as checkpointer:
        # On all devices of all processes, since Orbax rejects arrays that other processes do not know of.
        everywhere = jax.sharding.NamedSharding(
            jax.make_mesh((jax.device_count(),), ("all",)), jax.sharding.PartitionSpec()
        )
        empty = jax.jit(lambda: jax.tree.map(lambda d: jnp.zeros((1,), d), dtypes), out_shardings=everywhere)()
        checkpointer.save_checkpointables(0, {"params": empty}, force=True)


def _copy(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Copies small files to a local or bucket folder; the commit marker, which makes them a checkpoint, comes last."""
    files = sorted((p for p in source.rglob("*") if p.is_file()), key=lambda p: p == source / COMMITTED)
    for file in files:
        target = folder / file.relative_to(source).as_posix()
        if is_local(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
        else:
            retry(functools.partial(target.write_bytes, file.read_bytes()), f"{target}")

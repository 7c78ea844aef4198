"""Training state on disk, through Orbax: `params`, `opt_state` and `host` of a step, atomically.

The folder above holds `model/`: config.json and tokenizer files, so that a checkpoint says what it is by itself.
"""

import functools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from solar_jax.hf.buckets import retry
from solar_jax.hf.safetensors import is_local
from solar_jax.model.llama import Params
from solar_jax.parallel import processes
from solar_jax.training.arrays import BlockWriter

FOLDER = "checkpoints"
MODEL_FOLDER = "model"
_COMMITTED = "commit_success.txt"  # Orbax writes it last
_CHUNK_BYTES = 1 << 26


def _context() -> ocp.Context:
    """Orbax's options for saves: no compression, since weights are nearly noise to it."""
    context = ocp.Context()
    context.array.saving.use_compression = False
    return context


def _chunks(key: tuple[Any, ...], value: Any) -> ocp.options.ArrayOptions.Saving.StorageOptions:
    """Chunks of a layer and less: an export or another mesh reads what it needs and not a whole stack."""
    stacked = np.ndim(value) and any(getattr(k, "key", None) == "layers" for k in key)
    return ocp.options.ArrayOptions.Saving.StorageOptions(
        chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if stacked else ()
    )


def newest(workdir: pathlib.Path) -> pathlib.Path | None:
    """The folder of a run's newest whole checkpoint, found without Orbax, which asks every process."""
    folder = workdir / FOLDER
    steps = [int(p.name) for p in folder.glob("*") if p.name.isdigit() and (p / _COMMITTED).exists()]
    return folder / str(max(steps)) if steps else None


class CheckpointStore:
    """The checkpoints of one run, or of an arm of it, under `workdir/checkpoints`."""

    def __init__(self, workdir: pathlib.Path, keep: int = 1):
        # Both policies are given, since Orbax's own save at every chance and keep everything; when to save is the
        # training loop's decision. (Orbax's own types of its policies disagree, hence the two marks.)
        self._folder = (workdir / FOLDER).resolve()
        context = _context()
        context.array.saving.scoped_storage_options_creator = _chunks
        self._checkpointer = ocp.training.Checkpointer(
            str(self._folder),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # pyrefly: ignore
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),  # pyrefly: ignore
            cleanup_tmp_directories=True,
            context=context,
        )

    @property
    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, **state: Any) -> None:
        """Writes `params`, `opt_state` and `host` (JSON) of a step; returns when it is on disk under its final name."""
        self._checkpointer.save_checkpointables(step, state, force=True)

    def restore(self, step: int, params: Params, opt_state: Any) -> tuple[Params, Any, dict[str, Any]]:
        """The state of a step, laid out as the given abstract trees (shapes with shardings) say."""
        state = self._checkpointer.load_checkpointables(step, {"params": params, "opt_state": opt_state, "host": None})
        return state["params"], state["opt_state"], state["host"]

    def restore_params(self, step: int, params: Params) -> Params:
        """The parameters of a step alone, laid out as the given abstract tree says."""
        return self._checkpointer.load_checkpointables(step, {"params": params})["params"]

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, *_: object) -> None:
        self._checkpointer.close()


def write_streamed(
    workdir: pathlib.Path,
    dtypes: Params,
    write_arrays: Callable[[BlockWriter], None],
    progress: Callable[[int], None],
) -> None:
    """A checkpoint of step 0 that holds `params` alone, none of whose arrays is ever held whole.

    Orbax writes the checkpoint with an empty array in each place; the real ones then take the places. What an
    earlier, killed run wrote is kept, so that `write_arrays` can go on.

    Args:
      workdir: the folder above `checkpoints/`, local or a bucket's.
      dtypes: the tree of parameters, a dtype in the place of each array.
      write_arrays: creates and writes every array.
      progress: told the bytes written since its last call.
    """
    folder = workdir / FOLDER / "0"
    if not (folder / _COMMITTED).exists():
        processes.wait(f"{folder} is not there")  # every process has seen that
        with tempfile.TemporaryDirectory(prefix="solar_jax_empty_") as temporary:
            _save_empty(pathlib.Path(temporary), dtypes)
            if processes.is_first():
                _copy(pathlib.Path(temporary) / "0", folder)
    processes.wait(f"{folder} is there")
    writer = BlockWriter(folder / "params", progress)
    write_arrays(writer)
    writer.flush()


def _save_empty(local: pathlib.Path, dtypes: Params) -> None:
    """A checkpoint of arrays of one element; each process writes it to a folder of its own."""
    context = _context()
    saving = context.array.saving
    # No notes beside the arrays on how they lie: the arrays say that themselves.
    saving.array_metadata_store = None
    saving.enable_write_sharding_file = False
    if processes.index_and_count()[1] > 1:
        context.multiprocessing_options.primary_host = None  # none writes for another
        saving.use_replica_parallel = False
    with ocp.training.Checkpointer(str(local), context=context) as checkpointer:
        # On all devices of all processes, since Orbax takes no array that others do not know of.
        everywhere = jax.sharding.NamedSharding(
            jax.make_mesh((jax.device_count(),), ("all",)), jax.sharding.PartitionSpec()
        )
        empty = jax.jit(lambda: jax.tree.map(lambda d: jnp.zeros((1,), d), dtypes), out_shardings=everywhere)()
        checkpointer.save_checkpointables(0, {"params": empty}, force=True)


def _copy(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Copies small files to a local folder or a bucket's; the one that makes them a checkpoint comes last."""
    files = sorted((p for p in source.rglob("*") if p.is_file()), key=lambda p: p == source / _COMMITTED)
    for file in files:
        target = folder / file.relative_to(source).as_posix()
        if is_local(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
        else:
            retry(functools.partial(target.write_bytes, file.read_bytes()), f"{target}")

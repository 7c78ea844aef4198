"""Multi-process runs: detection, initialisation and synchronisation."""

import os
import pathlib

import jax
import numpy as np

# Environment variables that mark a multi-process run; `jax.distributed.initialize` detects the rest.
_SEVERAL = {
    "JAX_COORDINATOR_ADDRESS": lambda value: bool(value),  # set by the user, with JAX_NUM_PROCESSES, JAX_PROCESS_ID
    "TPU_WORKER_HOSTNAMES": lambda value: "," in value,  # hosts of a slice, on GKE
    "MEGASCALE_COORDINATOR_ADDRESS": lambda value: bool(value),  # several slices
    "SLURM_NTASKS": lambda value: value.isdigit() and int(value) > 1,
    "OMPI_COMM_WORLD_SIZE": lambda value: value.isdigit() and int(value) > 1,
}


def join() -> None:
    """Joins the other processes, if any; call before any other use of jax.

    A Cloud TPU VM finds its fellow workers through its metadata server, so there initialisation always runs.
    """
    if jax.distributed.is_initialized():
        return
    several = any(test(os.environ.get(name, "")) for name, test in _SEVERAL.items())
    if several or _on_tpu_vm():
        jax.distributed.initialize(  # jax detects arguments that are None
            coordinator_address=os.environ.get("JAX_COORDINATOR_ADDRESS"),
            num_processes=_number("JAX_NUM_PROCESSES"),
            process_id=_number("JAX_PROCESS_ID"),
        )


def _number(name: str) -> int | None:
    return int(os.environ[name]) if name in os.environ else None


def _on_tpu_vm() -> bool:
    """Returns whether TPU chips are attached and selected for use."""
    if os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu" or "TPU_SKIP_MDS_QUERY" in os.environ:
        return False
    return any(pathlib.Path("/dev").glob("accel[0-9]*")) and "TPU_WORKER_HOSTNAMES" not in os.environ


def index_and_count() -> tuple[int, int]:
    """Returns the process index and count, (0, 1) for a single process, without starting a backend."""
    return (jax.process_index(), jax.process_count()) if jax.distributed.is_initialized() else (0, 1)


def is_first() -> bool:
    """Returns whether this is the first process, which does all single-writer I/O."""
    return index_and_count()[0] == 0


def wait(what: str) -> None:
    """Barrier: returns when every process has called it with the same name `what`."""
    if index_and_count()[1] > 1:
        from jax.experimental import multihost_utils  # imported lazily: only multi-process runs need it

        multihost_utils.sync_global_devices(what)


def least(value: float) -> float:
    """Returns the minimum over processes; a collective that every process must call."""
    if index_and_count()[1] == 1:
        return value
    from jax.experimental import multihost_utils

    return float(np.min(multihost_utils.process_allgather(np.float64(value))))


def added(values: np.ndarray) -> np.ndarray:
    """Sums uint32 [N] over processes modulo 2 ** 32; a collective that every process must call."""
    if index_and_count()[1] == 1:
        return values
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(values)).sum(axis=0, dtype=np.uint32)


def agree(fine: bool) -> bool:
    """Returns whether `fine` is true in every process; a collective that every process must call."""
    return least(float(fine)) == 1.0


def text_from_first(text: str) -> str:
    """Returns the first process's `text` in every process; a collective that every process must call."""
    if index_and_count()[1] == 1:
        return text
    from jax.experimental import multihost_utils

    data = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    own = data if is_first() else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(own)).tobytes().decode()

"""Several processes that run one command together: found, started, and kept in step."""

import os
import pathlib

import jax
import numpy as np

# What tells that this process is one of several; `jax.distributed.initialize` finds the rest by itself.
_SEVERAL = {
    "JAX_COORDINATOR_ADDRESS": lambda value: bool(value),  # given by hand, with JAX_NUM_PROCESSES, JAX_PROCESS_ID
    "TPU_WORKER_HOSTNAMES": lambda value: "," in value,  # hosts of a slice, on GKE
    "MEGASCALE_COORDINATOR_ADDRESS": lambda value: bool(value),  # several slices
    "SLURM_NTASKS": lambda value: value.isdigit() and int(value) > 1,
    "OMPI_COMM_WORLD_SIZE": lambda value: value.isdigit() and int(value) > 1,
}


def start() -> None:
    """Joins the other processes, if there are any; call before any other use of jax.

    A Cloud TPU VM learns its fellow workers from its metadata server, so there it is always asked.
    """
    if jax.distributed.is_initialized():
        return
    several = any(test(os.environ.get(name, "")) for name, test in _SEVERAL.items())
    if several or _on_tpu_vm():
        jax.distributed.initialize(  # what is None it finds by itself
            coordinator_address=os.environ.get("JAX_COORDINATOR_ADDRESS"),
            num_processes=_number("JAX_NUM_PROCESSES"),
            process_id=_number("JAX_PROCESS_ID"),
        )


def _number(name: str) -> int | None:
    return int(os.environ[name]) if name in os.environ else None


def _on_tpu_vm() -> bool:
    """Whether TPU chips are attached and meant to be used."""
    if os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu" or "TPU_SKIP_MDS_QUERY" in os.environ:
        return False
    return any(pathlib.Path("/dev").glob("accel[0-9]*")) and "TPU_WORKER_HOSTNAMES" not in os.environ


def index_and_count() -> tuple[int, int]:
    """This process among those that run together; (0, 1) alone, without starting a backend."""
    return (jax.process_index(), jax.process_count()) if jax.distributed.is_initialized() else (0, 1)


def is_first() -> bool:
    """Whether this process is the one that writes what is written once."""
    return index_and_count()[0] == 0


def wait(what: str) -> None:
    """Returns when every process has come here; `what` names the place, the same for all."""
    if index_and_count()[1] > 1:
        from jax.experimental import multihost_utils  # here, since only several processes need it

        multihost_utils.sync_global_devices(what)


def least(value: float) -> float:
    """The smallest of the processes' values; all have to call."""
    if index_and_count()[1] == 1:
        return value
    from jax.experimental import multihost_utils

    return float(np.min(multihost_utils.process_allgather(np.float64(value))))


def added(values: np.ndarray) -> np.ndarray:
    """The processes' uint32 [N] added up modulo 2 ** 32; all have to call."""
    if index_and_count()[1] == 1:
        return values
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(values)).sum(axis=0, dtype=np.uint32)


def agree(fine: bool) -> bool:
    """Whether it is so in every process; all have to call."""
    return least(float(fine)) == 1.0

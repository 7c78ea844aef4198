"""Training state on disk, through Orbax: `params`, `opt_state` and `host` of a step, atomically.

The folder above holds `model/`: config.json and tokenizer files, so that a checkpoint says what it is by itself.
"""

import pathlib
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from solar_jax.model.llama import Params

FOLDER = "checkpoints"
MODEL_FOLDER = "model"


class CheckpointStore:
    """The checkpoints of one run, or of an arm of it, under `workdir/checkpoints`."""

    def __init__(self, workdir: pathlib.Path, keep: int = 1):
        # Both policies are given, since Orbax's own save at every chance and keep everything; when to save is the
        # training loop's decision. (Orbax's own types of its policies disagree, hence the two marks.)
        self._checkpointer = ocp.training.Checkpointer(
            str((workdir / FOLDER).resolve()),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # pyrefly: ignore
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),  # pyrefly: ignore
            cleanup_tmp_directories=True,
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

    def param_shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter that a step holds, by path, e.g. "layers/q_proj"."""
        stored = self._checkpointer.checkpointables_metadata(step).metadata["params"]
        return {"/".join(k.key for k in path): tuple(x.shape) for path, x in jax.tree.leaves_with_path(stored)}

    def restore_params(self, step: int, params: Params) -> Params:
        """The parameters of a step alone, laid out as the given abstract tree says."""
        return self._checkpointer.load_checkpointables(step, {"params": params})["params"]

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, *_: object) -> None:
        self._checkpointer.close()

"""Training state on disk, through Orbax: `params`, `opt_state` and `host` of a step, atomically.

A checkpoint is written while training continues, read back and compared with what the devices held; only then are
older ones removed. `model/` beside it holds config.json and tokenizer files, so that a checkpoint is self-describing.
"""

import concurrent.futures
import contextlib
import dataclasses
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from solar_jax.config import CheckpointConfig
from solar_jax.errors import UserError, phrase
from solar_jax.model.shapes import Params
from solar_jax.orbax_store import checksums, restore
from solar_jax.orbax_store.arrays import DATA_FILE_BYTES, layout_is_known
from solar_jax.orbax_store.layout import COMMITTED, FOLDER
from solar_jax.orbax_store.retention import kept
from solar_jax.parallel import processes
from solar_jax.storage import paths, retry
from solar_jax.storage.paths import is_local

# (shapes of a checkpoint's optimiser arrays by path) -> the abstract state to restore, and a function of what was
# restored and its step that gives the state which is wanted
OlderForm = Callable[[Mapping[str, tuple[int, ...]]], tuple[Any, Callable[[Any, int], Any]]]
PARTS = ("params", "opt_state")  # the arrays of a checkpoint; beside them is `host`, JSON
NONE_YET = "there is no earlier checkpoint"
_CHUNK_BYTES = 1 << 26


def saving_context() -> ocp.Context:
    """Orbax's options for saves: no compression, since weights hardly compress; files of 128 MiB, since each is
    buffered in memory until it is full (Orbax's default is 2 GB).
    """
    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.ocdbt_target_data_file_size = DATA_FILE_BYTES
    return context


def _chunks(key: tuple[Any, ...], value: Any) -> ocp.options.ArrayOptions.Saving.StorageOptions:
    """Chunks of at most one layer: an export or another mesh reads what it needs, not a full stack."""
    stacked = np.ndim(value) and any(getattr(k, "key", None) == "layers" for k in key)
    return ocp.options.ArrayOptions.Saving.StorageOptions(
        chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if stacked else ()
    )


class Damaged(Exception):
    """A damaged checkpoint; the message is a phrase that follows its name."""


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A save in flight: sums of what the devices held and of what the files hold, and non-finite parameters."""

    step: int
    checked: concurrent.futures.Future[tuple[checksums.Sums, checksums.Sums, list[str]]]


def _say(text: str) -> None:
    sys.stderr.write(f"warning: {text}\n")


class CheckpointStore:
    """The checkpoints of one run, or of an arm of it, under `workdir/checkpoints`.

    Every process calls the same methods in the same order, from its main thread.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        cfg: CheckpointConfig | None = None,
        losses: Callable[[], Mapping[int, float]] = dict,
        warn: Callable[[str], None] = _say,
    ):
        """Opens the folder; `losses` returns held-out losses by step, by which the best checkpoints are kept."""
        self._folder = (workdir / FOLDER).resolve() if is_local(workdir) else workdir / FOLDER
        self._cfg, self._losses, self._warn = cfg or CheckpointConfig(keep=1), losses, warn
        # Each cloud's client has its own exceptions.
        self._failures = (OSError, ValueError) if is_local(workdir) else (Exception,)
        self._whole: int | None = None  # the last step known to be complete, for when the bucket is unreachable
        context = saving_context()
        context.array.saving.scoped_storage_options_creator = _chunks
        # Both policies are set: Orbax's defaults save at every chance, and remove old checkpoints before the new one is
        # read back. (Orbax's type annotations of its policies disagree, hence the two marks.)
        self._checkpointer = ocp.training.Checkpointer(
            str(self._folder),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # pyrefly: ignore
            preservation_policy=ocp.training.preservation_policies.PreserveAll(),  # pyrefly: ignore
            cleanup_tmp_directories=True,
            context=context,
        )
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: _Pending | None = None
        self._bad: set[int] = set()  # steps with damaged checkpoints, which stay until they are overwritten

    def _steps(self) -> list[int]:
        return [c.step for c in self._checkpointer.checkpoints]

    def _good(self) -> list[int]:
        """Steps of the checkpoints that are not known to be damaged, ascending."""
        return [s for s in self._steps() if s not in self._bad and (self._folder / str(s) / COMMITTED).exists()]

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint that is complete and not known to be damaged."""
        pending = self._pending.step if self._pending else None
        good = paths.attempt(self._folder, self._good)
        return max((s for s in good if s != pending), default=None)

    # ---- Writing ------------------------------------------------------------------------------------------------

    def begin(self, step: int, **state: Any) -> None:
        """Starts saving `params`, `opt_state` and `host` (JSON) of a step; the state may be donated afterwards.

        An earlier save must have been settled.
        """
        try:
            response = self._checkpointer.save_checkpointables_async(
                step, state, force=True, overwrite=step in self._steps()
            )
        except self._failures as e:
            failed: concurrent.futures.Future[Any] = concurrent.futures.Future()
            failed.set_exception(e)
            self._pending = _Pending(step, failed)
            return
        views = checksums.views({part: state[part] for part in PARTS if part in state})
        self._pending = _Pending(step, self._pool.submit(self._check, step, response, views))

    def _check(
        self, step: int, response: Any, views: checksums.Views
    ) -> tuple[checksums.Sums, checksums.Sums, list[str]]:
        """Runs in a thread: sums what was on the devices, waits for the files, reads this process's share of them."""
        written, wrong = checksums.sums(views), checksums.not_finite(views)
        views.clear()
        response.result()
        index, count = processes.index_and_count()
        mine = checksums.stored_sums(self._folder / str(step), list(written)[index::count])
        return written, dict.fromkeys(written, 0) | mine, wrong

    @property
    def failed(self) -> bool:
        """True if the save in flight is known to have failed; always False on several processes, which must agree."""
        alone = processes.index_and_count()[1] == 1
        return alone and self._pending is not None and self._pending.checked.done() and (
            self._pending.checked.exception() is not None
        )  # fmt: skip

    def settle(self) -> str | None:
        """Waits until the save in flight is on disk and read back, then removes checkpoints that are no longer needed.

        Returns:
          The failure as a phrase, or None.

        Raises:
          UserError: a parameter is non-finite; that checkpoint is removed.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        problem, written, read, wrong = None, {}, {}, []
        try:
            written, read, wrong = pending.checked.result()
        except Exception as e:  # of many types, by what failed
            problem = phrase(e)
        if not processes.agree(problem is None):
            problem = problem or "another process failed"
        elif found := checksums.differing(checksums.together(written), checksums.together(read)):
            problem = f"read back, {found}"
        if problem is not None:
            with contextlib.suppress(Exception):
                self._checkpointer.wait()  # raises the failure here instead of at the next save
            self._discard(pending.step)
            return problem
        if not processes.agree(not wrong):
            self._discard(pending.step)
            where = wrong[0].removeprefix("params/") if wrong else "another process has it"
            raise UserError(
                f"{self._folder}: the parameters after step {pending.step} hold a NaN or an infinity ({where}); "
                f"{self.last_good()}."
            )
        self._bad.discard(pending.step)
        self._whole = pending.step
        total = checksums.together(written)
        if processes.is_first():
            self._seal(pending.step, total)
        try:
            self._prune(pending.step)
        except self._failures as e:
            self._warn(f"{self._folder}: old checkpoints cannot be listed: {phrase(e)}")
        return None

    def _seal(self, step: int, total: checksums.Sums) -> None:
        try:
            checksums.write_seal(self._folder / str(step), total)
        except self._failures as e:
            self._warn(f"{self._folder / str(step)}: is complete, but {checksums.SEAL} cannot be written: {phrase(e)}")

    def save(self, step: int, **state: Any) -> None:
        """Writes a step and reads it back, with retries and growing waits.

        Raises:
          UserError: every try failed, or a parameter is non-finite.
        """
        problem = None
        for attempt in range(retry.TRIES):
            if attempt:
                self._warn(f"{self._folder / str(step)}: could not be saved ({problem}); trying again")
                time.sleep(retry.FIRST_WAIT * 2 ** (attempt - 1))
            self.begin(step, **state)
            if (problem := self.settle()) is None:
                return
        raise UserError(
            f"{self._folder / str(step)}: could not be saved in {retry.TRIES} tries ({problem}); {self.goes_on()}."
        )

    def last_good(self) -> str:
        """The run's last good checkpoint, as a phrase."""
        try:
            step = max(self._good(), default=None)
        except self._failures:
            step = self._whole
        return NONE_YET if step is None else f"the last good checkpoint is that of step {step}"

    def goes_on(self) -> str:
        """How a run that ends now can be resumed, as a phrase."""
        good = self.last_good()
        return f"{good}, and the same command {'starts over' if good == NONE_YET else 'resumes from there'}"

    def _prune(self, newest_step: int) -> None:
        good = [s for s in self._good() if s <= newest_step]
        keep = kept(good, self._cfg, self._losses())
        for step in self._steps():
            if step < newest_step and step not in keep and step not in self._bad:
                self._remove(step)

    def _remove(self, step: int) -> None:
        """Removes a checkpoint, its commit marker first: an interrupted removal is not taken for a checkpoint."""
        try:
            if processes.is_first():
                marker = self._folder / str(step) / COMMITTED
                paths.attempt(marker, lambda: marker.unlink(missing_ok=True))
            self._checkpointer.delete(step, missing_ok=True)
        except self._failures as e:
            self._warn(f"{self._folder / str(step)}: is no longer needed and cannot be removed: {phrase(e)}")

    def _discard(self, step: int) -> None:
        """Removes what a failed save left, under its final name and its temporary one."""
        if not is_local(self._folder) or (self._folder / str(step)).exists():
            self._remove(step)
        if processes.is_first() and is_local(self._folder):
            for left in self._folder.glob(f"{step}.*"):
                shutil.rmtree(left, ignore_errors=True)

    # ---- Reading ------------------------------------------------------------------------------------------------

    def restore_newest(
        self, state: dict[str, Any], last: int = 0, older: OlderForm | None = None
    ) -> dict[str, Any] | None:
        """Restores the newest good checkpoint; damaged ones are skipped with a warning.

        Args:
          state: abstract trees of `params` and `opt_state`, with shapes, shardings and dtypes; the last two may differ
            from those that were saved.
          last: for a checkpoint of this step, only `params` is restored.
          older: finds the form in which a checkpoint holds `opt_state`, where it may differ.

        Returns:
          {"params", "opt_state", "host"}, the first two laid out as in `state`; None without any checkpoint.

        Raises:
          UserError: there are checkpoints, and none is good.
        """
        steps = sorted(self._steps(), reverse=True)
        for step in steps:
            parts = {"params": state["params"]} if step == last else state
            try:
                return self._load(step, parts, older)
            except Damaged as e:
                self._bad.add(step)
                self._warn(f"{self._folder / str(step)}: skipped: {e}")
        if steps:
            raise UserError(
                f"{self._folder}: none of the checkpoints ({', '.join(map(str, steps))}) can be used; remove them to "
                "start over."
            )
        return None

    def restore(self, step: int, params: Params, opt_state: Any) -> tuple[Params, Any, dict[str, Any]]:
        """Restores the state of a step, laid out as the given abstract trees (shapes with shardings).

        Raises:
          Damaged: it differs from what was saved.
        """
        found = self._load(step, {"params": params, "opt_state": opt_state})
        return found["params"], found["opt_state"], found["host"]

    def restore_params(self, step: int, params: Params) -> Params:
        """Restores only the parameters of a step, laid out as the given abstract tree.

        Raises:
          Damaged: they differ from what was saved.
        """
        return self._load(step, {"params": params})["params"]

    def _load(self, step: int, state: dict[str, Any], older: OlderForm | None = None) -> dict[str, Any]:
        folder, finish, known = self._folder / str(step), None, True
        found, sums, host, problem, seal = {}, {}, {}, None, None
        try:
            problem = checksums.problem(folder)
            if problem is None and (known := all(layout_is_known(folder / part) for part in state)):
                stored = checksums.stored_shapes(folder, state)
                if older is not None and "opt_state" in state:
                    own = {name.partition("/")[2]: shape for name, shape in stored.items() if name.startswith("opt_")}
                    form, finish = older(own)
                    state = state | {"opt_state": form}
                problem = checksums.misshapen(stored, state)
            seal = checksums.read_seal(folder)
        except (*self._failures, KeyError) as e:
            problem = f"it cannot be read ({phrase(e)})"
        self._agree(problem)
        try:
            if (folder / "host").exists():
                host = self._checkpointer.load_checkpointables(step, {"host": None})
        except (*self._failures, KeyError) as e:
            problem = f"it cannot be read ({phrase(e)})"
        self._agree(problem)
        try:
            found, sums = self._read(step, state, known)
        except (*self._failures, KeyError) as e:
            problem = f"it cannot be read ({phrase(e)})"
        self._agree(problem)
        if seal is not None:
            self._agree(checksums.differing(seal["sums"], checksums.together(sums)))
        if finish is not None:
            found["opt_state"] = finish(found["opt_state"], step)
        return found | host

    def _read(self, step: int, state: dict[str, Any], known: bool) -> tuple[dict[str, Any], checksums.Sums]:
        """Reads the arrays of a step, and sums this process's shares of what is stored.

        They are read in blocks, or by Orbax where the config says so or the layout is not `known` to `arrays`. With
        Orbax, every byte is read once for the arrays and once for the sums.
        """
        folder = self._folder / str(step)
        if known and self._cfg.restore == "blocks":
            return restore.restore(folder, state)
        if not known:
            self._warn(f"{folder}: is not zarr version 3 in OCDBT; Orbax restores it")
        found = self._checkpointer.load_checkpointables(step, state)
        if not known:  # nor is it one of ours, which have sums
            return found, {}
        index, count = processes.index_and_count()
        names = [checksums.name_of(path) for path, _ in jax.tree.leaves_with_path(state)]
        mine = checksums.stored_sums(folder, names[index::count])
        return found, dict.fromkeys(names, 0) | mine

    @staticmethod
    def _agree(problem: str | None) -> None:
        """Raises Damaged in every process if one has a problem."""
        if not processes.agree(problem is None):
            raise Damaged(problem or "another process cannot read it")

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, *_: object) -> None:
        """Finishes the save in flight; a single process also reads it back. (Several may not be there to agree.)"""
        if processes.index_and_count()[1] == 1 and (problem := self.settle()):
            self._warn(f"{self._folder}: the last save failed: {problem}")
        self._pool.shutdown(wait=True)
        try:
            self._checkpointer.close()
        except self._failures as e:
            self._warn(f"{self._folder}: the last save failed: {phrase(e)}")

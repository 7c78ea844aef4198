"""Training state on disk, through Orbax: `params`, `opt_state` and `host` of a step, atomically.

A checkpoint is written while training goes on, read back, compared with what the devices held, and only then older
ones are removed. The folder above holds `model/`: config.json and tokenizer files, so that a checkpoint says what it
is by itself.
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
    """Orbax's options for saves: no compression, since weights are nearly noise to it; files that are written as
    soon as they are full, since one of 2 GB, which is Orbax's own size, waits in memory until its last byte is there.
    """
    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.ocdbt_target_data_file_size = DATA_FILE_BYTES
    return context


def _chunks(key: tuple[Any, ...], value: Any) -> ocp.options.ArrayOptions.Saving.StorageOptions:
    """Chunks of a layer and less: an export or another mesh reads what it needs and not a whole stack."""
    stacked = np.ndim(value) and any(getattr(k, "key", None) == "layers" for k in key)
    return ocp.options.ArrayOptions.Saving.StorageOptions(
        chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if stacked else ()
    )


class Damaged(Exception):
    """What is wrong with a checkpoint, as a phrase that goes on after its name."""


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A save under way: of a process, what the devices held and what the files hold, and what is not finite."""

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
        """`losses` gives the held-out losses by step that tell which checkpoints are the best."""
        self._folder = (workdir / FOLDER).resolve() if is_local(workdir) else workdir / FOLDER
        self._cfg, self._losses, self._warn = cfg or CheckpointConfig(keep=1), losses, warn
        # Each cloud's client has exceptions of its own.
        self._failures = (OSError, ValueError) if is_local(workdir) else (Exception,)
        self._whole: int | None = None  # the last step known to be whole, for when the bucket cannot be asked
        context = saving_context()
        context.array.saving.scoped_storage_options_creator = _chunks
        # Both policies are given, since Orbax's own save at every chance; when to save is the training loop's
        # decision. Nothing is removed by Orbax, which would do so before the new checkpoint was read back. (Orbax's
        # own types of its policies disagree, hence the two marks.)
        self._checkpointer = ocp.training.Checkpointer(
            str(self._folder),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # pyrefly: ignore
            preservation_policy=ocp.training.preservation_policies.PreserveAll(),  # pyrefly: ignore
            cleanup_tmp_directories=True,
            context=context,
        )
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: _Pending | None = None
        self._bad: set[int] = set()  # steps whose checkpoints were found damaged; they stay until they are replaced

    def _steps(self) -> list[int]:
        return [c.step for c in self._checkpointer.checkpoints]

    def _good(self) -> list[int]:
        """Steps, ascending, of what is not known to be damaged."""
        return [s for s in self._steps() if s not in self._bad and (self._folder / str(s) / COMMITTED).exists()]

    @property
    def latest_step(self) -> int | None:
        """Of the newest checkpoint that is not known to be damaged and not under way."""
        pending = self._pending.step if self._pending else None
        good = paths.attempt(self._folder, self._good)
        return max((s for s in good if s != pending), default=None)

    # ---- Writing ------------------------------------------------------------------------------------------------

    def begin(self, step: int, **state: Any) -> None:
        """Begins to save `params`, `opt_state` and `host` (JSON) of a step; the state's memory may be given away then.

        One that was begun before has to be settled.
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
        """In a thread: adds up what was on the devices, waits for the files and reads this process's share of them."""
        written, wrong = checksums.sums(views), checksums.not_finite(views)
        views.clear()
        response.result()
        index, count = processes.index_and_count()
        mine = checksums.stored_sums(self._folder / str(step), list(written)[index::count])
        return written, dict.fromkeys(written, 0) | mine, wrong

    @property
    def failed(self) -> bool:
        """Whether the save under way is known to have failed; False on several processes, of which one may not know."""
        alone = processes.index_and_count()[1] == 1
        return alone and self._pending is not None and self._pending.checked.done() and (
            self._pending.checked.exception() is not None
        )  # fmt: skip

    def settle(self) -> str | None:
        """Waits until the save under way is on disk and read back, and removes what need not be kept any longer.

        Returns:
          What went wrong, as a phrase, or None.

        Raises:
          UserError: a parameter is not finite; that checkpoint is removed.
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
                self._checkpointer.wait()  # which raises what went wrong again, instead of the next save
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
            self._warn(f"{self._folder}: what is not needed any more cannot be looked for: {phrase(e)}")
        return None

    def _seal(self, step: int, total: checksums.Sums) -> None:
        try:
            checksums.write_seal(self._folder / str(step), total)
        except self._failures as e:
            self._warn(f"{self._folder / str(step)}: is whole, but {checksums.SEAL} cannot be written: {phrase(e)}")

    def save(self, step: int, **state: Any) -> None:
        """Writes a step, reads it back and returns when that is done; tried again a few times, with growing waits.

        Raises:
          UserError: it failed every time, or a parameter is not finite.
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
        """Of the run, as a phrase."""
        try:
            step = max(self._good(), default=None)
        except self._failures:
            step = self._whole
        return NONE_YET if step is None else f"the last good checkpoint is that of step {step}"

    def goes_on(self) -> str:
        """What a run that ends here can still do, as a phrase."""
        good = self.last_good()
        return f"{good}, and the same command {'begins again' if good == NONE_YET else 'goes on from there'}"

    def _prune(self, newest_step: int) -> None:
        good = [s for s in self._good() if s <= newest_step]
        keep = kept(good, self._cfg, self._losses())
        for step in self._steps():
            if step < newest_step and step not in keep and step not in self._bad:
                self._remove(step)

    def _remove(self, step: int) -> None:
        """Removes a checkpoint; what an interruption leaves of it has no marker, so that nothing takes it for whole."""
        try:
            if processes.is_first():
                marker = self._folder / str(step) / COMMITTED
                paths.attempt(marker, lambda: marker.unlink(missing_ok=True))
            self._checkpointer.delete(step, missing_ok=True)
        except self._failures as e:
            self._warn(f"{self._folder / str(step)}: is not needed any more and cannot be removed: {phrase(e)}")

    def _discard(self, step: int) -> None:
        """Removes what a failed save left, under its own name and under that of one that is not whole yet."""
        if not is_local(self._folder) or (self._folder / str(step)).exists():
            self._remove(step)
        if processes.is_first() and is_local(self._folder):
            for left in self._folder.glob(f"{step}.*"):
                shutil.rmtree(left, ignore_errors=True)

    # ---- Reading ------------------------------------------------------------------------------------------------

    def restore_newest(
        self, state: dict[str, Any], last: int = 0, older: OlderForm | None = None
    ) -> dict[str, Any] | None:
        """The newest good checkpoint; each that is damaged is told and left out.

        Args:
          state: abstract trees of `params` and `opt_state` (shapes with shardings and dtypes, which may be others
            than those that were saved).
          last: of a checkpoint of this step `params` alone is restored.
          older: finds the form in which a checkpoint holds `opt_state`, where that may be another one.

        Returns:
          {"params", "opt_state", "host"}, the first two laid out as `state` says; None where there is none at all.

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
                self._warn(f"{self._folder / str(step)}: is left out: {e}")
        if steps:
            raise UserError(
                f"{self._folder}: none of the checkpoints ({', '.join(map(str, steps))}) can be used; remove them to "
                "begin again."
            )
        return None

    def restore(self, step: int, params: Params, opt_state: Any) -> tuple[Params, Any, dict[str, Any]]:
        """The state of a step, laid out as the given abstract trees (shapes with shardings) say.

        Raises:
          Damaged: it is not what was saved.
        """
        found = self._load(step, {"params": params, "opt_state": opt_state})
        return found["params"], found["opt_state"], found["host"]

    def restore_params(self, step: int, params: Params) -> Params:
        """The parameters of a step alone, laid out as the given abstract tree says.

        Raises:
          Damaged: they are not what was saved.
        """
        return self._load(step, {"params": params})["params"]

    def _load(self, step: int, state: dict[str, Any], older: OlderForm | None = None) -> dict[str, Any]:
        folder, finish = self._folder / str(step), None
        if older is not None and "opt_state" in state:
            stored, finish = older(checksums.shapes_of(folder, "opt_state"))
            state = state | {"opt_state": stored}
        found, sums, host, problem, seal = {}, {}, {}, None, None
        try:
            problem = checksums.problem(folder, state)
            seal = checksums.read_seal(folder)
        except self._failures as e:
            problem = f"it cannot be read ({phrase(e)})"
        self._agree(problem)
        try:
            if (folder / "host").exists():
                host = self._checkpointer.load_checkpointables(step, {"host": None})
        except (*self._failures, KeyError) as e:
            problem = f"it cannot be read ({phrase(e)})"
        self._agree(problem)
        try:
            found, sums = self._read(step, state)
        except (*self._failures, KeyError) as e:
            problem = f"it cannot be read ({phrase(e)})"
        self._agree(problem)
        if seal is not None:
            self._agree(checksums.differing(seal["sums"], checksums.together(sums)))
        if finish is not None:
            found["opt_state"] = finish(found["opt_state"], step)
        return found | host

    def _read(self, step: int, state: dict[str, Any]) -> tuple[dict[str, Any], checksums.Sums]:
        """The arrays of a step, and this process's shares of the sums of what is stored.

        They are read in blocks, or by Orbax: where the config says so, and where the layout is not the one that
        `arrays` reads. Orbax reads every byte once for the arrays and once for the sums.
        """
        folder = self._folder / str(step)
        known = all(layout_is_known(folder / part) for part in state)
        if known and self._cfg.restore == "blocks":
            return restore.restore(folder, state)
        if not known:
            self._warn(f"{folder}: is not zarr version 3 in OCDBT, so that Orbax restores it")
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
        """What is under way is finished; alone, it is also read back. (Others may not be there to agree on it.)"""
        if processes.index_and_count()[1] == 1 and (problem := self.settle()):
            self._warn(f"{self._folder}: the last save failed: {problem}")
        self._pool.shutdown(wait=True)
        try:
            self._checkpointer.close()
        except self._failures as e:
            self._warn(f"{self._folder}: the last save failed: {phrase(e)}")

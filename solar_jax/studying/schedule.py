"""Runs of a study side by side on groups of devices, with progress and the time left."""

import concurrent.futures
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Sequence

import jax

from solar_jax.cli.progress import duration
from solar_jax.errors import UserError, phrase
from solar_jax.model.flops import flops_per_token
from solar_jax.studying.arms import PlannedArm, PlannedRun, RunResult, evaluation_steps
from solar_jax.studying.engine import Bench, StudyPrograms, train_arm_of_study
from solar_jax.studying.store import StudyFolder


def device_groups(devices: Sequence[jax.Device], devices_per_arm: int) -> list[tuple[jax.Device, ...]]:
    """Splits devices into groups of equal size, each of which runs one arm at a time; those left over are not used.

    Args:
      devices: all that there are.
      devices_per_arm: of a group; 0: one group of all.

    Raises:
      UserError: a group would need more devices than there are.
    """
    size = devices_per_arm or len(devices)
    if size > len(devices):
        raise UserError(f"config.devices_per_arm must be at most the {len(devices)} device(s) present, found {size}.")
    return [tuple(devices[i : i + size]) for i in range(0, len(devices) - size + 1, size)]


def work(bench: Bench, arm: PlannedArm) -> float:
    """FLOPs of a run of an arm with its evaluations, whose forward pass costs a third of training all of the model."""
    forward = flops_per_token(arm.cfg, bench.study.run.data.sequence_length) / 3
    evaluations = len(evaluation_steps(bench.study, arm.steps))
    return arm.flops + evaluations * forward * len(bench.documents.rows) * bench.documents.rows.length


@dataclasses.dataclass
class Meter:
    """FLOPs done and to do, from which the time left follows."""

    to_do: float = 0.0
    done: float = 0.0
    began: float = dataclasses.field(default_factory=time.monotonic)

    def left(self) -> str:
        """How long the planned runs still take at the speed so far."""
        if not self.done:
            return "unknown"
        return duration((self.to_do - self.done) * (time.monotonic() - self.began) / self.done)


class Schedule:
    """Runs what is planned, each run on the next group of devices that is free.

    A run that fails is recorded and the others go on.
    """

    def __init__(self, bench: Bench, store: StudyFolder, groups: Sequence[tuple[jax.Device, ...]], say: Callable):
        self._bench, self._store, self._say = bench, store, say
        self._programs = [StudyPrograms(group) for group in groups]
        self._stop, self._lock = threading.Event(), threading.Lock()
        self.meter = Meter()

    @property
    def programs(self) -> list[StudyPrograms]:
        """Compiled steps of each group."""
        return self._programs

    def run(self, runs: Sequence[PlannedRun]) -> dict[PlannedRun, RunResult]:
        """Runs what has no result yet.

        Returns:
          The results of all runs that have one; a run that failed has none.

        Raises:
          KeyboardInterrupt: Ctrl-C; runs that had not finished begin anew at the next start.
        """
        found = {run: result for run in runs if (result := self._store.result(run)) is not None}
        waiting: queue.SimpleQueue[PlannedRun] = queue.SimpleQueue()
        missing = [run for run in runs if run not in found]
        for run in missing:
            waiting.put(run)
            self.meter.to_do += work(self._bench, run.arm)
        left, total = len(missing), len(missing)

        def take(programs: StudyPrograms) -> None:
            nonlocal left
            while not self._stop.is_set():
                try:
                    run = waiting.get_nowait()
                except queue.Empty:
                    return
                result = self._one(run, programs, f"[{total - left + 1}/{total}]")
                with self._lock:
                    left -= 1
                    if result is not None:
                        found[run] = result

        with concurrent.futures.ThreadPoolExecutor(len(self._programs), "arm") as pool:
            taken = [pool.submit(take, programs) for programs in self._programs]
            try:
                for future in concurrent.futures.as_completed(taken):
                    future.result()
            except BaseException:
                self._stop.set()
                raise
        return found

    def _one(self, run: PlannedRun, programs: StudyPrograms, place: str) -> RunResult | None:
        """Runs one arm and records how it ended."""
        begin, whole = time.monotonic(), work(self._bench, run.arm)
        done, last = 0.0, evaluation_steps(self._bench.study, run.arm.steps)

        def tell(step: int, loss: float) -> None:
            nonlocal done
            share = (last.index(step) + 1) / len(last) if not run.arm.steps else step / run.arm.steps
            with self._lock:
                self.meter.done += share * whole - done
            done = share * whole
            self._say(f"{place} {run}: step {step}/{run.arm.steps}, validation {loss:.4f}; all: {self.meter.left()}")

        try:
            result = train_arm_of_study(self._bench, run, programs, self._stop, tell)
        except Exception as e:  # whatever it is, the other arms do not depend on it
            sentence = str(e) if isinstance(e, UserError) else f"{type(e).__name__}: {phrase(e)}"
            with self._lock:
                self.meter.to_do -= whole - done
            self._store.fail(run, sentence)
            self._say(f"{place} {run}: failed: {sentence}")
            return None
        seconds = time.monotonic() - begin
        self._store.save(run, result, seconds)
        self._say(f"{place} {run}: done in {duration(seconds)}; all: {self.meter.left()} left")
        return result

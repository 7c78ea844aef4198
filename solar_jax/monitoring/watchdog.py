"""Watchdog thread that detects stalled steps and dumps the stacks of all threads."""

import faulthandler
import pathlib
import threading
import time
from collections.abc import Callable
from types import TracebackType

from solar_jax.cli.progress import duration
from solar_jax.parallel import processes

FACTOR = 10  # a step may take this many times the median


class Watchdog:
    """Dumps all Python stacks once per stall, and never ends the run.

    Every process writes its own file, since the one that hangs is rarely the first.
    """

    def __init__(self, folder: pathlib.Path, name: str, seconds: float, tell: Callable[[str], None]):
        """Sets `seconds`, the minimum time without a step that counts as a stall; 0 disables the watchdog."""
        self._folder, self._name, self._seconds, self._tell = folder, name, seconds, tell
        self._limit, self._step, self._last, self._told = seconds, 0, time.monotonic(), False
        self._changed, self._stopped = threading.Condition(), False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, step: int, median: float) -> None:
        """Reports progress: `step` is the last finished step, `median` the median step time in seconds."""
        with self._changed:
            stalled, silent = self._told, time.monotonic() - self._last
            self._limit, self._step = max(self._seconds, FACTOR * median), step
            self._last, self._told = time.monotonic(), False
            self._changed.notify()
        if stalled:
            self._tell(f"{self._name}: steps resumed after {duration(silent)}")

    def _watch(self) -> None:
        with self._changed:
            while not self._stopped:
                left = self._last + self._limit - time.monotonic()
                if left > 0 or self._told:
                    self._changed.wait(None if self._told else left)
                    continue
                self._told = True
                self._dump()

    def _dump(self) -> None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        file = self._folder / f"{self._name}_step{self._step}_process{processes.index_and_count()[0]}_{stamp}.txt"
        silent = duration(time.monotonic() - self._last)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(file, "w") as f:
                f.write(f"No step of {self._name} finished for {silent}; last step: {self._step}. All threads:\n\n")
                f.flush()
                faulthandler.dump_traceback(f, all_threads=True)
            self._tell(f"{self._name}: no step finished for {silent}; stack traces of all threads are in {file}")
        except OSError as e:
            self._tell(f"{self._name}: no step finished for {silent}; {file} cannot be written: {e.strerror}")

    def __enter__(self) -> "Watchdog":
        self._last = time.monotonic()
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

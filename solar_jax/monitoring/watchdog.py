"""A thread that notices when no step finishes, and writes down what every thread was doing."""

import faulthandler
import pathlib
import threading
import time
from collections.abc import Callable
from types import TracebackType

from solar_jax.cli.progress import duration
from solar_jax.parallel import processes

FACTOR = 10  # a step may take so many times the median one


class Watchdog:
    """Dumps all Python stacks once a stall, and ends nothing.

    Every process writes its own file, since the one that hangs is seldom the first.
    """

    def __init__(self, folder: pathlib.Path, name: str, seconds: float, tell: Callable[[str], None]):
        """`seconds` is the least time without a step that is a stall; 0: nothing is watched."""
        self._folder, self._name, self._seconds, self._tell = folder, name, seconds, tell
        self._limit, self._step, self._last, self._told = seconds, 0, time.monotonic(), False
        self._changed, self._stopped = threading.Condition(), False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, step: int, median: float) -> None:
        """Something finished: `step` is the last step that did, `median` what one takes in seconds."""
        with self._changed:
            stalled, silent = self._told, time.monotonic() - self._last
            self._limit, self._step = max(self._seconds, FACTOR * median), step
            self._last, self._told = time.monotonic(), False
            self._changed.notify()
        if stalled:
            self._tell(f"{self._name}: going on after {duration(silent)}")

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
                f.write(f"No step of {self._name} finished for {silent}, the last was {self._step}. All threads:\n\n")
                f.flush()
                faulthandler.dump_traceback(f, all_threads=True)
            self._tell(f"{self._name}: no step finished for {silent}; the stacks of all threads are in {file}")
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

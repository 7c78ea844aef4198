"""Profiling windows of a few steps with jax's profiler: one set in the config, and one on every SIGUSR1.

Profiles open in xprof or TensorBoard's profile plugin. With several processes, the first records its own devices.
"""

import contextlib
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax

from solar_jax.parallel import processes

_asked = threading.Event()


@contextlib.contextmanager
def listen_for_profiles() -> Iterator[None]:
    """Makes SIGUSR1 request a window instead of ending the process; works in the main thread only."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGUSR1"):
        yield
        return
    _asked.clear()
    before = signal.signal(signal.SIGUSR1, lambda *_: _asked.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


class Profiler:
    """Profiling windows of one arm. A profiler failure is reported and never stops the run."""

    def __init__(self, folder: pathlib.Path, arm: str, start: int, steps: int, say: Callable[[str], None]):
        """Sets `start`, first step of the configured window (0 for none), and `steps`, length of every window."""
        self._folder, self._arm, self._start, self._steps, self._say = folder, arm, start, steps, say
        self._first = self._last = 0  # first and last step of the open window

    def opens(self, step: int) -> bool:
        """Returns whether a window begins before this step."""
        return processes.is_first() and not self._last and (step == self._start or _asked.is_set())

    def closes(self, step: int) -> bool:
        """Returns whether the open window ends after this step."""
        return 0 < self._last <= step

    def begin(self, step: int) -> None:
        _asked.clear()
        self._first, self._last = step, step + self._steps - 1
        try:
            jax.profiler.start_trace(self._where())
        except Exception as e:
            self._failed(e)

    def end(self) -> None:
        """Closes the window if one is open, even if some of its steps are missing."""
        if not self._last:
            return
        try:
            jax.profiler.stop_trace()
            self._say(f"{self._arm}: profile of steps {self._first} to {self._last} in {self._where()}")
        except Exception as e:
            self._failed(e)
        self._last = 0

    def _where(self) -> pathlib.Path:
        return self._folder / f"{self._arm}_{self._first:06d}"

    def _failed(self, error: Exception) -> None:
        self._last = 0
        self._say(f"{self._arm}: profiling of step {self._first} failed: {error}")

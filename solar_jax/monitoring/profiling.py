"""Windows of a few steps under jax's profiler: one that the config asks for, and one whenever SIGUSR1 comes.

What is written is for xprof or TensorBoard's profile plugin. On several processes the first records its own devices.
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
def listening() -> Iterator[None]:
    """Makes SIGUSR1, which would end the process, ask for a window; only the main thread can."""
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
    """The windows of one arm. A profile that fails is told and is not worth a run."""

    def __init__(self, folder: pathlib.Path, arm: str, start: int, steps: int, say: Callable[[str], None]):
        """`start`: first step of a window, 0 for none; `steps`: of every window."""
        self._folder, self._arm, self._start, self._steps, self._say = folder, arm, start, steps, say
        self._first = self._last = 0  # steps of the window that is open

    def opens(self, step: int) -> bool:
        """Whether a window begins before this step."""
        return processes.is_first() and not self._last and (step == self._start or _asked.is_set())

    def closes(self, step: int) -> bool:
        """Whether the open window ends after this step."""
        return 0 < self._last <= step

    def begin(self, step: int) -> None:
        _asked.clear()
        self._first, self._last = step, step + self._steps - 1
        try:
            jax.profiler.start_trace(self._where())
        except Exception as e:
            self._failed(e)

    def end(self) -> None:
        """Closes the window, if one is open; some of its steps may be missing."""
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
        self._say(f"{self._arm}: no profile of step {self._first}: {error}")

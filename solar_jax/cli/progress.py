"""Progress of work that takes minutes: bars of bytes or items with ETA, and a timer for work of unknown size."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

import tqdm


@contextlib.contextmanager
def byte_bar(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Shows a bar on standard error; yields a thread-safe function that takes the bytes done since its last call."""
    live = sys.stderr.isatty()
    lock = threading.Lock()
    with tqdm.tqdm(
        total=total, desc=what, unit="B", unit_scale=True, dynamic_ncols=live, mininterval=0.2 if live else 15,
        maxinterval=60, disable=None if live else total < 1e9,
    ) as bar:  # fmt: skip

        def update(n: int) -> None:
            with lock:
                bar.update(n)

        yield update


@contextlib.contextmanager
def count_bar(total: int, done: int, what: str) -> Iterator[Callable[[int, str], None]]:
    """Shows a bar with the time left on standard error; yields a function of what was done since, and a note."""
    live = sys.stderr.isatty()
    with tqdm.tqdm(
        total=total, initial=done, desc=what, unit="", dynamic_ncols=live, mininterval=0.2 if live else 15,
        maxinterval=60,
    ) as bar:  # fmt: skip

        def update(n: int, note: str) -> None:
            bar.set_postfix_str(note, refresh=False)
            bar.update(n)

        yield update


@contextlib.contextmanager
def ticking(what: str) -> Iterator[None]:
    """Prints on standard error how long `what` has taken so far."""
    live, over, begin = sys.stderr.isatty(), threading.Event(), time.monotonic()

    def tick() -> None:
        while not over.wait(1 if live else 60):
            line = f"{what}: {time.monotonic() - begin:.0f} s"
            sys.stderr.write(f"\r{line}" if live else f"{line}\n")
            sys.stderr.flush()
        sys.stderr.write("\r\033[K" if live else "")

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def duration(seconds: float) -> str:
    """Formats a duration: "48 s", "3 min 20 s", "2 h 05 min", "3 d 04 h"."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    if s < 86400:
        return f"{s // 3600} h {s % 3600 // 60:02d} min"
    return f"{s // 86400} d {s % 86400 // 3600:02d} h"

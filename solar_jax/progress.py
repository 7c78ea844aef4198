"""A bar in bytes with speed and time left, for work that takes minutes."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator

import tqdm


@contextlib.contextmanager
def byte_bar(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """A function to tell the bytes done since the last call, from any thread; on standard error."""
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

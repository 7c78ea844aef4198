"""Stop requests: Ctrl-C, and SIGTERM, which is also how a machine announces that it is about to be preempted.

A single process records the signal and stops after the current step. With several, jax notifies all others that one
received it and gives all of them the same step to stop at, which every process must query after every step.
"""

import contextlib
import itertools
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from solar_jax.errors import Interrupted
from solar_jax.parallel import processes

_told = threading.Event()
_in_steps = threading.Event()
_points = itertools.count(1)  # sync points where all processes queried, over all arms of a run


@contextlib.contextmanager
def listen_for_preemption() -> Iterator[None]:
    """Makes SIGTERM and a first Ctrl-C stop a run cleanly, a second Ctrl-C at once; only the main thread can.

    Several processes use jax's own handler, for SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread() or processes.index_and_count()[1] > 1:
        yield
        return
    _told.clear()
    before = {number: signal.signal(number, _handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _handle(number: int, _: Any) -> None:
    by_key = number == signal.SIGINT
    if by_key and (_told.is_set() or not _in_steps.is_set()):
        raise KeyboardInterrupt
    _told.set()
    if not _in_steps.is_set():
        raise Interrupted("stopped by SIGTERM outside of training steps")
    if by_key:
        sys.stderr.write("\nstopping after this step, which is saved; Ctrl-C again quits at once\n")


@contextlib.contextmanager
def in_steps() -> Iterator[None]:
    """Wraps training steps, whose end SIGTERM has to wait for."""
    _in_steps.set()
    try:
        yield
    finally:
        _in_steps.clear()


def asked() -> bool:
    """Returns whether to save and stop after this step; every process must call it after every step."""
    if processes.index_and_count()[1] == 1:
        return _told.is_set()
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(next(_points))

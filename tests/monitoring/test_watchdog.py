"""A stall leaves the stacks of all threads, once, and ends nothing."""

import pathlib
import threading
import time

import pytest

from solar_jax.monitoring.watchdog import FACTOR, Watchdog


def wait_for(condition, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    assert condition()


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("*")) if folder.exists() else []


def test_a_stall_is_told_once_with_the_stack_of_every_thread(tmp_path):
    told: list[str] = []
    leave = threading.Event()

    def hangs_here():
        leave.wait(60)

    thread = threading.Thread(target=hangs_here)
    thread.start()
    try:
        with Watchdog(tmp_path / "stalls", "healed", 0.05, told.append) as watchdog:
            watchdog.beat(7, 0.0)
            wait_for(lambda: told)
            time.sleep(0.3)  # six times as long: no second file
            assert len(files(tmp_path / "stalls")) == len(told) == 1
            watchdog.beat(8, 100.0)  # and as it goes on, at a pace that a pause of this test does not outlast
            assert "resumed after" in told[1]
    finally:
        leave.set()
        thread.join()
    (file,) = files(tmp_path / "stalls")
    assert file.name.startswith("healed_step7_process0_")
    assert str(file) in told[0]
    text = file.read_text()
    assert "hangs_here" in text
    assert "test_a_stall_is_told_once" in text


def test_slow_steps_are_no_stall(tmp_path):
    told: list[str] = []
    with Watchdog(tmp_path / "stalls", "healed", 0.02, told.append) as watchdog:
        watchdog.beat(1, 60.0)
        time.sleep(0.2)  # ten times the least, far less than FACTOR times the median
    assert FACTOR >= 2
    assert told == files(tmp_path / "stalls") == []


def test_zero_seconds_watch_nothing(tmp_path):
    before = threading.active_count()
    with Watchdog(tmp_path / "stalls", "healed", 0.0, pytest.fail) as watchdog:
        assert threading.active_count() == before
        watchdog.beat(1, 0.0)
        time.sleep(0.05)


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "stalls").write_text("a file in the way")
    told: list[str] = []
    with Watchdog(tmp_path / "stalls", "healed", 0.02, told.append):
        wait_for(lambda: told)
    assert "cannot be written" in told[0]

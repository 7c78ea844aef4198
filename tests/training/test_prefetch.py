"""Batches made ahead: in order, one at a time, and never lost with an error."""

import concurrent.futures
import threading

import pytest

from solar_jax.training.prefetch import Prefetcher


def test_batches_come_in_order_and_none_is_made_after_the_last():
    made: list[int] = []

    def make(step):
        made.append(step)
        return {"step": step}

    with Prefetcher(make, 3, 6) as batches:
        assert batches.first() == {"step": 3}  # looked at, not taken
        assert [batches.take()["step"] for _ in range(3)] == [3, 4, 5]
    assert made == [3, 4, 5]


def test_the_next_batch_is_made_while_the_last_is_used():
    going_on = threading.Event()

    def make(step):
        if step == 1:
            going_on.set()
        return {"step": step}

    with Prefetcher(make, 0, 2) as batches:
        batches.take()
        assert going_on.wait(20)  # with no further call


def test_an_error_is_raised_where_its_batch_is_taken():
    def make(step):
        if step == 1:
            raise OSError("the disk is gone")
        return {"step": step}

    with Prefetcher(make, 0, 3) as batches:
        batches.take()
        with pytest.raises(OSError, match="the disk is gone"):
            batches.take()


def test_a_batch_that_is_slower_than_the_step_is_noticed():
    come = threading.Event()
    done, never = concurrent.futures.Future(), concurrent.futures.Future()
    done.set_result(None)
    with Prefetcher(lambda _: come.wait(20), 0, 1) as batches:
        assert batches.is_slower_than(done)
        come.set()
        assert not batches.is_slower_than(never)

"""Engines that process blocks: this process, a local process pool, or a Ray cluster. Results come in order."""

import collections
import concurrent.futures
import importlib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from solar_jax.data.workers import end_with_parent
from solar_jax.errors import UserError

_AHEAD = 2  # items in flight per worker before the oldest result is awaited

_work: Any = None  # the work function of this worker process


def local[Item, Result](work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Yields `work` of every item, computed in local worker processes, or in this process if `workers` is 1.

    Raises:
      UserError: a worker process died.
    """
    if workers == 1:
        yield from map(work, items)
        return
    context = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
    with concurrent.futures.ProcessPoolExecutor(workers, context, _begin, (work,)) as pool:
        try:
            yield from _in_order(lambda item: pool.submit(_run, item), lambda f: f.result(), items, workers)
        except BrokenProcessPool as e:
            raise UserError("a worker process died, possibly out of memory; use fewer --workers.") from e
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def ray[Item, Result](work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Yields `work` of every item, computed on the Ray cluster at RAY_ADDRESS, or else by `workers` local processes.

    The cluster's machines need this package but no shared file system: documents are sent to them, and rows sent back.

    Raises:
      UserError: Ray is not installed, or the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # the workers already have an environment
    try:
        engine: Any = importlib.import_module("ray")
    except ImportError as e:
        raise UserError("--engine=ray: the package ray is not installed; it comes with the extra `ray`.") from e
    cluster = bool(os.environ.get("RAY_ADDRESS"))
    try:
        options = {} if cluster else {"num_cpus": workers, "include_dashboard": False}
        engine.init(log_to_driver=False, logging_level="error", **options)
    except Exception as e:  # Ray has no common exception type for a failed start
        raise UserError(f"--engine=ray: Ray did not start ({type(e).__name__}: {e}).") from e
    try:
        count = max(1, int(engine.cluster_resources().get("CPU", 1)))
        shared, run = engine.put(work), engine.remote(_run_shared)
        yield from _in_order(lambda item: run.remote(shared, item), engine.get, items, count)
    except engine.exceptions.RayTaskError as e:
        raise e.cause if isinstance(e.cause, UserError) else e from None
    finally:
        engine.shutdown()


ENGINES: dict[str, Callable[[Callable[[Any], Any], Iterable[Any], int], Iterator[Any]]] = {"local": local, "ray": ray}


def _in_order[Item, Result](
    submit: Callable[[Item], Any], result: Callable[[Any], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """Yields results in the items' order, with only as many items in flight as keep the workers busy."""
    waiting: collections.deque[Any] = collections.deque()
    for item in items:
        waiting.append(submit(item))
        if len(waiting) >= _AHEAD * workers:
            yield result(waiting.popleft())
    while waiting:
        yield result(waiting.popleft())


def _begin(work: Callable[[Any], Any]) -> None:
    """Initialises a worker process: sets its work, uses one tokenizer thread, and exits if the parent is killed."""
    global _work
    _work = work
    os.environ["RAYON_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"
    end_with_parent()


def _run(item: Any) -> Any:
    return _work(item)


def _run_shared(work: Callable[[Any], Any], item: Any) -> Any:
    return work(item)

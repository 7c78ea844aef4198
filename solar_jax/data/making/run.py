"""Pool of requests: asks about many questions at once, shows how far it is, and ends at once when it must."""

import collections
import concurrent.futures
from collections.abc import Callable, Iterator

from solar_jax.cli.progress import count_bar
from solar_jax.data.making.endpoint import Endpoint, Unanswered
from solar_jax.data.making.progress import Progress
from solar_jax.data.making.seeds import Seed
from solar_jax.data.making.steps import Finished
from solar_jax.errors import UserError

_AHEAD = 2  # questions handed out for each that is asked about


def ask_all(
    seeds: list[Seed], ask: Callable[[Seed], Finished], endpoint: Endpoint, progress: Progress, concurrency: int,
    note: Callable[[], str],
) -> None:  # fmt: skip
    """Asks about every question that is not finished.

    Args:
      seeds: the questions.
      ask: asks about one, in a thread.
      endpoint: closed when something fails, so that no thread goes on.
      progress: takes what is finished.
      concurrency: most questions that are asked about at once, each with one request at a time.
      note: describes what was used so far, for the bar.

    Raises:
      UserError: the endpoint failed too often, or some questions got no answer.
    """
    pending = [seed for seed in seeds if seed.record not in progress.finished]
    refused: list[Finished] = []
    failed: list[Unanswered] = []

    def work(seed: Seed) -> None:
        finished = ask(seed)
        if all(outcome.reason == "refused" for outcome in finished.outcomes):
            refused.append(finished)  # is dropped once it is known that the endpoint answers others
        else:
            progress.add(finished)

    pool = concurrent.futures.ThreadPoolExecutor(concurrency, thread_name_prefix="ask")
    try:
        with count_bar(len(seeds), len(seeds) - len(pending), "questions") as show:
            for future in _completed(pool, work, pending, _AHEAD * concurrency):
                try:
                    future.result()
                except Unanswered as e:
                    failed.append(e)
                show(1, note())
    except BaseException:
        endpoint.close()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    if refused and not progress.finished:
        why = refused[0].outcomes[0].details
        raise UserError(f"{endpoint.url}: refused each of the {len(refused)} questions: {why}.")
    for finished in refused:
        progress.add(finished)
    if failed:
        raise UserError(
            f"{endpoint.url}: {len(failed)} of {len(pending)} questions got no answer, the last: {failed[-1]}; the "
            "same command asks only these again."
        )


def _completed(
    pool: concurrent.futures.Executor, work: Callable[[Seed], None], seeds: list[Seed], most: int
) -> Iterator[concurrent.futures.Future[None]]:
    """Yields futures as they end; at most so many are begun and not yet yielded."""
    waiting, left = set(), collections.deque(seeds)
    while waiting or left:
        while left and len(waiting) < most:
            waiting.add(pool.submit(work, left.popleft()))
        done, waiting = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
        yield from done

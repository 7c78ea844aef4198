"""The one thread that steps the engine, and the queue through which answers are asked of it."""

import collections
import contextlib
import dataclasses
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence

from solar_jax.decoding.engine import Engine, NewText, Request
from solar_jax.decoding.sampling import Sampling
from solar_jax.errors import UserError
from solar_jax.serving.api_errors import ApiError, engine_failed, server_closing

STARTING, READY, CLOSING, FAILED = "starting", "ready", "closing", "failed"
_AGAIN = 1  # seconds after which a client that found the queue full may come again


@dataclasses.dataclass
class Job:
    """One answer that is asked for."""

    request: Request
    put: Callable[[NewText | Exception], None]  # takes what is new, on the engine's thread
    left: bool = False  # nobody waits for it any more


class Worker:
    """An engine on a thread of its own. Its methods may be called from any other thread."""

    def __init__(self, engine: Engine, *, rows: int, most_waiting: int):
        """Creates the worker, which begins with `start`.

        Args:
          engine: used by nobody else from now on.
          rows: of the engine.
          most_waiting: answers that may wait for a row before more are refused.
        """
        self.state = STARTING
        self._engine, self._rows, self._most_waiting = engine, rows, most_waiting
        self._changed = threading.Condition()
        self._waiting: collections.deque[Job] = collections.deque()
        self._running: dict[int, Job] = {}  # by the engine's number; the thread's own
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ---- For other threads -------------------------------------------------------------------------------------------
    def start(self, *, warm_up: bool, then: Callable[[], None] = lambda: None) -> None:
        """Starts the thread; `then` is called on it once requests are answered at full speed."""
        self._warm_up, self._then = warm_up, then
        self._thread.start()

    @property
    def counts(self) -> dict[str, int]:
        """Responses that are being generated, and that wait."""
        return {"running": len(self._running), "waiting": len(self._waiting)}

    def check_open(self) -> None:
        """Raises a ApiError where nothing more is taken: the queue is full, the server ends, or the engine failed."""
        if self.state == FAILED:
            raise engine_failed()
        if self.state == CLOSING:
            raise server_closing()
        if len(self._waiting) >= self._most_waiting:
            raise ApiError(
                f"{len(self._waiting)} answers are waiting already; come again in {_AGAIN} s.",
                status=429, code="queue_full", headers={"Retry-After": str(_AGAIN)},
            )  # fmt: skip

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues all of a call's jobs.

        Raises:
          ApiError: as in `check_open`.
        """
        with self._changed:
            self.check_open()
            self._waiting.extend(jobs)
            self._changed.notify()

    def leave(self, jobs: Iterable[Job]) -> None:
        """Drops jobs, wherever they are; rows are free at the next step."""
        with self._changed:
            for job in jobs:
                job.left = True
            self._waiting = collections.deque(job for job in self._waiting if not job.left)

    def close(self) -> None:
        """Refuses what is new from now on."""
        with self._changed:
            if self.state != FAILED:
                self.state = CLOSING

    def stop(self) -> None:
        """Ends the thread after its step; what is not complete by then is refused."""
        self.close()
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()

    # ---- The thread --------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            if self._warm_up:
                self._compile()
            with self._changed:
                self.state = READY if self.state == STARTING else self.state
            with contextlib.suppress(OSError):  # nobody reads what is printed
                self._then()
            while self._wait():
                self._turn()
            self._refuse(server_closing())
        except BaseException:
            self.state = FAILED
            self._refuse(engine_failed())
            sys.stderr.write(f"the engine failed:\n{traceback.format_exc()}")

    def _compile(self) -> None:
        """Runs the shortest prompt and a step, greedy and drawn: what most requests need."""
        for sampling in (Sampling(), *(Sampling(temperature=1.0, seed=seed) for seed in range(2))):
            self._engine.submit(Request((0,), 2, sampling))
            while not self._engine.is_idle:
                self._engine.step()

    def _wait(self) -> bool:
        """Waits until there is something to do; False at the end."""
        with self._changed:
            while not (self._waiting or self._running or self._ended):
                self._changed.wait()
            return not self._ended

    def _turn(self) -> None:
        """Lets go what was left, admits what fits, and steps once."""
        for number in [number for number, job in self._running.items() if job.left]:
            self._engine.cancel(number)
            del self._running[number]
        for job in self._admitted():
            try:
                self._running[self._engine.submit(job.request)] = job
            except UserError as e:
                _put(job, ApiError(str(e)))
        for piece in self._engine.step():
            if (job := self._running.get(piece.number)) is not None:
                if piece.answer is not None:
                    del self._running[piece.number]
                _put(job, piece)

    def _admitted(self) -> list[Job]:
        with self._changed:
            return [self._waiting.popleft() for _ in range(min(self._rows - len(self._running), len(self._waiting)))]

    def _refuse(self, error: ApiError) -> None:
        with self._changed:
            jobs = [*self._running.values(), *self._waiting]
            self._running.clear()
            self._waiting.clear()
        for job in jobs:
            _put(job, error)


def _put(job: Job, item: NewText | Exception) -> None:
    with contextlib.suppress(RuntimeError):  # the event loop has ended, and with it who waited
        job.put(item)

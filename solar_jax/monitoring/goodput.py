"""Where the wall time goes: of each step, and of a whole run over all its restarts."""

import collections
import contextlib
import dataclasses
import pathlib
import statistics
import time
from collections.abc import Iterable, Iterator
from typing import Any

from solar_jax.cli.progress import duration
from solar_jax.parallel import processes
from solar_jax.storage.json_files import read_json, write_json
from solar_jax.storage.paths import is_local

OUTSIDE = ("evaluation", "checkpoint")  # what comes between steps and is told by name
LEDGER = (*OUTSIDE, "compilation", "lost")  # lost: in steps that a restart took again
_RECENT = 20  # steps that a median is taken over


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds from the end of the step before to the end of this one; `outside` came before it and is not in them."""

    data: float  # the devices had nothing to do, as the batch was not there
    compute: float  # all else
    outside: dict[str, float]  # by name of OUTSIDE

    @property
    def total(self) -> float:
        return self.data + self.compute


class StepClock:
    """Splits the time of one session's steps, and tells what is left.

    The devices work on a step while the host prepares the next, so a step begins where the one before ended, or
    where the loop took up its work after something outside it.
    """

    def __init__(self, remaining_steps: int):
        self.remaining = remaining_steps
        self._recent: collections.deque[float] = collections.deque(maxlen=_RECENT + 1)
        self._outside = dict.fromkeys(OUTSIDE, 0.0)
        self._begin = time.perf_counter()

    def resume(self) -> None:
        """The next step begins now."""
        self._begin = time.perf_counter()

    @contextlib.contextmanager
    def outside(self, name: str) -> Iterator[None]:
        """Around what is no step; no step may be under way."""
        begin = time.perf_counter()
        yield
        self.resume()
        self._outside[name] += self._begin - begin

    def step(self, asked: float, ready: float, end: float) -> StepTime:
        """A finished step, by `time.perf_counter()`: its batch asked for and there, its numbers there."""
        data = max(0.0, ready - max(self._begin, asked))
        spent = StepTime(data, max(0.0, end - self._begin - data), self._outside)
        self._outside = dict.fromkeys(OUTSIDE, 0.0)
        self._begin = end
        self.remaining -= 1
        self._recent.append(spent.total)
        return spent

    def median(self) -> float:
        """Seconds of a step; the first of a session is not counted if there are others, as it warms up."""
        seconds = list(self._recent)
        return statistics.median_high(seconds[1:] or seconds) if seconds else 0.0

    def eta(self) -> float:
        """Seconds that the remaining steps will take."""
        return self.remaining * self.median()


class Ledger:
    """`goodput.json` of a run: since when it is under way, how often it was started, what was not training.

    What training took stands in the metrics, whose lines are those of the steps that count.
    """

    def __init__(self, workdir: pathlib.Path, started: float):
        """`started` is when this session began, in Unix seconds; the first session's is kept."""
        self._file = workdir / "goodput.json"
        found: dict[str, Any] = read_json(self._file, {})
        self.first_start: float = found.get("first_start", started)
        self.starts: int = found.get("starts", 0) + 1
        self._seconds: dict[str, float] = dict.fromkeys(LEDGER, 0.0) | found.get("seconds", {})
        self.write()

    def add(self, name: str, seconds: float) -> None:
        """Seconds spent on a name of LEDGER."""
        self._seconds[name] += seconds
        if is_local(self._file):  # a bucket takes too long to be told of each: `write` is called now and then
            self.write()

    def summary(self, lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Goodput, 0 to 1: the share of the time since the first start that went into steps that count.

        Args:
          lines: of the metrics of every arm.
        """
        wall = max(time.time() - self.first_start, 1e-9)
        lines = list(lines)
        spent = {name: sum(r.get(f"{name}_seconds", 0.0) for r in lines) for name in ("compute", "data")}
        spent |= self._seconds
        spent["other"] = max(0.0, wall - sum(spent.values()))  # reading, export, and standing still
        return {
            "goodput": round(spent["compute"] / wall, 4),
            "starts": self.starts,
            "wall_seconds": round(wall, 1),
            "spent_seconds": {name: round(seconds, 1) for name, seconds in spent.items()},
        }

    def write(self) -> None:
        if processes.is_first():
            write_json(self._file, {"first_start": self.first_start, "starts": self.starts, "seconds": self._seconds})


def goodput_line(s: dict[str, Any]) -> str:
    """A ledger's summary for a person."""
    parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in s["spent_seconds"].items() if seconds >= 0.5)
    starts = f" and {s['starts']} starts" if s["starts"] > 1 else ""
    return f"goodput {100 * s['goodput']:.1f} % of {duration(s['wall_seconds'])}{starts}: {parts}"


def step_note(spent: StepTime, share: float = 0.05) -> str:
    """What of a step's time is worth a word in its line: what took more than `share` of it."""
    parts = {"data": spent.data} | spent.outside
    return "".join(f"  {name} {s:.1f} s" for name, s in parts.items() if s > share * spent.total and s >= 0.05)

"""Wall-time accounting: per step, and per run over all its restarts."""

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

OUTSIDE = ("evaluation", "checkpoint")  # work between steps, reported by name
LEDGER = (*OUTSIDE, "compilation", "reference", "lost")  # lost: steps repeated after a restart
_RECENT = 20  # steps in the running median


@dataclasses.dataclass(frozen=True)
class StepSeconds:
    """Seconds from the end of the previous step to the end of this one; `outside` came before and is not included."""

    data: float  # devices idle, waiting for the batch
    compute: float  # everything else
    outside: dict[str, float]  # by name in OUTSIDE

    @property
    def total(self) -> float:
        return self.data + self.compute


class StepClock:
    """Splits step time within one session and estimates the time remaining.

    The devices run one step while the host prepares the next, so a step begins where the previous one ended, or where
    the loop resumed after work outside the steps.
    """

    def __init__(self, remaining_steps: int):
        self.remaining = remaining_steps
        self._recent: collections.deque[float] = collections.deque(maxlen=_RECENT + 1)
        self._outside = dict.fromkeys(OUTSIDE, 0.0)
        self._begin = time.perf_counter()

    def resume(self) -> None:
        """Starts the next step now."""
        self._begin = time.perf_counter()

    @contextlib.contextmanager
    def outside(self, name: str) -> Iterator[None]:
        """Context manager that times work outside steps; no step may be in flight."""
        begin = time.perf_counter()
        yield
        self.resume()
        self._outside[name] += self._begin - begin

    def step(self, asked: float, ready: float, end: float) -> StepSeconds:
        """Records a finished step from `time.perf_counter()` times: batch requested, batch ready, metrics ready."""
        data = max(0.0, ready - max(self._begin, asked))
        spent = StepSeconds(data, max(0.0, end - self._begin - data), self._outside)
        self._outside = dict.fromkeys(OUTSIDE, 0.0)
        self._begin = end
        self.remaining -= 1
        self._recent.append(spent.total)
        return spent

    def median(self) -> float:
        """Returns the median seconds per step; a session's first step is warm-up and ignored once there are others."""
        seconds = list(self._recent)
        return statistics.median_high(seconds[1:] or seconds) if seconds else 0.0

    def eta(self) -> float:
        """Estimates the seconds that the remaining steps will take."""
        return self.remaining * self.median()


class Ledger:
    """`goodput.json` of a run: time of the first start, number of starts, and time not spent on training.

    Training time is in the metrics, which have one line for each step that counts.
    """

    def __init__(self, workdir: pathlib.Path, started: float):
        """Opens the ledger; `started` is this session's start in Unix seconds, of which the first session's is kept."""
        self._file = workdir / "goodput.json"
        found: dict[str, Any] = read_json(self._file, {})
        self.first_start: float = found.get("first_start", started)
        self.starts: int = found.get("starts", 0) + 1
        self._seconds: dict[str, float] = dict.fromkeys(LEDGER, 0.0) | found.get("seconds", {})
        self.write()

    def add(self, name: str, seconds: float) -> None:
        """Adds seconds spent on a name in LEDGER."""
        self._seconds[name] += seconds
        if is_local(self._file):  # a bucket is too slow to update each time: `write` is called periodically
            self.write()

    def summary(self, lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Computes goodput, 0 to 1: the share of time since the first start spent on steps that count.

        Args:
          lines: metrics lines of every arm.
        """
        wall = max(time.time() - self.first_start, 1e-9)
        lines = list(lines)
        spent = {name: sum(r.get(f"{name}_seconds", 0.0) for r in lines) for name in ("compute", "data")}
        spent |= self._seconds
        spent["other"] = max(0.0, wall - sum(spent.values()))  # reading, export and downtime
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
    """Formats a ledger's summary as one human-readable line."""
    parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in s["spent_seconds"].items() if seconds >= 0.5)
    starts = f" over {s['starts']} starts" if s["starts"] > 1 else ""
    return f"goodput {100 * s['goodput']:.1f} % of {duration(s['wall_seconds'])}{starts}: {parts}"


def step_note(spent: StepSeconds, share: float = 0.05) -> str:
    """Formats the parts that took more than `share` of a step's time, for its log line."""
    parts = {"data": spent.data} | spent.outside
    return "".join(f"  {name} {s:.1f} s" for name, s in parts.items() if s > share * spent.total and s >= 0.05)

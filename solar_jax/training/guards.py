"""What the numbers of a step must not be: no numbers, or a loss far above those before it."""

import collections
import math
import statistics
from collections.abc import Iterable
from typing import Any

from solar_jax.config import TrainConfig

WINDOW, LEAST = 64, 16  # losses that a spike is told by: at most, at least
FLOOR = 1e-3  # nats; the running deviation is at least this, so that a flat loss has no spikes


class Spike(Exception):
    """A step whose loss is a spike; its update is in the state already."""

    def __init__(self, step: int, loss: float, limit: float):
        super().__init__(f"the loss of step {step} is {loss:.4f}, above the limit of {limit:.4f}")
        self.step = step


class NotFinite(Exception):
    """A step whose loss or gradient is no number, and which may not be left out."""


class Guard:
    """Judges the steps of an arm, one after another.

    A loss is a spike when it lies more than `train.spike` running deviations above the running mean. Both are taken
    over the last 64 losses before it, of this arm's steps that count; there have to be 16. The deviation is the root
    of the mean square distance from their mean, 0.001 nats at least.
    """

    def __init__(self, cfg: TrainConfig, before: Iterable[dict[str, Any]]):
        """`before`: the metrics of the steps that were taken already, which a resumed run is judged by too."""
        self._cfg = cfg
        self._losses: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self.skipped = 0  # steps whose update was left out
        for record in before:
            if _is_finite(record):
                self._losses.append(record["loss"])
            else:
                self.skipped += 1

    def limit(self) -> float:
        """The loss above which a step is a spike, in nats a token."""
        if not self._cfg.spike or len(self._losses) < LEAST:
            return math.inf
        mean = statistics.fmean(self._losses)
        return mean + self._cfg.spike * max(FLOOR, statistics.pstdev(self._losses, mean))

    def check(self, record: dict[str, Any]) -> None:
        """Takes note of a step's "step", "loss" and "grad_norm".

        Raises:
          NotFinite: one of them is not finite, and `train.max_skipped` steps were left out before.
          Spike: the loss is one.
        """
        if not _is_finite(record):
            self.skipped += 1
            if self.skipped > self._cfg.max_skipped:
                numbers = f"loss {record['loss']}, gradient norm {record['grad_norm']}"
                raise NotFinite(f"step {record['step']} has {numbers}")
            return
        if record["loss"] > (limit := self.limit()):
            raise Spike(record["step"], record["loss"], limit)
        self._losses.append(record["loss"])


def _is_finite(record: dict[str, Any]) -> bool:
    return all(value is not None and math.isfinite(value) for value in (record["loss"], record["grad_norm"]))


def storable(record: dict[str, Any]) -> dict[str, Any]:
    """A record as JSON holds it: None for what is not finite."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}

"""Step guards: detect non-finite values and loss spikes."""

import collections
import math
import statistics
from collections.abc import Iterable
from typing import Any

from solar_jax.config import TrainConfig

WINDOW, LEAST = 64, 16  # losses that a spike is judged by: at most, at least
SAME_LOSS = {"float32": 1e-3, "bfloat16": 2e-2}  # the reference's rows may be packed otherwise than the policy's
FLOOR = 1e-3  # nats; the running deviation is at least this, so that a flat loss has no spikes


class Spike(Exception):
    """Raised for a step whose loss is a spike; its update is already in the state."""

    def __init__(self, step: int, loss: float, limit: float):
        super().__init__(f"the loss of step {step} is {loss:.4f}, above the limit of {limit:.4f}")
        self.step = step


class NotFinite(Exception):
    """Raised for a step whose loss or gradient is non-finite and that may not be skipped."""


class NotReference(Exception):
    """Raised where the reference's log-probabilities are not those of the model that training starts from."""


class Guard:
    """Checks the steps of an arm, one after another.

    A loss is a spike if it lies more than `train.spike` running deviations above the running mean. Both are taken over
    the last 64 losses before it, of this arm's steps that count; at least 16 are needed. The deviation is the root
    mean square distance from their mean, at least 0.001 nats.
    """

    def __init__(self, cfg: TrainConfig, before: Iterable[dict[str, Any]]):
        """Starts from `before`, the metrics of the steps already taken, so that a resumed run is judged by them too."""
        self._cfg = cfg
        self._losses: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self.skipped = 0  # steps whose update was skipped
        for record in before:
            if _is_finite(record):
                self._losses.append(record["loss"])
            else:
                self.skipped += 1

    def limit(self) -> float:
        """Returns the loss above which a step is a spike, in nats per token."""
        if not self._cfg.spike or len(self._losses) < LEAST:
            return math.inf
        mean = statistics.fmean(self._losses)
        return mean + self._cfg.spike * max(FLOOR, statistics.pstdev(self._losses, mean))

    def check(self, record: dict[str, Any]) -> None:
        """Records and checks a step's "step", "loss" and "grad_norm".

        Raises:
          NotFinite: one of them is non-finite, and `train.max_skipped` steps were already skipped.
          Spike: the loss is a spike.
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
    """Returns a record as JSON can hold it: None for non-finite values."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def check_first_loss(loss: float, expected: float, compute: str) -> None:
    """Checks the first step of a policy that is its reference.

    Args:
      loss: of the step.
      expected: the loss where both are equal.
      compute: the dtype of matmuls, which decides what rounding may do.

    Raises:
      NotReference: the loss is another one.
    """
    if abs(loss - expected) > SAME_LOSS[compute] * max(1.0, abs(expected)):
        raise NotReference(
            f"the first loss is {loss:.6f}, but where the policy equals the reference it is {expected:.6f}; the "
            "reference's log-probabilities are not those of this model"
        )

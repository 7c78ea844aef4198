"""Cost of chips' failures to a run: time between them, goodput, and the interval of checkpoints that loses least."""

import dataclasses
import math

YEAR = 365.25 * 24 * 3600  # seconds
RESTART = 600.0  # seconds from a failure to the next step: a new host, imports, restore, the step from the cache
TO_HOST = 1e10  # bytes/s from a device to its host, in which training stands still at a save


@dataclasses.dataclass(frozen=True)
class FailureCost:
    """Failures of a slice, and what they cost; seconds."""

    between: float  # from one failure to the next, of training
    stall: float  # of a save
    lost: float  # of a failure: half an interval of checkpoints is trained again, and the restart
    goodput: float  # share of all time in which steps are taken that stay
    best_every: int  # steps from checkpoint to checkpoint that lose least
    best_goodput: float


def failure_cost(
    rate: float, chips: int, step_seconds: float, every: int, state_bytes: float, restart: float = RESTART
) -> FailureCost:
    """Predicts what failures cost a run.

    The best interval is Young's, sqrt(2 x stall x time between failures) (Comm. ACM 17(9), 1974).

    Args:
      rate: failures of a chip and year.
      chips: of the run; one that fails stops all.
      step_seconds: of a step.
      every: steps from checkpoint to checkpoint.
      state_bytes: of parameters and optimiser state on a device.
      restart: seconds from a failure to the next step.
    """
    between, stall = YEAR / (rate * chips), state_bytes / TO_HOST

    def goodput(every: int) -> float:
        interval = every * step_seconds
        kept = max(0.0, between - interval / 2) / (between + restart)
        return kept * interval / (interval + stall)

    best = max(1, round(math.sqrt(2 * stall * between) / step_seconds))
    lost = every * step_seconds / 2 + restart
    return FailureCost(between, stall, lost, goodput(every), best, goodput(best))

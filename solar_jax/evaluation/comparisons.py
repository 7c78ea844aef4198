"""Which evaluations may stand in one table, and paired differences between those."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from solar_jax.evaluation.comparators import H6_TASKS, follows_protocol
from solar_jax.evaluation.h6 import error_of_mean, mean_of
from solar_jax.evaluation.results import Evaluation, Item, TaskScore


@dataclasses.dataclass(frozen=True)
class Difference:
    """A difference of scores on the same items and its standard error, in percent points; None for a single item."""

    points: float
    stderr: float | None


def is_comparable(a: Evaluation, b: Evaluation) -> bool:
    """True if no column of a common table would mix item sets, shots, presets or versions of the harness."""
    if (a.full, a.preset, a.harness) != (b.full, b.preset, b.harness):
        return False
    return all(_same_items(a.scores[task], b.scores[task]) for task in a.scores.keys() & b.scores.keys())


def _same_items(a: TaskScore, b: TaskScore) -> bool:
    if (a.shots, a.metric) != (b.shots, b.metric):
        return False
    if a.outcomes and b.outcomes:
        return a.outcomes.keys() == b.outcomes.keys()
    return a.items is not None and a.items == b.items  # all that is known


def comparable_groups(evaluations: Sequence[Evaluation]) -> list[list[Evaluation]]:
    """Splits evaluations into tables, those of full sets first; each joins the first table where it fits to all."""
    groups: list[list[Evaluation]] = []
    for one in sorted(evaluations, key=lambda e: not e.full):
        fitting = (group for group in groups if all(is_comparable(one, other) for other in group))
        if (group := next(fitting, None)) is not None:
            group.append(one)
        else:
            groups.append([one])
    return groups


def is_as_published(one: Evaluation) -> bool:
    """True if published scores may share its columns: full sets, the shots of H6, and the prompts of their harness."""
    shots = {task: score.shots for task, score in one.scores.items()}
    return one.full and one.preset == "h6_2023" and not (one.chat or one.bos) and follows_protocol(shots)


def paired_differences(a: Evaluation, b: Evaluation) -> dict[str, Difference]:
    """Subtracts `a` from `b`, item by item.

    Returns:
      a difference for each task of which both have the same items, in H6's order, and "h6" if those are all six.
    """
    found = {}
    for task in H6_TASKS:
        ours, theirs = (one.scores[task].outcomes if task in one.scores else {} for one in (a, b))
        if ours and ours.keys() == theirs.keys():
            found[task] = _difference(ours, theirs)
    if len(found) == len(H6_TASKS) and a.h6 and b.h6:
        found["h6"] = _mean_difference(list(found.values()))
    return found


def _difference(a: Mapping[Item, float], b: Mapping[Item, float]) -> Difference:
    """The mean over subjects of the mean over items; a task without subjects has one."""
    by_subject: dict[str, list[float]] = {}
    for item, value in a.items():
        by_subject.setdefault(item[0], []).append(b[item] - value)
    return _mean_difference([Difference(mean_of(values), _error(values)) for values in by_subject.values()])


def _error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _mean_difference(parts: Sequence[Difference]) -> Difference:
    return Difference(mean_of([part.points for part in parts]), error_of_mean([part.stderr for part in parts]))

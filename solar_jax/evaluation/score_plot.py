"""Picture of scores: a panel for each table of a report, bars with standard errors, published scores as markers."""

from collections.abc import Mapping, Sequence
from typing import Any

from solar_jax.cli.plots import png_bytes
from solar_jax.evaluation.comparators import H6_TASKS, PUBLISHED, TITLES
from solar_jax.evaluation.comparisons import is_as_published
from solar_jax.evaluation.h6 import COMMIT
from solar_jax.evaluation.results import Evaluation

_MARKERS = ("*", "D", "s", "^", "o")
_WIDTH = 0.8  # of a task's bars together; tasks are 1 apart
_COLORS = 10  # matplotlib's cycle
_LONGEST = 36  # characters of a name in a legend


def plot_scores(
    groups: Sequence[Sequence[Evaluation]], names: Mapping[Evaluation, str], titles: Sequence[str]
) -> bytes:
    """Draws a panel for each group of evaluations that share a table.

    Args:
      groups: evaluations with tasks of H6.
      names: for the legend; a model keeps its colour in all panels.
      titles: of the panels.

    Returns:
      PNG.
    """
    from matplotlib.figure import Figure  # imported here, since it is slow

    figure = Figure(figsize=(11.5, 0.6 + 3.4 * len(groups)), layout="constrained")
    colors = {name: f"C{i % _COLORS}" for i, name in enumerate(names.values())}
    panels = figure.subplots(len(groups), squeeze=False)[:, 0]
    for ax, group, title in zip(panels, groups, titles, strict=True):
        drawn = [_heading(ax, "± standard error:"), *_bars(ax, group, names, colors)]
        if group[0].full:
            prompts = "" if all(map(is_as_published, group)) else ", other prompts"
            drawn += [_heading(ax, f"published (harness {COMMIT[:7]}{prompts}):"), *_markers(ax, group)]
        ax.legend(handles=drawn, frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
        ax.set_title(title, fontsize="medium", loc="left")
        ax.set(ylabel="score (percent)", ylim=(0, None))
        ax.spines[["right", "top"]].set_visible(False)
    return png_bytes(figure)


def _label(name: str) -> str:
    short = name if len(name) <= _LONGEST else f"...{name[3 - _LONGEST :]}"
    # matplotlib leaves out labels with _ in front, and reads formulas between $.
    return (" " if short.startswith("_") else "") + short.replace("$", r"\$")


def _heading(ax: Any, text: str) -> Any:
    """An entry of the legend without a mark."""
    return ax.plot([], [], linestyle="none", label=text)[0]


def _bars(
    ax: Any, group: Sequence[Evaluation], names: Mapping[Evaluation, str], colors: Mapping[str, str]
) -> list[Any]:
    """Draws each task's bars side by side, and those of H6 last."""
    width = _WIDTH / len(group)
    tasks = [task for task in H6_TASKS if any(task in one.scores for one in group)]
    has_mean = any(one.h6 for one in group)
    drawn = []
    for k, one in enumerate(group):
        shown = [(tasks.index(t), s.percent, s.stderr) for t, s in one.scores.items()]
        if one.h6:
            shown.append((len(tasks), *one.h6))
        at = [x - _WIDTH / 2 + (k + 0.5) * width for x, _, _ in shown]
        bars = ax.bar(
            at, [y for _, y, _ in shown], width * 0.92, yerr=[e or 0 for _, _, e in shown], capsize=2,
            color=colors[names[one]], alpha=0.8, error_kw={"linewidth": 1}, label=_label(names[one]),
        )  # fmt: skip
        drawn.append(bars)
    labels = [_tick(task, group) for task in tasks] + ["H6\nmean of six"] * has_mean
    ax.set_xticks(range(len(labels)), labels, fontsize="small")
    return drawn


def _tick(task: str, group: Sequence[Evaluation]) -> str:
    score = next(one.scores[task] for one in group if task in one.scores)
    items = "" if score.items is None else f"\nn = {score.items:,}"
    shots = "" if score.shots is None else f"\n{score.shots}-shot"
    return f"{TITLES[task]}{shots}{items}"


def _markers(ax: Any, group: Sequence[Evaluation]) -> list[Any]:
    """Marks the published scores of the tasks that were asked with the same shots."""
    tasks = [task for task in H6_TASKS if any(task in one.scores for one in group)]
    score_of = {task: next(one.scores[task] for one in group if task in one.scores) for task in tasks}
    places = {task: x for x, task in enumerate(tasks) if score_of[task].shots == H6_TASKS[task].shots}
    drawn = []
    for k, (row, marker) in enumerate(zip(PUBLISHED, _MARKERS, strict=True)):
        shift = (k - (len(PUBLISHED) - 1) / 2) * 0.1
        shown = [(x + shift, row.by_task()[task]) for task, x in places.items()]
        if any(one.h6 for one in group):
            shown.append((len(tasks) + shift, float(row.mean)))
        drawn += ax.plot(
            [x for x, _ in shown], [y for _, y in shown], marker, color="white", markeredgecolor="black",
            markersize=7 if marker == "*" else 4.5, label=row.model,
        )  # fmt: skip
    return drawn

"""Report of evaluations: models side by side where that is fair, and apart where it is not, with published scores."""

import collections
import pathlib
from collections.abc import Mapping, Sequence

from solar_jax.errors import UserError
from solar_jax.evaluation.comparators import ABLATIONS, H6_TASKS, PUBLISHED, SOLAR, TITLES, Published
from solar_jax.evaluation.comparisons import (
    Difference,
    comparable_groups,
    is_as_published,
    paired_differences,
)  # fmt: skip
from solar_jax.evaluation.h6 import COMMIT
from solar_jax.evaluation.results import Evaluation, TaskScore, read_results
from solar_jax.evaluation.score_plot import plot_scores
from solar_jax.storage import paths

Names = Mapping[Evaluation, str]
_PROMPTS = {
    "h6": "the six tasks with today's prompts",
    "h6_2023": "the six tasks with the prompts of 2023",
    None: "tasks chosen by name",
}


def write_report(files: Sequence[pathlib.Path], out: pathlib.Path, stem: str = "report") -> list[pathlib.Path]:
    """Writes STEM.md and, if a task of H6 was evaluated, STEM.png; all is read and drawn before anything is written.

    Args:
      files: what `evaluate` wrote.
      out: folder, made if missing; files of these names in it are replaced.
      stem: name of both files.

    Returns:
      The files written.

    Raises:
      UserError: a file is not an evaluation or given twice, or `out` is not a folder.
    """
    evaluations = read_results(files)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: expected a folder for {stem}.md, found a file.")
    groups = comparable_groups([one for one in evaluations if one.scores])
    names, titles = names_of(evaluations), group_titles(groups)
    picture = plot_scores(groups, names, titles) if groups else None
    text = report_markdown(evaluations, groups, names, titles, f"{stem}.png" if picture else None)
    paths.attempt(out, lambda: out.mkdir(parents=True, exist_ok=True))
    page, image = out / f"{stem}.md", out / f"{stem}.png"
    if picture is None:
        image.unlink(missing_ok=True)  # an earlier report's, which this one would not show
    else:
        paths.write_file(image, picture)
    paths.write_file(page, text)
    return [page] if picture is None else [page, image]


def names_of(evaluations: Sequence[Evaluation]) -> dict[Evaluation, str]:
    """Names models; those of one name by their files, too."""
    counts = collections.Counter(one.model for one in evaluations)
    names = {e: e.model if counts[e.model] == 1 else f"{e.model} ({e.file.name})" for e in evaluations}
    if len(set(names.values())) == len(names):
        return names
    return {one: f"{one.model} ({one.file})" for one in evaluations}


def group_titles(groups: Sequence[Sequence[Evaluation]]) -> list[str]:
    """Titles of tables; those that would be equal are numbered."""
    titles = []
    for group in groups:
        first = group[0]
        preset = f"preset {first.preset}" if first.preset else "no preset"
        titles.append(f"{'Full sets' if first.full else 'Subsets'}, {preset}, lm-eval {first.harness}")
    counts, seen = collections.Counter(titles), collections.Counter[str]()
    for k, title in enumerate(titles):
        seen[title] += 1
        titles[k] = f"{title}: table {seen[title]} of {counts[title]}" if counts[title] > 1 else title
    return titles


def report_markdown(
    evaluations: Sequence[Evaluation], groups: Sequence[Sequence[Evaluation]], names: Names, titles: Sequence[str],
    picture: str | None,
) -> str:  # fmt: skip
    """Formats the whole report.

    Args:
      evaluations: in the order given.
      groups: those with tasks of H6, by table.
      names: of the models.
      titles: of the tables.
      picture: name of its file, if there is one.
    """
    parts = ["# Evaluations", _settings(evaluations, names)]
    if picture:
        parts.append(f"![Scores with standard errors]({picture})")
    for group, title in zip(groups, titles, strict=True):
        parts += [f"## {title}", _scope(group), _scores(group, names)]
        if differences := _differences(group, names):
            parts += ["### Paired differences", differences]
    if groups:
        parts += _published_section(groups)
    for one in evaluations:
        if one.others:
            parts += [f"## Other tasks of {_cell(names[one])}", _others(one)]
    return "\n\n".join(parts) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: object) -> str:
    return "-" if text is None else " ".join(str(text).replace("|", "\\|").split())


def _with_error(value: float, stderr: float | None, form: str = ".2f") -> str:
    return f"{value:{form}}" + ("" if stderr is None else f" ± {stderr:.2f}")


# ---- Parts -----------------------------------------------------------------------------------------------------------
def _settings(evaluations: Sequence[Evaluation], names: Names) -> str:
    rows = [
        [
            _cell(names[e]), _cell(e.file.name), e.preset or "none", _cell(e.harness), _cell(e.dtype or "not stated"),
            {True: "with", False: "without", None: "not stated"}[e.bos],
            {True: "yes", False: "no", None: "not stated"}[e.chat], "none" if e.limit is None else str(e.limit),
        ]
        for e in evaluations
    ]  # fmt: skip
    return _table(["model", "file", "preset", "lm-eval", "dtype", "BOS", "chat template", "limit"], rows)


def _scope(group: Sequence[Evaluation]) -> str:
    first = group[0]
    has_mmlu = any("mmlu" in one.scores for one in group)
    subjects = ", MMLU as the mean over its subjects" if has_mmlu else ""
    text = f"Percent ± standard error{subjects}; {_PROMPTS[first.preset]}."
    if not first.full:
        return (
            f"{text} **Not the full sets**, or not known to be: these scores cannot be compared with published ones, "
            "nor with those of other items."
        )
    if all(map(is_as_published, group)):
        return (
            f"{text} Published scores, marked so, are of the same sets and shots, by harness commit {COMMIT[:12]} "
            "itself, whose prompts the preset follows."
        )
    return (
        f"{text} Published scores are of another version of the harness, or otherwise asked, and stand in a table of "
        "their own below."
    )


def _scores(group: Sequence[Evaluation], names: Names) -> str:
    """Tasks as columns; the first rows say what each column's scores are of."""
    tasks = [task for task in H6_TASKS if any(task in one.scores for one in group)]
    of = [next(one.scores[task] for one in group if task in one.scores) for task in tasks]
    means = any(one.h6 for one in group)
    rows = [
        ["*metric*", *(f"*{score.metric}*" for score in of)],
        ["*shots*", *(f"*{'not stated' if score.shots is None else score.shots}*" for score in of)],
        ["*items*", *(_items_cell(task, score) for task, score in zip(tasks, of, strict=True))],
    ]
    rows = [[*row, *(["*mean*", "", ""][k : k + 1] if means else [])] for k, row in enumerate(rows)]
    for one in group:
        cells = [_score_cell(one.scores.get(task)) for task in tasks]
        rows.append([_cell(names[one]), *cells, *([_with_error(*one.h6) if one.h6 else "-"] if means else [])])
    if all(map(is_as_published, group)):
        rows += [_published_row(row, tasks, means) for row in PUBLISHED]
    return _table(["model", *(TITLES[task] for task in tasks), *(["H6"] if means else [])], rows)


def _items_cell(task: str, score: TaskScore) -> str:
    if score.items is None:
        return "*not stated*"
    return f"*{score.items:,}*" if score.full else f"*{score.items:,} of {H6_TASKS[task].items:,}*"


def _score_cell(score: TaskScore | None) -> str:
    return "-" if score is None else _with_error(score.percent, score.stderr)


def _published_row(row: Published, tasks: Sequence[str], means: bool) -> list[str]:
    scores = dict(zip(H6_TASKS, row.scores, strict=True))
    return [f"{row.model} (published)", *(scores[task] for task in tasks), *([row.mean] if means else [])]


def _differences(group: Sequence[Evaluation], names: Names) -> str:
    """Every model of a table less its first, where both have the items; empty if none has."""
    first, *others = group
    found = {other: differences for other in others if (differences := paired_differences(first, other))}
    if not found:
        return ""
    columns = [task for task in (*H6_TASKS, "h6") if any(task in one for one in found.values())]
    titles = ["H6" if column == "h6" else TITLES[column] for column in columns]
    rows = [[_cell(names[other]), *(_difference_cell(of.get(c)) for c in columns)] for other, of in found.items()]
    text = f"Less {_cell(names[first])}, item by item, in percent points ± standard error of the difference."
    return f"{text}\n\n{_table(['model', *titles], rows)}"


def _difference_cell(found: Difference | None) -> str:
    return "-" if found is None else _with_error(found.points, found.stderr, "+.2f")


def _published_section(groups: Sequence[Sequence[Evaluation]]) -> list[str]:
    text = (
        f"Percent, {SOLAR}; lm-evaluation-harness at {COMMIT}, full sets, no chat template. Standard errors were not "
        "published."
    )
    if any(not group[0].full for group in groups):
        text += " **Scores of subsets cannot be compared with these.**"
    if any(one.full and not is_as_published(one) for group in groups for one in group):
        text += (
            " Today's prompts and filters, other shots, BOS or a chat template change scores, too; the preset h6_2023 "
            "follows that commit."
        )
    tasks = list(H6_TASKS)
    rows = [
        ["*shots*", *(f"*{of.shots}*" for of in H6_TASKS.values()), ""],
        ["*items*", *(f"*{of.items:,}*" for of in H6_TASKS.values()), ""],
        *(_published_row(row, tasks, True) for row in PUBLISHED),
    ]
    parts = ["## Published scores", text]
    if not all(is_as_published(one) for group in groups for one in group):  # else they stand above
        parts.append(_table(["model", *(TITLES[t] for t in tasks), "H6"], rows))
    if any(one.full and one.h6 for group in groups for one in group):
        for average in ("H6", "H4"):
            of = [a for a in ABLATIONS if a.average == average]
            parts += [f"### Published {average} of ablations", _ablation_scope(average, of[0].source)]
            parts.append(_table(["stage", "variant", average], [[a.stage, a.variant, a.mean] for a in of]))
    return parts


def _ablation_scope(average: str, source: str) -> str:
    tasks = "all six" if average == "H6" else "ARC, HellaSwag, MMLU and TruthfulQA"
    return f"Mean of {tasks}, {source}."


def _others(one: Evaluation) -> str:
    limit = "" if one.limit is None else f" Of each task the first {one.limit:,} items at most."
    rows = [
        [
            _cell(o.task), _cell(o.metric), f"{o.value:.4f}", "-" if o.stderr is None else f"{o.stderr:.4f}",
            _cell(o.items), _cell(o.shots),
        ]
        for o in one.others
    ]  # fmt: skip
    return f"In lm-eval's own units.{limit}\n\n" + _table(
        ["task", "metric", "value", "standard error", "items", "shots"], rows
    )

"""Pictures by layer: a figure for each subject, models on the same axes, with their layer maps beneath."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from solar_jax.cli.plots import png_bytes
from solar_jax.inspecting.weights import ALL, GROUPS

Model = dict[str, Any]  # as in seam.json
_NEW, _OLD, _SEAM = "#d1603d", "0.72", "0.35"
_MOST_SEAMS = 12
_FAR = 10
_STYLES = ("-", "--", ":")  # of groups of arrays


@dataclasses.dataclass(frozen=True)
class Line:
    """Values over layers."""

    x: Sequence[float]
    y: Sequence[float | None]
    error: Sequence[float | None] | None = None  # standard errors
    note: str = ""  # after the model's name in the legend
    style: str = "-"


@dataclasses.dataclass(frozen=True)
class Panel:
    """A plot of one quantity."""

    label: str
    lines: Callable[[Model], list[Line]]
    log: bool = False
    near: float = 0.0  # of changes: beyond this distance from 0 the scale is logarithmic, if some go far; 0: no change


def _layers(*path: str, note: str = "", style: str = "-") -> Callable[[Model], list[Line]]:
    """A line of the list that lies at `path`, over its index."""

    def lines(model: Model) -> list[Line]:
        values: Any = model
        for key in path:
            values = values.get(key) if isinstance(values, dict) else None
        return [Line(range(len(values)), values, note=note, style=style)] if values else []

    return lines


def _groups(*path: str) -> Callable[[Model], list[Line]]:
    """A line for the attention, the MLP and the norms of every layer."""
    made = [_layers(*path, group, note=group, style=style) for group, style in zip(GROUPS, _STYLES, strict=True)]
    return lambda model: [line for one in made for line in one(model)]


def _additions(model: Model) -> list[Line]:
    return [
        line
        for name, style in (("attention", "-"), ("mlp", "--"))
        for line in _layers("stream", name, note=name, style=style)(model)
    ]


def _twins(model: Model) -> list[Line]:
    """Distances of twins by kind of array, each at the later one."""
    at, values = [later for _, later in model["twins"]["pairs"]], model["twins"]["relative"]
    groups = zip(GROUPS, _STYLES, strict=True) if at else ()
    return [Line(at, values[group], note=group, style=style) for group, style in groups]


def _without(model: Model) -> list[Line]:
    found = model["without"]
    return [_changes([one["layer"] for one in found], found, "o-")] if found else []


def _exchanged(model: Model) -> list[Line]:
    found = model["exchanged_twins"]
    return [_changes([one["layers"][1] for one in found], found, "o-")] if found else []


def _changes(at: list[int], found: list[dict[str, Any]], style: str) -> Line:
    return Line(at, [one["difference"] for one in found], [one["error"] for one in found], style=style)


# File -> title, and panels from above.
PICTURES: dict[str, tuple[str, tuple[Panel, ...]]] = {
    "stream": (
        "Residual stream",
        (
            Panel("|h| at a layer's input,\nmedian over tokens", _layers("stream", "norm_median"), log=True),
            Panel("cosine of a layer's\ninput and output", _layers("stream", "cosine")),
            Panel("what is added,\nrelative to the stream", _additions, log=True),
        ),
    ),
    "lens": (
        "Logit lens: every layer's input read as if it were the last one's output",
        (
            Panel("KL(final || lens), nats", _layers("lens", "kl"), log=True),
            Panel("loss, nats", _layers("lens", "loss"), log=True),
            Panel("same likeliest token\nas the last layer", _layers("lens", "agreement")),
        ),
    ),
    "gradients": (
        "Gradient of the mean loss",
        (
            Panel("|gradient| of a layer", _layers("gradients", ALL), log=True),
            Panel("by kind of array", _groups("gradients"), log=True),
            Panel("|gradient| for a\nlayer's input", _layers("gradients", "stream"), log=True),
        ),
    ),
    "weights": (
        "Weights: how far layers moved, and how far twins are apart",
        (
            Panel("|W - start| / |start|", _layers("moved", "relative", ALL)),
            Panel("by kind of array", _groups("moved", "relative")),
            Panel("distance from the twin\nbefore, relative", _twins),
        ),
    ),
    "ablations": (
        "Change of the loss, with standard errors over rows",
        (
            Panel("without the layer, nats", _without, near=0.1),
            Panel("exchanged with the twin\nbefore, nats", _exchanged, near=0.01),
        ),
    ),
}


def draw_subject(name: str, models: Sequence[Model]) -> bytes | None:
    """Draws a picture of `PICTURES` as PNG; None if no model has anything for it.

    Args:
      name: of the picture.
      models: as in seam.json; a model has the same colour in all pictures.
    """
    from matplotlib.figure import Figure  # imported here, since it is slow
    from matplotlib.ticker import MaxNLocator

    title, panels = PICTURES[name]
    drawn = [(panel, [panel.lines(model) for model in models]) for panel in panels]
    drawn = [(panel, lines) for panel, lines in drawn if any(lines)]
    if not drawn:
        return None
    maps = distinct_maps(models)
    heights = [2.2] * len(drawn) + [0.9] * len(maps)
    figure = Figure(figsize=(10.5, 0.9 + sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (panel, lines) in zip(axes, drawn, strict=False):
        _draw_panel(ax, panel, lines, models)
        for model in maps:
            _mark_seams(ax, model)
    for ax, model in zip(axes[len(drawn) :], maps, strict=True):
        _draw_map(ax, model)
    axes[-1].set_xlabel("layer")
    axes[-1].set_xlim(-0.8, max(model["layers"] for model in models) + 0.8)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    figure.suptitle(title, fontsize="medium")
    return png_bytes(figure)


def distinct_maps(models: Sequence[Model]) -> list[Model]:
    """Returns the first model with each layer map."""
    found: dict[str, Model] = {}
    for model in models:
        its = model["layer_map"]
        found.setdefault(str((its["source"], its["partner"], its["scale"])), model)
    return list(found.values())


def _draw_panel(ax: Any, panel: Panel, lines: Sequence[list[Line]], models: Sequence[Model]) -> None:
    for k, (model, its) in enumerate(zip(models, lines, strict=True)):
        for line in its:
            label = ", ".join(filter(None, (model["name"].replace("$", r"\$"), line.note)))
            y = np.array([np.nan if v is None or (panel.log and v <= 0) else v for v in line.y], float)
            how = {"color": f"C{k % 10}", "linewidth": 1.4, "markersize": 3, "label": " " + label}
            if line.error is None:
                ax.plot(line.x, y, line.style, marker="." if len(line.x) == 1 else None, **how)
            else:
                error = [0.0 if e is None else e for e in line.error]
                ax.errorbar(line.x, y, yerr=error, fmt=line.style, capsize=1.5, elinewidth=0.8, **how)
    if panel.near:
        ax.axhline(0, color="0.5", linewidth=0.8)
        if any(abs(v or 0) > _FAR * panel.near for its in lines for line in its for v in line.y):
            ax.set_yscale("symlog", linthresh=panel.near)
    if panel.log and any(v for its in lines for line in its for v in line.y):
        ax.set_yscale("log")
    ax.set_ylabel(panel.label, fontsize="small")
    ax.legend(frameon=False, fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    ax.spines[["right", "top"]].set_visible(False)


def _mark_seams(ax: Any, model: Model) -> None:
    """Draws a line at every seam, where they are few enough to leave something else to see."""
    seams = model["layer_map"]["seams"]
    for at in seams if len(seams) <= _MOST_SEAMS else ():
        ax.axvline(at + 0.5, color=_SEAM, linestyle=(0, (2, 2)), linewidth=0.9, zorder=0)


def _draw_map(ax: Any, model: Model) -> None:
    """Draws the source of every layer as a bar; new layers in colour, means with a hatch, zeroed ones hollow."""
    its = model["layer_map"]
    new, scale = set(its["new"]), its["scale"] or [1.0] * model["layers"]
    partner = its["partner"] or its["source"]
    for i, (source, other) in enumerate(zip(its["source"], partner, strict=True)):
        color = _NEW if i in new else _OLD
        ax.bar(
            i, source + 1, 0.8, color="none" if scale[i] == 0 else color, edgecolor=color, linewidth=0.8,
            hatch="///" if other != source else None,
        )  # fmt: skip
    _mark_seams(ax, model)
    ax.set_ylabel("source", fontsize="small")
    grown = f"{its['operator']}: {its['base_layers']} to {model['layers']} layers" + (", new ones red" if new else "")
    ax.set_title(f"{model['name']}: {grown}".replace("$", r"\$"), fontsize="x-small", loc="left", pad=2)
    ax.spines[["right", "top"]].set_visible(False)

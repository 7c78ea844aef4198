"""Pictures of a study."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from solar_jax.cli.plots import png_bytes
from solar_jax.studying.config import StudyConfig
from solar_jax.studying.findings import Findings

_CONTROLS = {"tokens": "black", "flops": "0.45", "tied": "C3"}  # by kind of control
_WIDE = 9.0  # inches


def _label(name: str) -> str:
    # matplotlib leaves out labels with _ in front, and reads formulas between $.
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _figure(height: float) -> Any:
    from matplotlib.figure import Figure  # imported here, since it is slow

    return Figure(figsize=(_WIDE, height), layout="constrained")


def _colors(found: Findings) -> dict[str, Any]:
    """A colour for each arm, the same in all pictures."""
    import matplotlib

    names = [one.arm.name for one in found.arms if not one.arm.control]
    table = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, max(2, len(names))))
    return dict(zip(names, table, strict=False)) | {
        one.arm.name: _CONTROLS[one.arm.control] for one in found.arms if one.arm.control
    }


def plot_zero_tokens(found: Findings) -> bytes:
    """Bars of each arm's loss before training, the best first, with the base as a line."""
    first = sorted(((c[0], n) for n, c in found.curves.items()), reverse=True)
    shown = [(loss, name) for loss, name in first if _is_grown(found, name)]
    figure = _figure(1.2 + 0.28 * len(shown))
    ax, colors = figure.subplots(), _colors(found)
    ax.barh(range(len(shown)), [loss for loss, _ in shown], color=[colors[name] for _, name in shown])
    ax.axvline(found.base_loss, color="black", linestyle="--", linewidth=1, label=f"base, {found.base_loss:.3f}")
    ax.set_yticks(range(len(shown)), [_label(name) for _, name in shown], fontsize="small")
    lowest = min([found.base_loss, *(loss for loss, _ in shown)])
    highest = max([found.base_loss, *(loss for loss, _ in shown)])
    ax.set(xlabel="test loss before training (nats per token)", xlim=(lowest - 0.1, highest + 0.1))
    ax.legend(frameon=False)
    return png_bytes(figure)


def plot_curves(found: Findings, axis: str) -> bytes:
    """Test loss of every arm at its chosen rate, over "tokens" or "flops"; controls are dashed."""
    from matplotlib.ticker import EngFormatter

    figure = _figure(5.5)
    ax, colors = figure.subplots(), _colors(found)
    ax.axhline(found.base_loss, color="0.7", linestyle=":", linewidth=1, label=f"base, {found.base_loss:.3f}")
    for one in found.arms:
        curve = found.curves[one.arm.name]
        ax.plot(
            getattr(one, axis), curve, "--" if one.arm.control else "-", color=colors[one.arm.name], linewidth=1.4,
            marker=".", label=f"{_label(one.arm.name)}, {one.rate:g}: {curve[0]:.3f} to {curve[-1]:.3f}",
        )  # fmt: skip
    ax.set(xlabel=f"training {'FLOPs' if axis == 'flops' else axis}", ylabel="test loss (nats per token)")
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.spines[["right", "top"]].set_visible(False)
    ax.legend(frameon=False, fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return png_bytes(figure)


def plot_differences(found: Findings) -> bytes:
    """Each arm minus each control with its interval, a panel for each kind of control."""
    kinds = [kind for kind in _CONTROLS if any(_kind(found, c.control) == kind for c in found.comparisons)]
    names = list(dict.fromkeys(c.arm for c in found.comparisons))[::-1]
    figure = _figure(1.4 + 0.26 * len(names))
    panels = figure.subplots(1, max(1, len(kinds)), sharey=True, squeeze=False)[0]
    for ax, kind in zip(panels, kinds, strict=False):
        of = {c.arm: c for c in found.comparisons if _kind(found, c.control) == kind}
        for y, name in enumerate(names):
            if (one := of.get(name)) is not None:
                value, low, high = one.difference.value, one.difference.low, one.difference.high
                color = {"better": "C2", "worse": "C3", "undecided": "0.5"}[one.verdict]
                ax.errorbar(
                    value,
                    y,
                    xerr=[[max(0, value - low)], [max(0, high - value)]],
                    fmt="o",
                    color=color,
                    capsize=2,
                    ms=4,
                )
        ax.axvline(0, color="black", linewidth=0.8)
        ax.set_title(f"minus the control: {kind}", fontsize="medium", loc="left")
        ax.set(xlabel="nats per token, below 0: better")
    panels[0].set_yticks(range(len(names)), [_label(name) for name in names], fontsize="small")
    return png_bytes(figure)


def plot_ranks(found: Findings, study: StudyConfig) -> bytes:
    """End loss of the arms that grew over their zero-token loss, and over that after the probe, at the first seed."""
    figure, colors = _figure(4.2), _colors(found)
    end = found.first_seed["end"]
    for ax, when in zip(figure.subplots(1, 2, sharey=True), ("zero-token", "probe"), strict=True):
        for name, loss in found.first_seed[when].items():
            ax.plot(loss, end[name], "o", color=colors[name])
            ax.annotate(_label(name), (loss, end[name]), fontsize="xx-small", xytext=(3, 3), textcoords="offset points")
        said = f"after {study.probe_steps} steps" if when == "probe" else "before training"
        ax.set(xlabel=f"test loss {said}")
        ax.set_title(f"rank correlation {found.correlations[when, 'end']}", fontsize="medium", loc="left")
    figure.axes[0].set(ylabel="test loss at the end")
    return png_bytes(figure)


def _kind(found: Findings, name: str) -> str:
    return next(one.arm.control for one in found.arms if one.arm.name == name)


def _is_grown(found: Findings, name: str) -> bool:
    return _kind(found, name) in ("", "tied")


def pictures(found: Findings, study: StudyConfig) -> Mapping[str, bytes]:
    """All pictures by file name, PNG."""
    return {
        "zero_token.png": plot_zero_tokens(found),
        "loss_over_tokens.png": plot_curves(found, "tokens"),
        "loss_over_flops.png": plot_curves(found, "flops"),
        "differences.png": plot_differences(found),
        "ranks.png": plot_ranks(found, study),
    }

"""Plots of results."""

import io
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from solar_jax.storage import paths

SMOOTH = 50  # points of a training curve that are left distinct


def plot_losses(
    file: pathlib.Path, title: str, base_loss: float | None, arms: dict[str, dict[str, list[tuple[int, float]]]],
    tokens_a_step: int,
) -> None:  # fmt: skip
    """Plots the healing curve: training and held-out loss of each arm, with the base model as a line.

    Args:
      file: PNG to write.
      title: of the figure.
      base_loss: held-out loss before growth, if there was any.
      arms: name -> {"train": [(step, loss)], "heldout": [(step, loss)]}.
      tokens_a_step: for the axis below; the one above counts steps.
    """
    from matplotlib.figure import Figure  # imported here, since it is slow; pyplot would be slower, and is for windows
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    ax = figure.subplots()
    if base_loss is not None:
        ax.axhline(base_loss, color="0.4", linestyle="--", linewidth=1.2, label=f"base, {base_loss:.3f}")
    for (name, curves), color in zip(arms.items(), ("C1", "C2", "C0") if len(arms) > 2 else ("C1", "C0"), strict=False):
        steps, losses = zip(*curves["heldout"], strict=True)
        label = f"{name}, held out: {losses[0]:.3f} to {losses[-1]:.3f}"
        ax.plot([step * tokens_a_step for step in steps], losses, "o-", color=color, label=label)
        if curves["train"]:
            steps, losses = zip(*curves["train"], strict=True)
            window = max(1, len(losses) // SMOOTH)
            label = f"{name}, training batches" + (f", mean of {window}" if window > 1 else "")
            ax.plot(
                [step * tokens_a_step for step in steps], running_mean(losses, window), color=color, alpha=0.35,
                linewidth=1, label=label,
            )  # fmt: skip
    ax.set(xlabel="tokens", ylabel="loss (nats per token)")
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    steps_of, tokens_of = (lambda x: np.divide(x, tokens_a_step)), (lambda x: np.multiply(x, tokens_a_step))
    above = ax.secondary_xaxis("top", functions=(steps_of, tokens_of))
    above.xaxis.set_major_locator(MaxNLocator(integer=True))
    above.set_xlabel("step")
    figure.suptitle(title)
    ax.legend(frameon=False)
    ax.spines["right"].set_visible(False)
    paths.write_file(file, png_bytes(figure))


def png_bytes(figure: Any) -> bytes:
    """Draws a matplotlib figure in memory, since matplotlib cannot write to a bucket."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    return picture.getvalue()


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Returns the mean of each value and those before it, at most `window` in all."""
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]

"""Plots of results."""

import io
import pathlib

from solar_jax.storage import paths


def plot_losses(
    file: pathlib.Path, title: str, base_loss: float, arms: dict[str, dict[str, list[tuple[int, float]]]]
) -> None:
    """Plots the healing curve: training and held-out loss of each arm by step, with the base model as a line.

    Args:
      file: PNG to write.
      title: of the figure.
      base_loss: held-out loss before growth.
      arms: name -> {"train": [(step, loss)], "heldout": [(step, loss)]}.
    """
    from matplotlib.figure import Figure  # imported here, since it is slow; pyplot would be slower, and is for windows

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    ax = figure.subplots()
    ax.axhline(base_loss, color="0.4", linestyle="--", linewidth=1.2, label=f"base, {base_loss:.3f}")
    for (name, curves), color in zip(arms.items(), ("C1", "C0"), strict=False):
        steps, losses = zip(*curves["heldout"], strict=True)
        label = f"{name}, held out: {losses[0]:.3f} to {losses[-1]:.3f}"
        ax.plot(steps, losses, "o-", color=color, label=label)
        if curves["train"]:
            faint = {"color": color, "alpha": 0.35, "linewidth": 1}
            ax.plot(*zip(*curves["train"], strict=True), label=f"{name}, training batches", **faint)
    ax.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()  # since matplotlib cannot write to a bucket
    figure.savefig(picture, dpi=130, format="png")
    paths.write_file(file, picture.getvalue())

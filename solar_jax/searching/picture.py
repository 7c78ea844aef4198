"""Picture of a search: excess loss of blocks by where they begin and end, the seam scores, and the layer maps."""

import pathlib
from typing import Any

import numpy as np

from solar_jax.cli.plots import png_bytes
from solar_jax.searching.candidates import blocks_text, source_layers
from solar_jax.searching.find import FoundCut
from solar_jax.storage import paths


def plot_search(file: pathlib.Path, found: FoundCut, title: str) -> None:
    """Draws a heat map of the excess of single blocks [a, b) that were evaluated, beside it the log of the seam's norm
    ratio of all blocks, and beneath them the source layers of the best cut and of dus.

    Args:
      file: PNG to write.
      found: the search.
      title: of the figure.
    """
    from matplotlib.figure import Figure  # imported here, since it is slow

    n = found.layers
    figure = Figure(figsize=(11, 8), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(2, 1))
    _heat(figure, figure.add_subplot(grid[0, 0]), excess_map(found), "excess loss of one block, nats a token", True)
    _heat(figure, figure.add_subplot(grid[0, 1]), np.log(found.ratios), "seam score: log(|h_b| / |h_a|)", False)
    ax = figure.add_subplot(grid[1, :])
    ax.plot(range(n), range(n), color="0.7", linewidth=1, label=f"base, loss {found.base_loss:.4f}")
    if found.dus is not None:
        layers = source_layers(found.dus.cut, n)
        ax.step(range(len(layers)), layers, where="mid", color="C1", label=f"dus, {found.dus.loss:.4f}")
    label = f"best {blocks_text(found.best.cut)}, {found.best.loss:.4f}"
    ax.step(range(len(found.source_layers)), found.source_layers, where="mid", color="C0", linewidth=2, label=label)
    ax.set(xlabel="layer of the deeper model", ylabel="source layer")
    ax.legend(frameon=False)
    ax.spines[["right", "top"]].set_visible(False)
    figure.suptitle(title)
    paths.write_file(file, png_bytes(figure))


def excess_map(found: FoundCut) -> np.ndarray:
    """Returns the excess of each evaluated block of two visits, [n + 1, n + 1] at [a, b]; NaN where none was."""
    values = np.full((found.layers + 1, found.layers + 1), np.nan)
    for scored in (*found.candidates, *found.partial):
        if len(scored.cut) == 1 and scored.cut[0].visits == 2:
            values[scored.cut[0].a, scored.cut[0].b] = scored.loss - found.base_loss
    return values


def _heat(figure: Any, ax: Any, values: np.ndarray, title: str, log: bool) -> None:
    from matplotlib.colors import LogNorm

    known = values[np.isfinite(values) & (values > 0)]
    norm = LogNorm(known.min(), known.max()) if log and known.size and known.min() < known.max() else None
    # The embedding is far smaller than all that follows: its column would take the whole scale.
    top = {} if log else {"vmax": np.nanmax(values[1:]) if np.isfinite(values[1:]).any() else None}
    drawn = ax.imshow(values.T, origin="lower", cmap="viridis_r", norm=norm, interpolation="nearest", **top)
    figure.colorbar(drawn, ax=ax, shrink=0.8)
    ax.set(xlabel="a, first layer of the block", ylabel="b, first layer after it", title=title)
    ax.title.set_fontsize("medium")

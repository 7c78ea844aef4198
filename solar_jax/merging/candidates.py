"""Candidate merges of two models, and which of them is best."""

import dataclasses
from collections.abc import Mapping, Sequence

from solar_jax.errors import UserError
from solar_jax.merging.methods import METHODS
from solar_jax.merging.recipe import Recipe, short_recipe

# Weight of the second model, by method. The paper tries these four on its two aligned models (section 4.3.3, table 8).
PAPER = (("linear", 0.5), ("linear", 0.6), ("linear", 0.4), ("slerp", 0.5))


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One merge that is tried."""

    name: str
    recipe: Recipe


def make_candidates(text: str, models: Sequence[str], base: str | None, dtype: str | None) -> list[Candidate]:
    """The merges that `--candidates` names: "paper", or METHOD:WEIGHT of the second model, e.g. linear:0.3,slerp:0.5.

    Raises:
      UserError: there are not two models, or an entry is not of that form.
    """
    if len(models) != 2:
        raise UserError(f"--candidates merges two models, found {len(models)}.")
    entries = PAPER if text == "paper" else [_entry(part) for part in text.split(",")]
    return [
        Candidate(
            f"{method} ({1 - weight:g}, {weight:g})",
            short_recipe(method, [(models[0], 1 - weight), (models[1], weight)], base, None, dtype),
        )
        for method, weight in dict.fromkeys(entries)
    ]


def _entry(text: str) -> tuple[str, float]:
    method, _, number = text.strip().partition(":")
    try:
        weight = float(number)
    except ValueError:
        weight = -1.0
    if method not in METHODS or not 0 <= weight <= 1:
        raise UserError(
            f"--candidates must be paper, or METHOD:WEIGHT with a weight of the second model in [0, 1], such as "
            f"linear:0.3,slerp:0.5; found {text!r}."
        )
    return method, weight


def best_of(losses: Mapping[str, float]) -> str:
    """The name with the lowest loss; of equal ones the first."""
    return min(losses, key=lambda name: losses[name])

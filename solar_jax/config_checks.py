"""Checks of values in a config group, by key."""

import math
from typing import Any

from solar_jax.errors import UserError


def at_least(least: int, group: str, values: Any, *keys: str) -> None:
    """Raises a UserError for the first key of a group whose value is smaller than `least`."""
    for key in keys:
        if (value := getattr(values, key)) < least:
            raise UserError(f"config.{group}.{key} must be at least {least}, found {value}.")


def not_negative(group: str, values: Any, *keys: str) -> None:
    """Raises a UserError for the first key of a group whose value is below 0 or not finite."""
    for key in keys:
        if not 0 <= (value := getattr(values, key)) < math.inf:  # a NaN is refused too
            raise UserError(f"config.{group}.{key} must be finite and not negative, found {value}.")


def between(least: float, below: float, group: str, values: Any, *keys: str) -> None:
    """Raises a UserError for the first key of a group whose value is not in [least, below)."""
    for key in keys:
        if not least <= (value := getattr(values, key)) < below:
            raise UserError(f"config.{group}.{key} must be at least {least:g} and under {below:g}, found {value}.")


def above_0(group: str, values: Any, *keys: str) -> None:
    """Raises a UserError for the first key of a group whose value is not above 0, or not finite."""
    for key in keys:
        if not 0 < (value := getattr(values, key)) < math.inf:
            raise UserError(f"config.{group}.{key} must be above 0, found {value}.")


def named(group: str, values: Any, **known: tuple[str, ...]) -> None:
    """Raises a UserError for the first key of a group whose value is none of its names."""
    for key, names in known.items():
        if (value := getattr(values, key)) not in names:
            raise UserError(f"config.{group}.{key} must be one of {', '.join(names)}, found {value!r}.")

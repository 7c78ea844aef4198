"""Values of config.json: checks of one key, and how a key or value is shown in a message."""

import sys
from typing import Any

from solar_jax.errors import UserError

LARGEST = (1 << 63) - 1


def shown_key(key: str) -> str:
    """Returns a key as is, or quoted and shortened if it would break a message."""
    return key if key.isprintable() and len(key) <= 80 else shown(key)


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def one_of(value: Any, allowed: tuple[Any, ...], key: str, where: str) -> Any:
    """Returns `value` if allowed; null counts as the first allowed value."""
    if value is None:
        return allowed[0]
    if value not in allowed or type(value) is not type(allowed[0]):
        raise UserError(f"{where}: {key} must be {' or '.join(map(repr, allowed))}, found {shown(value)}.")
    return value


def positive(value: Any, kind: type, key: str, where: str) -> Any:
    """Returns `value` as a positive, finite int or float; ints must fit 64 bits, as other programs require."""
    if type(value) not in (int, kind) or not 0 < value <= (LARGEST if kind is int else sys.float_info.max):
        name = "integer" if kind is int else "number"
        raise UserError(f"{where}: {key} must be a positive {name}, found {shown(value)}.")
    return kind(value)

"""The fields of a request's body, each read with the type that it must have; null counts as absent."""

import json
from collections.abc import Mapping
from typing import Any

from solar_jax.serving.api_errors import ApiError

_SHOWN = 80  # characters of a wrong value


def read_object(body: bytes) -> dict[str, Any]:
    """Reads a body.

    Raises:
      ApiError: it is not JSON, or no object.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as e:
        raise ApiError(f"the body must be JSON, but is not: {e or 'nested too deep'}.") from e
    if not isinstance(found, dict):
        raise ApiError(f"the body must be a JSON object, found {quoted(found)}.")
    return found


def quoted(value: Any) -> str:
    """Writes a wrong value, cut where it is long."""
    try:
        text = json.dumps(value)
    except RecursionError:
        text = "what is nested too deep"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def wrong(name: str, expected: str, value: Any) -> ApiError:
    """The error of a field whose value is not as expected."""
    return ApiError(f"{name} must be {expected}, found {quoted(value)}.", param=name)


def encodable(name: str, text: str) -> str:
    """Returns a text that can be encoded.

    Raises:
      ApiError: it has half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ApiError(f"{name} must be text, but has half of a surrogate pair at {e.start}.", param=name) from e
    return text


def integer(body: Mapping[str, Any], name: str, default: int | None, low: int, high: int) -> int | None:
    """Reads an integer in [low, high]."""
    value = body.get(name)
    if value is None:
        return default
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int or not low <= value <= high:
        raise wrong(name, f"an integer from {low} to {high}", value)
    return value


def number(body: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    """Reads a number in [low, high]."""
    value = body.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not low <= value <= high:
        raise wrong(name, f"a number from {low:g} to {high:g}", value)
    return float(value)


def truth(body: Mapping[str, Any], name: str) -> bool:
    """Reads a boolean, false if absent."""
    value = body.get(name)
    if value is not None and type(value) is not bool:
        raise wrong(name, "true or false", value)
    return bool(value)

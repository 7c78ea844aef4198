"""Strict conversion of nested dicts to frozen dataclasses: every key known, every value of its field's type."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from solar_jax.errors import UserError


def typed(cls: type, values: Any, path: str) -> Any:
    """Converts nested dicts to dataclass `cls`.

    Args:
      cls: a dataclass whose fields are values, tuples of one type, or dataclasses.
      values: what it holds; keys that are missing have their defaults.
      path: name of the tree in messages.

    Raises:
      UserError: a key is unknown, or a value has another type than its field.
    """
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys, found {values!r}.")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise UserError(f"{path}.{key} is not a key of the config; {path} has {', '.join(fields)}.")
    types = typing.get_type_hints(cls)
    out = {}
    for key, value in values.items():
        expected = types[key]
        if dataclasses.is_dataclass(expected):
            out[key] = typed(typing.cast(type, expected), value, f"{path}.{key}")
            continue
        if expected is float and type(value) is int:
            value = float(value)
        if of := typing.get_args(expected):  # a tuple of one type
            value = tuple(value) if isinstance(value, (list, tuple)) else value
            fits = isinstance(value, tuple) and all(type(v) is of[0] for v in value)
        else:
            fits = type(value) is expected
        if not fits:
            raise UserError(f"{path}.{key} must be of type {getattr(expected, '__name__', expected)}, found {value!r}.")
        out[key] = value
    return cls(**out)


def without_old_keys(
    values: dict[str, Any], renamed: Mapping[str, tuple[str, Mapping[Any, Any]]], dropped: Mapping[str, Any]
) -> dict[str, Any]:
    """Rewrites the keys that older versions wrote.

    Args:
      values: groups of keys.
      renamed: "group.key" -> (its new name, {old value: new value}).
      dropped: "group.key" -> the value with which a key that is no more is accepted; others are left to be refused.

    Raises:
      UserError: a value that the new key has no counterpart for.
    """
    for old, (new, counterparts) in renamed.items():
        (group, old_name), new_name = old.split("."), new.split(".")[1]
        keys = values.get(group)
        if not isinstance(keys, dict) or old_name not in keys:
            continue
        keys = dict(keys)
        value = keys.pop(old_name)
        if value not in counterparts:
            raise UserError(f"config.{old} is config.{new} now, which has nothing for {value!r}.")
        values = values | {group: keys | {new_name: counterparts[value]}}
    for old, default in dropped.items():
        group, name = old.split(".")
        keys = values.get(group)
        if isinstance(keys, dict) and name in keys and _listed(keys[name]) == _listed(default):
            values = values | {group: {key: value for key, value in keys.items() if key != name}}
    return values


def _listed(value: Any) -> Any:
    """A tuple as the list that JSON makes of it."""
    return list(value) if isinstance(value, tuple) else value

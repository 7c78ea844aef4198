"""A merge's parameters for one tensor: precedence, filters and gradients, as mergekit resolves them."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from solar_jax.errors import UserError
from solar_jax.merging.recipe import Recipe, Section, Settings

REQUIRED = object()
Scope = Literal["shared", "input", "non_base"]  # one value for all inputs, one of each, or of each but the base


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A number or switch of a merge method."""

    kind: type[float] | type[bool]
    scope: Scope
    default: Any = REQUIRED
    low: float = -math.inf
    high: float = math.inf


@dataclasses.dataclass(frozen=True)
class Values:
    """The parameters of one tensor's merge."""

    shared: Mapping[str, Any]
    of_input: tuple[Mapping[str, Any], ...]  # in the order of the section's sources; {} for a base without any


def values_for(
    parameters: Mapping[str, Parameter], recipe: Recipe, section: Section, position: float, name: str,
    names: Sequence[str],
) -> Values:  # fmt: skip
    """Resolves all parameters for one tensor.

    The first of source, range, module and recipe that has a value for the tensor's name wins.

    Args:
      parameters: of the method.
      recipe: the recipe.
      section: the range of layers that the tensor belongs to.
      position: in the range, 0 for its first layer and 1 for its last (mergekit's `t` of gradients).
      name: the merged model's HF name, that filters of shared parameters match.
      names: the inputs' HF names.

    Raises:
      UserError: a parameter is missing or out of range.
    """
    outer = (section.parameters, *recipe.parameters)
    shared = {
        key: _resolve(key, parameter, outer, position, name)
        for key, parameter in parameters.items()
        if parameter.scope == "shared"
    }
    inputs = []
    for source, own in zip(section.sources, names, strict=True):
        is_base = source.model == section.base
        inputs.append(
            {
                key: _resolve(key, parameter, (source.parameters, *outer), position, own, source.model)
                for key, parameter in parameters.items()
                if parameter.scope == "input" or (parameter.scope == "non_base" and not is_base)
            }
        )
    return Values(shared, tuple(inputs))


def _resolve(
    key: str, parameter: Parameter, places: Iterable[Settings], position: float, name: str, model: str = ""
) -> Any:
    for place in places:
        if key in place and (found := _evaluated(key, parameter, place[key], position, name)) is not None:
            return found
    if parameter.default is REQUIRED:
        raise UserError(f"the parameter {key} is missing for {name}{f' of {model}' if model else ''}.")
    return parameter.default


def _evaluated(key: str, parameter: Parameter, setting: Any, position: float, name: str) -> Any:
    """A setting's value for one tensor; None if no condition holds."""
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list):
        return _checked(key, parameter, setting)
    if any(isinstance(entry, dict) for entry in setting):
        for entry in setting:
            if not isinstance(entry, dict) or "value" not in entry or not set(entry) <= {"value", "filter"}:
                raise UserError(f"parameters.{key}: conditions must be tables of value and filter, found {entry!r}.")
            wanted = entry.get("filter")
            if wanted is None or wanted == "*" or str(wanted) in name:
                return _evaluated(key, parameter, entry["value"], position, name)
        return None
    if not setting:
        return None
    values = [_checked(key, parameter, entry) for entry in setting]
    scaled = position * (len(values) - 1)
    if parameter.kind is bool:
        return values[int(scaled)]
    first = int(scaled)
    second, part = min(len(values) - 1, first + 1), scaled - first
    return (1 - part) * values[first] + part * values[second]


def _checked(key: str, parameter: Parameter, found: Any) -> Any:
    """A value of the parameter's kind and range.

    Raises:
      UserError: it is another thing.
    """
    if parameter.kind is bool:
        if found in (True, False):  # 0 and 1 too
            return bool(found)
        raise UserError(f"parameters.{key} must be true or false, found {found!r}.")
    try:
        number = math.nan if isinstance(found, bool) else float(found)  # YAML 1.1 reads 1e-3 as text
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or not parameter.low <= number <= parameter.high:
        within = f" in [{parameter.low:g}, {parameter.high:g}]" if math.isfinite(parameter.high) else ""
        raise UserError(f"parameters.{key} must be a number{within}, found {found!r}.")
    return number

"""Config files found by path or by name: `configs/dus_48l.py`, `dus_48l`, each with an optional `:ARGUMENT`."""

import pathlib
import runpy
from collections.abc import Mapping
from typing import Any

from solar_jax.cli.config_keys import check_override
from solar_jax.config import Config, resolve
from solar_jax.errors import UserError

_PACKAGE = pathlib.Path(__file__).parents[1]
# In an installed package the recipes lie within it, in a checkout beside it.
FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def recipes() -> dict[str, pathlib.Path]:
    """Returns the recipes that come with the package by name, such as dus_48l or solar/chain."""
    return {
        file.relative_to(folder).with_suffix("").as_posix(): file
        for folder in FOLDERS
        for file in sorted(folder.rglob("*.py"))
    }


def find_config(text: str) -> str:
    """Returns FILE.py[:ARGUMENT] for the value of --config.

    Raises:
      UserError: no file and no recipe has that name.
    """
    path, colon, argument = text.partition(":")
    if pathlib.Path(path).is_file():
        return text
    found = recipes()
    # A path as in the documentation, given where there is no checkout, means the recipe of that name.
    if (name := path.removeprefix("./").removeprefix("configs/").removesuffix(".py")) in found:
        return f"{found[name]}{colon}{argument}"
    raise UserError(f"--config: {path}: no such file, and no recipe of that name; recipes are {', '.join(found)}.")


def load_config(text: str, changes: Mapping[str, Any] | None = None) -> Config:
    """Loads a recipe from Python.

    Args:
      text: as --config takes it: a file or a recipe's name, with an optional `:ARGUMENT`.
      changes: values by key without `config.`, as {"train.steps": 100}.

    Raises:
      UserError: there is no such recipe or key, or a value cannot be.
    """
    file, _, argument = find_config(text).partition(":")
    config = runpy.run_path(file)["get_config"](*([argument] if argument else []))
    for key, value in (changes or {}).items():
        check_override(f"config.{key}")
        *groups, name = key.split(".")
        group = config
        for inner in groups:
            group = group[inner]
        with group.unlocked():
            group[name] = value if not isinstance(value, list) else tuple(value)
    return resolve(config)

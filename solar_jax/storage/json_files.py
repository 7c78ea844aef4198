"""JSON files, local or in a bucket, read and written atomically."""

import json
import pathlib
from typing import Any

from solar_jax.errors import UserError
from solar_jax.storage import paths
from solar_jax.storage.paths import read_small

_MOST_DEPTH = 200


def read_json(file: pathlib.Path, missing: Any = None) -> Any:
    """Returns the value in a file, or `missing` if there is no such file."""
    text = paths.read_text(file)
    return missing if text is None else json.loads(text)


def write_json(file: pathlib.Path, value: Any) -> None:
    paths.write_file(file, json.dumps(value, indent=2) + "\n")


def read_json_object(file: pathlib.Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
      UserError: the file is missing or holds something else.
    """
    try:
        value = json.loads(read_small(file).decode())
    except OSError as e:
        raise UserError(f"{file}: cannot be read: {e.strerror}.") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: is not JSON: {e}.") from e
    if not isinstance(value, dict):
        raise UserError(f"{file}: must hold a JSON object, found {type(value).__name__}.")
    if not _shallow(value):
        raise UserError(f"{file}: nests values more than {_MOST_DEPTH} deep.")
    return value


def _shallow(value: Any) -> bool:
    """Returns whether a JSON value can be printed and written without a stack overflow."""
    level = [value]
    for _ in range(_MOST_DEPTH):
        inner = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list))
        level = [x for values in inner for x in values]
    return not level

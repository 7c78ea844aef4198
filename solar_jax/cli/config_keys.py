"""Every key of the config with its default and the comment beside it, read from the source of `config.py`."""

import dataclasses
import difflib
import inspect
import re
import typing
from collections.abc import Iterator
from typing import Any

from solar_jax.config import RENAMED, Config
from solar_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Key:
    name: str  # config.GROUP.KEY
    kind: str  # its type
    default: str
    comment: str


def config_keys(tree: type = Config) -> Iterator[Key]:
    """Yields the keys of a tree in the order of its source, a group after the other."""
    for cls, prefix in _groups(tree, "config"):
        types, defaults, comments = typing.get_type_hints(cls), cls(), _comments(cls)
        for field in dataclasses.fields(cls):
            if not dataclasses.is_dataclass(types[field.name]):
                kind = getattr(types[field.name], "__name__", "value")
                default = getattr(defaults, field.name)
                yield Key(f"{prefix}.{field.name}", kind, repr(default), comments.get(field.name, ""))


def _groups(tree: type, prefix: str) -> Iterator[tuple[type, str]]:
    types = typing.get_type_hints(tree)
    yield tree, prefix
    for field in dataclasses.fields(tree):
        if dataclasses.is_dataclass(inner := types[field.name]):
            yield from _groups(typing.cast(type, inner), f"{prefix}.{field.name}")


def _comments(cls: type) -> dict[str, str]:
    """Returns the comment of each field: above it, and at the end of its line and of the lines that go on with it."""
    found: dict[str, list[str]] = {}
    above: list[str] = []
    for line in inspect.getsource(cls).splitlines():
        if match := re.match(r"    # ?(.*)", line):
            above.append(match[1])
        elif match := re.match(r"    (\w+): [^#]*(?:# (.*))?$", line):
            found[match[1]] = above + ([match[2]] if match[2] else [])
            above = []
        elif line.startswith("    def "):
            break
    return {name: " ".join(parts) for name, parts in found.items()}


def check_override(path: str, tree: type = Config) -> None:
    """Raises a UserError unless `path`, as in `--config.train.steps`, is a key of the tree."""
    if (new := RENAMED.get(path.removeprefix("config."))) is not None:
        raise UserError(f"{path} is not a key of the config any more; it is config.{new[0]} now.")
    cls: Any = tree
    done = "config"
    for key in path.split(".")[1:]:
        names = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
        if key not in names:
            near = difflib.get_close_matches(key, names, 1)
            hint = (
                f"did you mean {done}.{near[0]}?" if near else f"{done} has {', '.join(names) or 'no keys of its own'}."
            )
            raise UserError(f"{done}.{key} is not a key of the config; {hint}")
        cls = typing.get_type_hints(cls)[key]
        done += f".{key}"

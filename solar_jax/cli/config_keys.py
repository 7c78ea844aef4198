"""Every key of the config with its default and the comment beside it, read from the source of `config.py`."""

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator

from solar_jax.config import Config


@dataclasses.dataclass(frozen=True)
class Key:
    name: str  # config.GROUP.KEY
    kind: str  # its type
    default: str
    comment: str


def config_keys() -> Iterator[Key]:
    """Yields the keys in the order of `config.py`, a group after the other."""
    for cls, prefix in _groups():
        types, defaults, comments = typing.get_type_hints(cls), cls(), _comments(cls)
        for field in dataclasses.fields(cls):
            if not dataclasses.is_dataclass(types[field.name]):
                kind = getattr(types[field.name], "__name__", "value")
                default = getattr(defaults, field.name)
                yield Key(f"{prefix}.{field.name}", kind, repr(default), comments.get(field.name, ""))


def _groups() -> list[tuple[type, str]]:
    types = typing.get_type_hints(Config)
    inner = [(types[f.name], f"config.{f.name}") for f in dataclasses.fields(Config)]
    return [(Config, "config"), *((cls, prefix) for cls, prefix in inner if dataclasses.is_dataclass(cls))]


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

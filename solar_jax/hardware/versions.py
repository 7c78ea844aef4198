"""Versions of what compiles and runs a program."""

import importlib.metadata
from collections.abc import Sequence

COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")


def installed_versions(packages: Sequence[str]) -> dict[str, str]:
    """Returns the version of each package that is installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # no libtpu off TPUs
            continue
    return found

"""Compiled programs kept from one start to the next, in jax's persistent cache."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

_HIT = "/jax/compilation_cache/cache_hits"


def use_cache(wanted: bool) -> None:
    """Turns the cache on or off; call before anything is compiled.

    A folder that JAX_COMPILATION_CACHE_DIR names is used; without it one under the user's cache folder.
    """
    jax.config.update("jax_enable_compilation_cache", wanted)
    if wanted and not jax.config.jax_compilation_cache_dir:  # which jax takes from the environment
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(base) / "solar_jax" / "compiled"))


@contextlib.contextmanager
def cache_hits() -> Iterator[list[str]]:
    """A list that gets one entry for every program that is taken from the cache instead of compiled."""
    hits: list[str] = []

    def listen(event: str, **_: Any) -> None:
        if event == _HIT:
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(listen)

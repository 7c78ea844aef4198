"""Persistent compilation cache: reuses compiled programs across restarts."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

_HIT = "/jax/compilation_cache/cache_hits"


def use_cache(wanted: bool) -> None:
    """Turns the cache on or off; call before anything is compiled.

    The cache is in JAX_COMPILATION_CACHE_DIR if that is set, otherwise under the user's cache folder.
    """
    jax.config.update("jax_enable_compilation_cache", wanted)
    if wanted and not jax.config.jax_compilation_cache_dir:  # jax reads this from the environment
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(base) / "solar_jax" / "compiled"))


@contextlib.contextmanager
def cache_hits() -> Iterator[list[str]]:
    """Yields a list that gains one entry for every program loaded from the cache instead of compiled."""
    hits: list[str] = []

    def listen(event: str, **_: Any) -> None:
        if event == _HIT:
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(listen)

"""lineage.json: a checkpoint's provenance, stored with every checkpoint and nesting its parents' records."""

import datetime
import functools
import hashlib
import importlib.metadata
import json
import pathlib
import platform
import re
import sys
from collections.abc import Sequence
from typing import Any

from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.checkpoints.write_hf import json_text
from solar_jax.storage.paths import byte_size, is_local

PACKAGES = ("solar_jax", "jax", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy", "ml_dtypes", "gguf")
_PATH = re.compile(r"(^|[=:,])(?:~|/)(?:[^/=:,?]*/)*([^/=:,?]*)")
_HEAD, _SAMPLES, _SAMPLE_BYTES = 1 << 20, 256, 4096


@functools.cache
def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that a conversion's result depends on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def fingerprint(c: Checkpoint) -> dict[str, Any]:
    """Identifies an opened checkpoint's weights by name, size and sampled hash of every file."""
    return {
        "where": c.where,
        "config_sha256": hashlib.sha256(json.dumps(c.hf_config, sort_keys=True).encode()).hexdigest(),
        "files": [{"name": f.name, "bytes": byte_size(f), "sample_sha256": sample_sha256(f)} for f in c.files],
    } | ({"not_read": list(c.unread)} if c.unread else {})


def public(where: str) -> str:
    """Returns a place without the folders above it: a name, a hub id, or a bucket's URL."""
    if not is_local(where):
        return where
    if repository := re.search(r"models--(.+?)--(.+?)/snapshots/(\w+)", where):
        return f"{repository[1]}/{repository[2]}@{repository[3]}"
    parts = pathlib.PurePath(where).parts
    is_step = len(parts) > 2 and parts[-1].isdigit()  # RUN/checkpoints/STEP
    return "/".join(parts[-3:]) if is_step else parts[-1]


def public_command(argv: Sequence[str]) -> list[str]:
    """Returns a command line in which absolute local paths are reduced to their last part."""
    name = pathlib.PurePath(argv[0]).stem
    return [name, *(arg if "://" in arg else _PATH.sub(r"\1\2", arg) for arg in argv[1:])]


def sample_sha256(file: pathlib.Path) -> str:
    """Returns the SHA-256 of a file's size, its first MiB and 256 blocks of 4 KiB spread evenly up to the last byte.

    It distinguishes files of many GB in milliseconds, but does not prove that every byte is equal: the full hashes of
    a certificate do.
    """
    size = byte_size(file)
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with file.open("rb") as f:
        digest.update(f.read(_HEAD))
        last = max(size - _SAMPLE_BYTES, 0)
        if size > _HEAD:
            for i in range(_SAMPLES):
                f.seek(last * i // (_SAMPLES - 1))
                digest.update(f.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def public_fingerprint(c: Checkpoint) -> dict[str, Any]:
    """`fingerprint` for a file that travels with the model."""
    return fingerprint(c) | {"where": public(c.where)}


def lineage_record(c: Checkpoint, made_by: str, **more: Any) -> dict[str, Any]:
    """Builds the content of lineage.json for a checkpoint that is about to be written.

    Args:
      c: the checkpoint, usually a view; its `source` is the parent.
      made_by: "upscale", "convert", "merge" or "train".
      more: additional keys, with JSON values.
    """
    layer_map = c.layer_map
    return {
        "made_by": made_by,
        "command": public_command(sys.argv),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "operator": layer_map.operator,
        "source_layers": list(layer_map.source),
        "partner_layers": None if layer_map.partner == layer_map.source else list(layer_map.partner),
        "scale": None if set(layer_map.scale) == {1.0} else list(layer_map.scale),
        **({"mix": layer_map.mix} if layer_map.mix != "mean" else {}),
        **({"noise": list(layer_map.noise)} if any(layer_map.noise) else {}),
        **more,
        "source": public_fingerprint(c.source),
        **({"merge": _public_values(c.source.recipe)} if c.source.recipe else {}),
        "versions": versions(),
        "parents": [x.lineage for x in c.source.merged_from or (c,) if x.lineage],
    }


def _public_values(value: Any) -> Any:
    """JSON in which every local path is reduced as `public` does."""
    if isinstance(value, dict):
        return {key: _public_values(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_public_values(one) for one in value]
    return public(value) if isinstance(value, str) and value.startswith(("/", "~", ".")) else value


def write_record(folder: pathlib.Path, content: dict[str, Any], name: str) -> None:
    """Writes a record into a checkpoint folder that does not have its final name yet."""
    (folder / name).write_text(json_text(content))

"""lineage.json: where a checkpoint comes from; it travels with every checkpoint and holds its parents' in turn."""

import datetime
import functools
import hashlib
import importlib.metadata
import json
import pathlib
import platform
import sys
from typing import Any

from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.checkpoints.write_hf import json_text
from solar_jax.storage.paths import byte_size

PACKAGES = ("solar_jax", "jax", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy", "ml_dtypes", "gguf")
_HEAD, _SAMPLES, _SAMPLE_BYTES = 1 << 20, 256, 4096


@functools.cache
def versions() -> dict[str, str]:
    """Of Python and of the packages that a conversion's result depends on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def fingerprint(c: Checkpoint) -> dict[str, Any]:
    """Name, size and a hash of samples of every file of an opened checkpoint, which tell its weights from others'."""
    return {
        "where": c.where,
        "config_sha256": hashlib.sha256(json.dumps(c.hf_config, sort_keys=True).encode()).hexdigest(),
        "files": [{"name": f.name, "bytes": byte_size(f), "sample_sha256": sample_sha256(f)} for f in c.files],
    }


def sample_sha256(file: pathlib.Path) -> str:
    """SHA-256 of a file's size, its first MiB, and 256 blocks of 4 KiB spread evenly over it to the last byte.

    A file of many GB is told from another in milliseconds. It is no proof that every byte is the same: that is what
    the full hashes of a certificate are for.
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


def lineage_record(c: Checkpoint, made_by: str, **more: Any) -> dict[str, Any]:
    """The content of lineage.json of a checkpoint that is about to be written.

    Args:
      c: the checkpoint, usually a view; its `source` is the parent.
      made_by: "upscale", "convert" or "train".
      more: further keys, as JSON.
    """
    layer_map = c.layer_map
    return {
        "made_by": made_by,
        "command": [pathlib.Path(sys.argv[0]).stem, *sys.argv[1:]],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "operator": layer_map.operator,
        "source_layers": list(layer_map.source),
        "partner_layers": None if layer_map.partner == layer_map.source else list(layer_map.partner),
        "scale": None if set(layer_map.scale) == {1.0} else list(layer_map.scale),
        **more,
        "source": fingerprint(c.source),
        "versions": versions(),
        "parents": [c.lineage] if c.lineage else [],
    }


def write_record(folder: pathlib.Path, content: dict[str, Any], name: str) -> None:
    """Puts a record into a checkpoint's folder, which does not have its name yet."""
    (folder / name).write_text(json_text(content))

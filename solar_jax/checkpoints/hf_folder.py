"""Opens a folder of safetensors or .bin files and checks it without reading any weights."""

import pathlib
from typing import Any

import numpy as np

from solar_jax.checkpoints.checkpoint import Checkpoint, some
from solar_jax.checkpoints.companions import LINEAGE, companions, inside
from solar_jax.checkpoints.hf_config import model_config
from solar_jax.errors import UserError
from solar_jax.formats import safetensors, torch_zip
from solar_jax.formats.safetensors import MOST_NAME, Entry, read_tensor, short
from solar_jax.storage.json_files import read_json_object

INDEX = "model.safetensors.index.json"
# Weight formats, preferred first: (glob of one or several files, index that lists them, header reader).
FORMATS = (
    ("*.safetensors", INDEX, safetensors.read_header),
    ("pytorch_model*.bin", "pytorch_model.bin.index.json", torch_zip.read_header),
)


def open_folder(folder: pathlib.Path) -> Checkpoint:
    hf_config = read_json_object(inside(folder, "config.json"))
    entries = _entries(folder)
    for name, entry in entries.items():
        if entry.code not in safetensors.DTYPES and not name.endswith(".rotary_emb.inv_freq"):
            known = ", ".join(safetensors.DTYPES)
            raise UserError(f"{entry.file}: {name} must be one of {known}, found {entry.code}.")
    return Checkpoint(
        where=str(folder),
        hf_config=hf_config,
        cfg=model_config(hf_config, str(folder / "config.json")),
        companions=companions(folder),
        shape_of={name: entry.shape for name, entry in entries.items()},
        dtype_of={name: safetensors.DTYPES.get(e.code, np.dtype(np.float32)) for name, e in entries.items()},
        read=lambda name, rows=slice(None): read_tensor(name, entries[name], rows),
        entry_of=entries,
        files=tuple(sorted({entry.file for entry in entries.values()})),
        lineage=lineage(folder),
    )


def lineage(folder: pathlib.Path) -> dict[str, Any] | None:
    """Returns the content of a checkpoint's lineage.json, or None if it has none."""
    return read_json_object(inside(folder, LINEAGE)) if (folder / LINEAGE).is_file() else None


def _entries(folder: pathlib.Path) -> dict[str, Entry]:
    """Returns every weight tensor of a folder, from one file or the files that the index lists."""
    for pattern, index, read_header in FORMATS:
        if (folder / index).exists():
            return _indexed(folder, index, read_header)
        files = sorted(f for f in folder.glob(pattern) if not f.name.startswith("consolidated"))
        if len(files) == 1:
            entries = read_header(inside(folder, files[0].name))
            if not entries:
                raise UserError(f"{files[0]}: holds no tensors.")
            return entries
        if files:
            raise UserError(f"{folder}: expected one {pattern} file, or several with {index}, found {len(files)}.")
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a checkpoint folder.")
    raise UserError(f"{folder}: expected weights as one .safetensors file, or several with {INDEX}, found none.")


def _is_name(file: Any) -> bool:
    """Returns whether `file` is a valid file name without a folder part."""
    if not isinstance(file, str) or not file.isprintable() or len(file.encode()) > 255:
        return False
    return pathlib.PurePath(file).name == file and file not in ("", "..")


def _indexed(folder: pathlib.Path, index: str, read_header: Any) -> dict[str, Entry]:
    weight_map = read_json_object(inside(folder, index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / index}: weight_map must map tensors to files, found {type(weight_map).__name__}.")
    headers, entries, elsewhere = {}, {}, set()
    for name, file in weight_map.items():
        if not name.isprintable() or len(name) > MOST_NAME:
            raise UserError(f"{folder / index}: a tensor's name must be printable and short, found {short(name)}.")
        if not _is_name(file):
            raise UserError(f"{folder / index}: {name} must lie in a file of this folder, found {short(file)}.")
        if file not in headers:
            headers[file] = read_header(inside(folder, file))
        if name not in headers[file]:
            raise UserError(f"{folder / file}: tensor {name} is missing, but {index} maps it to this file.")
        entries[name] = headers[file][name]
    for file, header in headers.items():
        elsewhere |= {name for name in header if weight_map.get(name) != file}
    if elsewhere:
        raise UserError(f"{folder / index}: must map {some(elsewhere)} to the files that hold them.")
    return entries

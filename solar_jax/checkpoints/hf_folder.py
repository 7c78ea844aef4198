"""Opens a folder of safetensors or .bin files and checks it without reading any weights."""

import pathlib
from typing import Any

from solar_jax.checkpoints.checkpoint import Checkpoint, some
from solar_jax.checkpoints.companions import LINEAGE, companions, inside, one_snapshot
from solar_jax.checkpoints.hf_config import model_config
from solar_jax.checkpoints.resolve import is_derived
from solar_jax.errors import UserError
from solar_jax.formats import safetensors, torch_zip
from solar_jax.formats.safetensors import MOST_NAME, Entry, read_tensor, short
from solar_jax.storage.json_files import read_json_object

INDEX = "model.safetensors.index.json"
# Weight formats in transformers' order: (file of a model in one, index of several, glob of both, header reader).
FORMATS = (
    ("model.safetensors", INDEX, "*.safetensors", safetensors.read_header),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model*.bin", torch_zip.read_header),
)
_NAMED = 4  # files that a message names
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
# Files of tensors that are no model: Mistral's native format, adapters, the state of a training program.
_NO_MODEL = ("consolidated*", "adapter_*", "optimizer*", "training_args*", "scheduler*", "rng_state*")


def open_folder(folder: pathlib.Path) -> Checkpoint:
    """Opens a Hugging Face folder; where it holds weights several times, as transformers chooses, or not at all.

    Raises:
      UserError: a file is missing or damaged, or which weights are meant is open.
    """
    hf_config = read_json_object(inside(folder, "config.json"))
    cfg = model_config(hf_config, str(folder / "config.json"))  # before the weights, which need not be of a known kind
    entries = _entries(folder)
    entries = {n: e for n, e in entries.items() if e.code in safetensors.DTYPES or not is_derived(n)}
    for name, entry in entries.items():
        if entry.code not in safetensors.DTYPES:
            known = ", ".join(safetensors.DTYPES)
            raise UserError(f"{entry.file}: {name} must be one of {known}, found {entry.code}.")
    files = tuple(sorted({entry.file for entry in entries.values()}))
    unread = _unread(folder, files)
    one_snapshot([folder / "config.json", *files])
    return Checkpoint(
        where=str(folder),
        hf_config=hf_config,
        cfg=cfg,
        companions=companions(folder),
        shape_of={name: entry.shape for name, entry in entries.items()},
        dtype_of={name: safetensors.DTYPES[entry.code] for name, entry in entries.items()},
        read=lambda name, rows=slice(None): read_tensor(name, entries[name], rows),
        entry_of=entries,
        files=files,
        unread=unread,
        lineage=lineage(folder),
    )


def _unread(folder: pathlib.Path, files: tuple[pathlib.Path, ...]) -> tuple[str, ...]:
    """Returns the names of other files of weights, and tells them.

    Raises:
      UserError: one is an adapter, which transformers applies to its base.
    """
    there = [f.name for f in folder.iterdir() if any(f.match(pattern) for pattern in _WEIGHTS)]
    unread = tuple(sorted(set(there) - {file.name for file in files}))
    adapters = [name for name in unread if name.startswith("adapter_model")]
    if adapters and (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder}: holds a model, {files[0].name}, and an adapter, {adapters[0]}; merge the adapter first (PEFT's "
            "merge_and_unload), or move one of them away."
        )
    if unread:
        read = files[0].name if len(files) == 1 else f"the {len(files)} files of its index"
        print(f"{folder}: reads {read}; not read: {', '.join(unread[:_NAMED])}{' ...' * (len(unread) > _NAMED)}")
    return unread


def lineage(folder: pathlib.Path) -> dict[str, Any] | None:
    """Returns the content of a checkpoint's lineage.json, or None if it has none."""
    return read_json_object(inside(folder, LINEAGE)) if (folder / LINEAGE).is_file() else None


def _entries(folder: pathlib.Path) -> dict[str, Entry]:
    """Returns every weight tensor of a folder, from one file or the files that the index lists."""
    for single, index, pattern, read_header in FORMATS:
        files = sorted(f.name for f in folder.glob(pattern) if not any(f.match(other) for other in _NO_MODEL))
        if (folder / index).exists():
            entries = _indexed(folder, index, read_header)
            if single in files and all(entry.file.name != single for entry in entries.values()):
                raise UserError(
                    f"{folder}: holds two models, {single} and the files that {index} lists; transformers reads the "
                    "first, other programs the second, so move one of them away."
                )
            return entries
        if single in files or len(files) == 1:
            file = single if single in files else files[0]
            entries = read_header(inside(folder, file))
            if not entries:
                raise UserError(f"{folder / file}: holds no tensors.")
            return entries
        if files:
            found = ", ".join(files[:_NAMED])
            raise UserError(f"{folder}: expected {single}, or several files with {index}, found {found}.")
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

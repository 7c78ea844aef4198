"""Opens SRC, the same in every command: an HF folder, hub id, .gguf file, one of our own checkpoints or "smollm2"."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np

from solar_jax.checkpoints.adapters import OWN, OwnAdapter, adapted, is_peft, lows_of, open_peft
from solar_jax.checkpoints.checkpoint import Checkpoint, row_unit
from solar_jax.checkpoints.companions import companions, inside
from solar_jax.checkpoints.find import find_checkpoint
from solar_jax.checkpoints.hf_config import model_config
from solar_jax.checkpoints.hf_folder import lineage, open_folder
from solar_jax.checkpoints.resolve import check_tensors, resolved
from solar_jax.checkpoints.tensor_table import TENSORS, hf_shape, hf_tensors, to_hf
from solar_jax.config import LoraConfig
from solar_jax.errors import UserError
from solar_jax.model.lora import adapter_axes
from solar_jax.model.shapes import param_shapes
from solar_jax.orbax_store.arrays import array_paths, open_array
from solar_jax.orbax_store.checksums import name_of
from solar_jax.orbax_store.layout import MODEL_FOLDER, newest
from solar_jax.storage.json_files import read_json_object
from solar_jax.storage.paths import is_local


def open_checkpoint(source: str) -> Checkpoint:
    """Opens what SRC names and checks that its tensors are exactly those of its config; no weights are read yet.

    Raises:
      UserError: nothing found, damaged files, an unsupported architecture, or tensors that are missing, unknown or of
        the wrong shape.
    """
    path = find_checkpoint(source)
    if is_peft(path):
        return open_peft(path, open_checkpoint)
    if path.is_file():
        checkpoint = _open_gguf(path)
    elif (path / MODEL_FOLDER / "config.json").exists():
        checkpoint = _open_adapter(path) if (path / MODEL_FOLDER / OWN).exists() else _open_own(path)
    else:
        checkpoint = open_folder(path)
    checkpoint = resolved(checkpoint)
    check_tensors(checkpoint)
    return checkpoint


def _open_own(folder: pathlib.Path) -> Checkpoint:
    """Opens the newest checkpoint of a run, or one that `convert --to orbax` wrote."""
    model = folder / MODEL_FOLDER
    hf_config = read_json_object(inside(model, "config.json"))
    cfg = model_config(hf_config, str(model / "config.json"))
    step = _newest(folder)
    expected = {name_of(p): s.shape for p, s in jax.tree.leaves_with_path(param_shapes(cfg))}
    try:
        arrays = {path: open_array(step / "params", path) for path in array_paths(step / "params")}
    except (ValueError, OSError) as e:
        raise UserError(f"{step}: cannot be read; is it damaged?") from e
    for path, array in arrays.items():
        if expected.pop(path, None) != array.shape:
            raise UserError(f"{step}: {path} of shape {array.shape} does not match {model / 'config.json'}.")
    if expected:
        raise UserError(f"{step}: {', '.join(sorted(expected))} of {model / 'config.json'} are missing.")
    tensors = {name: (path, layer) for name, path, layer in hf_tensors(cfg)}

    def read(name: str, rows: slice = slice(None)) -> np.ndarray:
        path, layer = tensors[name]
        row, unit = TENSORS[path], row_unit(path, cfg)
        start, stop, _ = rows.indices(hf_shape(path, cfg)[0])
        index: list[Any] = [slice(None)] * len(row.axes)
        index[row.axes.index(row.hf_axes[0][0])] = slice(start // unit, stop // unit)
        try:
            x = arrays[path][tuple(index) if layer is None else (layer, *index)].read().result()
        except (ValueError, OSError) as e:
            raise UserError(f"{step}: {path} cannot be read; is it damaged?") from e
        # As plain integers: numpy moves them several times faster than bfloat16, which it does not support natively.
        return to_hf(x.view(f"u{x.dtype.itemsize}"), path, cfg).view(x.dtype)

    return Checkpoint(
        where=str(step),
        hf_config=hf_config,
        cfg=cfg,
        companions=companions(model),
        shape_of={name: hf_shape(path, cfg) for name, (path, _) in tensors.items()},
        dtype_of={name: arrays[path].dtype.numpy_dtype for name, (path, _) in tensors.items()},
        read=read,
        files=(step / "params" / "manifest.ocdbt",),  # which lists all others by hash
        lineage=lineage(model),
    )


def _open_adapter(folder: pathlib.Path) -> Checkpoint:
    """Opens the newest checkpoint of a run that trains adapters: its base with them applied."""
    own, step = OwnAdapter.read(folder / MODEL_FOLDER / OWN), _newest(folder)
    adapter = read_adapter(step, own.lora)
    base = own.base(open_checkpoint)
    c = adapted(base, lows_of(adapter, own.lora, own.layers))
    return dataclasses.replace(
        c,
        where=str(step),
        companions=companions(folder / MODEL_FOLDER),
        files=(*base.files, step / "params" / "manifest.ocdbt"),
        lineage=lineage(folder / MODEL_FOLDER),
    )


def read_adapter(step: pathlib.Path, lora: LoraConfig) -> dict[str, np.ndarray]:
    """Reads a checkpoint's adapter: the arrays of `model.lora` by name, float32.

    Raises:
      UserError: an array is missing or damaged.
    """
    try:
        return {
            name: np.asarray(open_array(step / "params", f"lora/{name}").read().result(), np.float32)
            for name in adapter_axes(lora)
        }
    except (ValueError, OSError, KeyError) as e:
        raise UserError(f"{step}: its adapter cannot be read; is it damaged?") from e


def _newest(folder: pathlib.Path) -> pathlib.Path:
    """The newest checkpoint of a folder, none of whose files lies elsewhere."""
    step = newest(folder)
    if step is None:
        raise UserError(f"{folder}: holds no checkpoint yet.")
    if is_local(step):
        for file in step.rglob("*"):
            if not file.is_dir() or file.is_symlink():
                inside(step, str(file.relative_to(step)))
    return step


def _open_gguf(path: pathlib.Path) -> Checkpoint:
    from solar_jax.checkpoints import gguf  # imported here: slow, and only GGUF files need it

    file = gguf.open_gguf(path)
    dtypes = gguf.dtypes(file)
    hf_config = gguf.hf_config(file)
    if len(kinds := {dtype.name for dtype in dtypes.values()}) == 1:
        hf_config |= {"dtype": kinds.pop()}
    return Checkpoint(
        where=str(path),
        hf_config=hf_config,
        cfg=model_config(hf_config, str(path)),
        companions=gguf.tokenizer_files(file) | {"generation_config.json": _generation_config(hf_config)},
        shape_of={name: file.shape(name) for name in file.tensors},
        dtype_of=dtypes,
        read=lambda name, rows=slice(None): file.read(name, rows).astype(dtypes[name], copy=False),
        files=(path,),
    )


def _generation_config(hf_config: dict[str, Any]) -> bytes:
    ids = {k: v for k, v in hf_config.items() if k.endswith("_token_id")}
    return json.dumps(ids, indent=2).encode()

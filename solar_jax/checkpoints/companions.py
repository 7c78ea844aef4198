"""Small files of a checkpoint folder: which ones are copied with a model, and a check that none lies elsewhere."""

import glob
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from solar_jax.errors import UserError
from solar_jax.storage.paths import is_local, read_small

LINEAGE = "lineage.json"
CERTIFICATE = "certificate.json"
CANDIDATES = "candidates.json"  # measures of the merges among which this one was chosen
CARD, BASE_CARD = "README.md", "README.base.md"  # the model's own card, and that of the model that it was made from
TEMPLATE, TOKENIZER_CONFIG, GENERATION = "chat_template.jinja", "tokenizer_config.json", "generation_config.json"
# Not copied to checkpoints made from this one: weights in any format, and files that describe only those weights.
LEFT_BEHIND = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ckpt", "*.index.json",
    "config.json", LINEAGE, CERTIFICATE, CANDIDATES, "README.md", ".*", "training_args*", "trainer_state.json",
    "optimizer*", "*_results.json", "consolidated*", "params.json",  # the last two: Mistral's and Meta's native formats
)  # fmt: skip


def companions(folder: pathlib.Path) -> dict[str, bytes]:
    """Returns the files that every model made from a checkpoint inherits: tokenizer, templates, generation config."""
    found = {}
    try:
        for path in sorted(_walk(folder)):
            name = path.relative_to(folder).as_posix()
            if any(pathlib.PurePath(path.name).match(pattern) for pattern in LEFT_BEHIND):
                continue
            found[name] = read_small(inside(folder, name))
        # A card beside a lineage is ours, of that model alone.
        if BASE_CARD not in found and not (folder / LINEAGE).exists() and (folder / CARD).is_file():
            found[BASE_CARD] = read_small(inside(folder, CARD))
    except OSError as e:
        raise UserError(f"{e.filename or folder}: cannot be read: {e.strerror}.") from e
    return found


def _object(found: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        content = json.loads(found.get(name, b"{}"))
    except ValueError as e:
        raise UserError(f"{name} is not JSON: {e}.") from e
    return content if isinstance(content, dict) else {}


def template_files(text: str, found: Mapping[str, bytes]) -> dict[str, bytes]:
    """Returns the files that make `text` the chat template of a model with the companions `found`."""
    files, config = {TEMPLATE: text.encode()}, _object(found, TOKENIZER_CONFIG)
    if config.pop("chat_template", None) is not None:  # the file alone counts then
        files[TOKENIZER_CONFIG] = json.dumps(config, indent=2, ensure_ascii=False).encode()
    return files


def template_text(found: Mapping[str, bytes]) -> str | None:
    """Returns the default chat template of a model with the companions `found`."""
    if TEMPLATE in found:
        return found[TEMPLATE].decode()
    own = _object(found, TOKENIZER_CONFIG).get("chat_template")
    if isinstance(own, list):  # named templates
        named = [one for one in own if isinstance(one, dict)]
        own = next((one.get("template") for one in named if one.get("name") == "default"), None)
    return own if isinstance(own, str) else None


def with_end(found: Mapping[str, bytes], eos: Any, end: int) -> dict[str, bytes]:
    """Returns generation_config.json if it must be changed so that generation stops at the token `end` too.

    Args:
      found: the companions.
      eos: `eos_token_id` of config.json, which counts where generation_config.json has none.
      end: the token that ends an answer.
    """
    content = _object(found, GENERATION)
    known = content.get("eos_token_id", eos)
    ids = known if isinstance(known, list) else [] if known is None else [known]
    if end in ids:
        return {}
    return {GENERATION: json.dumps(content | {"eos_token_id": [*ids, end]}, indent=2).encode()}


def _walk(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the files of a folder and of the one kind of subfolder that checkpoints have beside weights."""
    for path in folder.iterdir():
        if path.is_file():
            yield path
        elif path.name == "additional_chat_templates" and path.is_dir():
            yield from (p for p in path.iterdir() if p.is_file())


def inside(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Returns the path of a file in a folder and rejects symlinks that leave the folder.

    Only the hub's cache may be linked to: its snapshots consist of links into `blobs` of the same repository, and a
    folder that was downloaded with links has links to those.

    Raises:
      UserError: the file lies elsewhere or is not a regular file.
    """
    path = folder / name
    if not is_local(path):
        return path
    try:
        real, root = path.resolve(), folder.resolve()
        odd = path.exists() and not path.is_file()  # reading a pipe would block
    except (OSError, RuntimeError) as e:  # name too long, or a symlink loop
        raise UserError(f"{path}: cannot be read: {e}.") from e
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    is_own = real.is_relative_to(root) or (blobs is not None and real.is_relative_to(blobs))
    if not is_own and snapshot_of(real, name) is None:
        raise UserError(
            f"{path}: must lie in its folder, found a link to {real}; replace it by a copy "
            f"(cp --remove-destination {real} {path}), or give the folder that it links to."
        )
    if odd:
        raise UserError(f"{path}: must be a file.")
    return path


def snapshot_of(real: pathlib.Path, name: str) -> pathlib.Path | None:
    """Returns the snapshot in a hub cache that has `real` under a name, or None: models--*/snapshots/REVISION.

    Args:
      real: a resolved path, in a snapshot or in the `blobs` that snapshots link to.
      name: the file's name in the checkpoint's folder.
    """
    for repository in real.parents:
        if repository.name.startswith("models--"):
            links = sorted(repository.glob(f"snapshots/*/{glob.escape(name)}"))
            return next((link.parents[name.count("/")] for link in links if link.resolve() == real), None)
    return None


def one_snapshot(files: list[pathlib.Path]) -> None:
    """Raises a UserError if files of a folder are links into the hub's cache, but not into one repository."""
    found = {}
    for file in files:
        if is_local(file) and (snapshot := snapshot_of(file.resolve(), file.name)):
            found.setdefault(snapshot.parent.parent.name, file)
    if len(found) > 1:
        (one, file), (other, second) = list(found.items())[:2]
        raise UserError(f"{file}: is linked to {one}, but {second.name} to {other}; both must be of one repository.")

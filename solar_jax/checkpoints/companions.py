"""Small files of a checkpoint folder: which ones are copied with a model, and a check that none lies elsewhere."""

import pathlib
from collections.abc import Iterator

from solar_jax.errors import UserError
from solar_jax.storage.paths import is_local, read_small

LINEAGE = "lineage.json"
CERTIFICATE = "certificate.json"
# Not copied to checkpoints made from this one: weights in any format, and files that describe only those weights.
LEFT_BEHIND = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ckpt", "*.index.json",
    "config.json", LINEAGE, CERTIFICATE, "README.md", ".*", "training_args*", "trainer_state.json", "optimizer*",
    "*_results.json", "consolidated*", "params.json",  # the last two: Mistral's and Meta's native formats
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
    except OSError as e:
        raise UserError(f"{e.filename or folder}: cannot be read: {e.strerror}.") from e
    return found


def _walk(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the files of a folder and of the one kind of subfolder that checkpoints have beside weights."""
    for path in folder.iterdir():
        if path.is_file():
            yield path
        elif path.name == "additional_chat_templates" and path.is_dir():
            yield from (p for p in path.iterdir() if p.is_file())


def inside(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Returns the path of a file in a folder and rejects symlinks that leave the folder.

    Only the hub's cache may link outside: its snapshots consist of links into `blobs` of the same repository.

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
    allowed = [root] + ([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])
    if not any(real.is_relative_to(a) for a in allowed):
        raise UserError(f"{path}: must lie in its folder, found a link to {real}.")
    if odd:
        raise UserError(f"{path}: must be a file.")
    return path

"""Random access to folders written by `prepare`: manifest.json and ArrayRecord shards of packed rows.

A folder may hold several sources. Each then has its own manifest next to manifest.json, which config.data.sources may
name instead of the folder, so that every source can have its own weight.

ArrayRecord only reads local files. For a folder in a bucket, the manifest is read from the bucket, and a shard is
copied to the local temporary folder on the first access to one of its rows; the copies are kept for the next run.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any, SupportsIndex

import numpy as np
import tokenizers
from etils import epath

from solar_jax.config import DataConfig
from solar_jax.data.chat.encoding import Rules
from solar_jax.data.packing import Row, unpack
from solar_jax.data.prepared import records
from solar_jax.errors import UserError
from solar_jax.storage import paths
from solar_jax.storage.paths import is_local
from solar_jax.storage.retry import retry

FORMAT = 1
MANIFEST = "manifest.json"
OF_SOURCE = ".manifest.json"  # suffix of the manifest of one of several sources
_OPEN_FILES = 256  # at most, at a time


@dataclasses.dataclass(frozen=True)
class PreparedRows:
    """Random access to the training or held-out rows of a prepared folder; row i is a pure function of i."""

    folder: str
    packing: str
    length: int  # T
    mask_documents: bool
    dtype: str  # of stored tokens
    shards: tuple[tuple[str, int], ...]  # name and number of rows of each
    files: tuple[tuple[str, ...], ...]  # for each shard, the file names that its records refer to by index
    targets: int  # as counted in the manifest
    key: str  # hash of the manifest, which keeps local copies of different folders apart
    marked: bool = False  # whether the rows are of records, which say what is trained

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, index: SupportsIndex) -> Row:
        tokens, sizes, trained = self.sequences(int(index))
        return unpack(self.packing, tokens, sizes, self.length, self.mask_documents, trained)

    def sequences(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Returns row `index`: tokens [N], sizes [P], and which tokens are trained [N] bool, None for all."""
        _, (tokens, sizes, _), trained = self._pieces(index)
        return tokens, sizes, trained

    @property
    def tokens(self) -> int:
        """Number of targets with weight above 0, over all rows."""
        return self.targets if self.mask_documents else len(self) * self.length

    def documents(self, index: int) -> list[str]:
        """Returns the ids of the documents in a row, in the row's order."""
        shard, (_, _, places), _ = self._pieces(index)
        names = (records.name(self.files[shard][file], record) for file, record in places.tolist())
        return list(dict.fromkeys(names))

    @functools.cached_property
    def _firsts(self) -> np.ndarray:
        return np.cumsum([0, *(rows for _, rows in self.shards)])

    def _pieces(self, index: int) -> tuple[int, records.Pieces, records.Trained]:
        """Returns the shard of a row, its stored pieces, and which tokens are trained."""
        row = range(len(self))[index]
        shard = int(np.searchsorted(self._firsts, row, side="right")) - 1
        file, rows = self.shards[shard]
        record = row - int(self._firsts[shard])
        try:
            found = _reader(self.folder, file, rows, self.key).read([record])[0]
            return shard, *records.decode(found, self.dtype, self.marked)
        except (RuntimeError, ValueError, IndexError) as e:
            sentence = " ".join(str(e).split())
            raise UserError(f"{self.folder}/{file}: row {record} is damaged: {sentence}.") from e


@dataclasses.dataclass(frozen=True)
class Prepared:
    train: PreparedRows
    heldout: PreparedRows
    manifest: dict[str, Any]


def is_prepared(path: str) -> bool:
    """Returns whether a path of config.data.sources is a folder that `prepare` wrote, or a source's manifest in one.

    Raises:
      UserError: a bucket cannot be reached.
    """
    if is_local(path):
        return _manifest(path).exists()
    if not path.startswith(("gs://", "s3://")):
        return False

    def exists() -> bool:
        try:
            return _manifest(path).exists()
        except ImportError:  # reported when the path is read
            return False

    return retry(exists, path)


def open_prepared(
    path: str, tokenizer: tokenizers.Tokenizer, eos: int, cfg: DataConfig, vocab_size: int = 0,
    rules: Rules | None = None,
) -> Prepared:  # fmt: skip
    """Opens the rows of a prepared folder, whose held-out split was fixed when it was prepared.

    Raises:
      UserError: the folder is damaged, was prepared with another tokenizer, sequence length or packing, or for a model
        with more than `vocab_size` tokens, if given.
    """
    file = _manifest(path)
    text, manifest = _read(file)
    for what, found, expected in (
        ("format", manifest["format"], FORMAT),
        ("config.data.sequence_length", manifest["sequence_length"], cfg.sequence_length),
        ("config.data.packing", manifest["packing"], cfg.packing),
        ("config.data.format", manifest.get("records", {}).get("form", "text"), cfg.format),
    ):
        if found != expected:
            raise UserError(f"{path}: was prepared with {what}={found!r}, but this run has {expected!r}.")
    if rules is not None and manifest["records"]["rules"] != (now := rules.fingerprint()):
        raise UserError(
            f"{path}: was prepared with other rules (hash {manifest['records']['rules'][:12]}, this run's "
            f"{now[:12]}): the tokenizer, the template, config.data.train_on, too_long or keep_ties differ."
        )
    ours = records.tokenizer_hash(tokenizer, eos)
    if manifest["tokenizer"]["hash"] != ours:
        raise UserError(
            f"{path}: was prepared with another tokenizer, that of {manifest['tokenizer']['source']} (hash "
            f"{manifest['tokenizer']['hash'][:12]}, tokenizers {manifest['tokenizer']['version']}), but this run's "
            f"has hash {ours[:12]} (tokenizers {tokenizers.__version__})."
        )
    tokens = manifest.get("tokens_below", 0)  # absent in folders of earlier versions
    if vocab_size and tokens > vocab_size:
        raise UserError(f"{path}: was prepared for tokens below {tokens}, but this model's vocab_size is {vocab_size}.")
    parts = {}
    for part in ("train", "heldout"):
        shards = [s for s in manifest["shards"] if s["part"] == part]
        _check_files(file.parent, shards)
        parts[part] = PreparedRows(
            folder=str(file.parent),
            packing=cfg.packing,
            length=cfg.sequence_length,
            mask_documents=cfg.mask_documents,
            dtype=manifest["token_dtype"],
            shards=tuple((s["file"], s["rows"]) for s in shards),
            files=tuple(tuple(manifest["sources"][s["source"]]["files"]) for s in shards),
            targets=sum(s["tokens"] for s in shards),
            key=hashlib.sha256(text.encode()).hexdigest()[:16],
            marked=rules is not None,
        )
    return Prepared(parts["train"], parts["heldout"], manifest)


def _manifest(path: str) -> pathlib.Path:
    place = paths.path(path)
    return place if place.name.endswith(OF_SOURCE) or place.name == MANIFEST else place / MANIFEST


def _read(file: pathlib.Path) -> tuple[str, dict[str, Any]]:
    try:
        text = paths.attempt(file, file.read_text)
        manifest = json.loads(text)
    except (OSError, ValueError) as e:
        raise UserError(f"{file}: cannot be read: {e}.") from e
    needed = ("format", "tokenizer", "sequence_length", "packing", "token_dtype", "sources", "shards")
    missing = [key for key in needed if not isinstance(manifest, dict) or key not in manifest]
    if missing:
        raise UserError(f"{file}: must be the manifest of prepared data, but lacks the keys {', '.join(missing)}.")
    return text, manifest


def _check_files(folder: pathlib.Path, shards: list[dict[str, Any]]) -> None:
    listed: list[pathlib.Path] = retry(lambda: list(folder.iterdir()), str(folder))
    there = {file.name: file for file in listed}
    for shard in shards:
        file = there.get(shard["file"])
        if file is None:
            raise UserError(f"{folder / shard['file']}: is missing; {MANIFEST} lists it with {shard['rows']} rows.")
        if is_local(file) and (size := file.stat().st_size) != shard["bytes"]:
            raise UserError(f"{file}: must have {shard['bytes']} bytes according to {MANIFEST}, found {size}.")


@functools.lru_cache(maxsize=_OPEN_FILES)
def _reader(folder: str, file: str, rows: int, key: str) -> Any:
    path = f"{folder}/{file}"
    found = records.reader(path if is_local(path) else _copy(path, key))
    if found.num_records() != rows:
        raise UserError(f"{path}: must have {rows} rows according to {MANIFEST}, found {found.num_records()}.")
    return found


def _copy(url: str, key: str) -> str:
    """Returns the path of an object's local copy, which appears once it is complete."""
    source = epath.Path(url)
    target = pathlib.Path(tempfile.gettempdir(), f"solar_jax_prepared_{os.getuid()}", key, source.name)
    if target.exists():
        return str(target)
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)

    def copy() -> None:
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as out:
            try:
                with source.open("rb") as f:
                    shutil.copyfileobj(f, out, 1 << 24)
                out.close()
                os.replace(out.name, target)
            finally:
                pathlib.Path(out.name).unlink(missing_ok=True)

    retry(copy, url)
    return str(target)

"""Record format of a packed row: sizes of its pieces, origins of their documents, and tokens, as bytes.

Rows of conversations and pairs have a bit for each token after that: whether it is trained.
"""

import hashlib
import re
from typing import Any

import numpy as np
import tokenizers
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from solar_jax.errors import UserError

# A row is read without its neighbours. Uncompressed files are 1.6 times as large and read no faster from disk.
_WRITE = "group_size:1,zstd:3"
_READ = "readahead_buffer_size:0,max_parallelism:0"
WHOLE_FILE = -1  # record number of a document that is an entire file

Pieces = tuple[np.ndarray, np.ndarray, np.ndarray]  # tokens [N], sizes [P], places [P, 2]: file index, record
Trained = np.ndarray | None  # [N] bool, which tokens are trained; None: all


def token_dtype(vocab_size: int) -> str:
    """Returns the dtype of stored tokens, little-endian."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def encode(pieces: Pieces, dtype: str, trained: Trained = None) -> bytes:
    tokens, sizes, places = pieces
    head = [np.array([len(sizes)]), sizes, places[:, 0]]
    parts = [x.astype("<i4") for x in head] + [places[:, 1].astype("<i8"), tokens.astype(dtype)]
    parts += [] if trained is None else [np.packbits(trained)]
    return b"".join(x.tobytes() for x in parts)


def decode(record: bytes, dtype: str, marked: bool = False) -> tuple[Pieces, Trained]:
    """Inverts `encode`; tokens keep the stored dtype. `marked`: whether it was given what is trained.

    Raises:
      ValueError: the bytes are not such a record.
    """
    count = int(np.frombuffer(record, "<i4", 1)[0])
    sizes = np.frombuffer(record, "<i4", count, 4)
    files = np.frombuffer(record, "<i4", count, 4 + 4 * count)
    numbers = np.frombuffer(record, "<i8", count, 4 + 8 * count)
    total, begin = int(sizes.sum()), 4 + 16 * count
    end = begin + total * np.dtype(dtype).itemsize
    if len(record) != end + (-(-total // 8) if marked else 0):
        raise ValueError(f"the sizes sum to {total} tokens, found {len(record) - begin} bytes for them")
    tokens = np.frombuffer(record, dtype, total, begin)
    trained = np.unpackbits(np.frombuffer(record, np.uint8, -1, end), count=total).astype(bool) if marked else None
    return (tokens, sizes, np.stack([files, numbers], axis=1)), trained


def place(document: str) -> tuple[str, int]:
    """Parses a document id "FILE:RECORD" or "FILE" into (file, record); `name` is its inverse."""
    match = re.fullmatch(r"(.+):(0|[1-9]\d{0,17})", document, re.DOTALL)
    return (match[1], int(match[2])) if match else (document, WHOLE_FILE)


def name(file: str, record: int) -> str:
    return file if record == WHOLE_FILE else f"{file}:{record}"


def writer(path: str) -> Any:
    return ArrayRecordWriter(path, _WRITE)


def reader(path: str) -> Any:
    """Opens a file for random access.

    Raises:
      UserError: the file is not an ArrayRecord file, or is damaged.
    """
    try:
        found = ArrayRecordReader(path, _READ)
        if found.ok():
            return found
    except RuntimeError as e:
        raise UserError(f"{path}: is not an ArrayRecord file, or is damaged: {' '.join(str(e).split())}.") from e
    raise UserError(f"{path}: is not an ArrayRecord file, or is damaged.")


def tokenizer_hash(tokenizer: tokenizers.Tokenizer, eos: int) -> str:
    """Returns the SHA-256 of everything that determines the tokens of a text, and of the end-of-sequence token."""
    return hashlib.sha256(f"{eos}\n{tokenizer.to_str()}".encode()).hexdigest()

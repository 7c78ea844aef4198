"""Documents to fixed rows of tokens: concatenated, each ended by the end-of-sequence token, cut every T."""

import dataclasses
from typing import SupportsIndex

import numpy as np
import tokenizers

Row = dict[str, np.ndarray]  # "tokens", "targets", "positions", "segment_ids" [T] int32 and "weights" [T] float32
_DOCUMENTS_AT_A_TIME = 256


@dataclasses.dataclass(frozen=True)
class Rows:
    """Random access to packed rows; row i is a pure function of i."""

    tokens: np.ndarray  # [all tokens] int32
    starts: np.ndarray  # [documents] where each begins
    length: int  # T
    mask_documents: bool  # each document of a row on its own: no attention, position or target across its border

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.length)

    def __getitem__(self, index: SupportsIndex) -> Row:
        begin = int(index) * self.length
        place = np.arange(begin, begin + self.length + 1)  # of the inputs, and one further for the last target
        window = self.tokens[begin : begin + self.length + 1]
        document = np.searchsorted(self.starts, place, side="right") - 1
        positions, weights = place - begin, np.ones(self.length, np.float32)
        if self.mask_documents:
            positions = place - np.maximum(self.starts[document], begin)
            weights[document[1:] != document[:-1]] = 0  # the target belongs to another document
        else:
            document = np.zeros_like(document)
        return {
            "tokens": window[:-1],
            "targets": window[1:],
            "positions": positions[:-1].astype(np.int32),
            "segment_ids": (document - document[0])[:-1].astype(np.int32),
            "weights": weights,
        }


def pack(texts: list[str], tokenizer: tokenizers.Tokenizer, eos: int, length: int, mask_documents: bool) -> Rows:
    """Rows of T = `length` tokens with their T targets; what is left over at the end is dropped."""
    pieces, starts, count = [], [], 0
    for i in range(0, len(texts), _DOCUMENTS_AT_A_TIME):
        for encoding in tokenizer.encode_batch_fast(texts[i : i + _DOCUMENTS_AT_A_TIME], add_special_tokens=False):
            ids = np.array([*encoding.ids, eos], np.int32)
            pieces.append(ids)
            starts.append(count)
            count += len(ids)
    tokens = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
    return Rows(tokens, np.array(starts, np.int64), length, mask_documents)

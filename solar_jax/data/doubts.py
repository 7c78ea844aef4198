"""Checks that tokens stand for the text they were made from: a line where they seem not to, or an error."""

import itertools
from collections.abc import Sequence

import numpy as np
import tokenizers

from solar_jax.data.sources import Source, documents
from solar_jax.errors import UserError

_SAMPLE = 64  # documents
_CHARACTERS = 1 << 16  # of each
_MOST = 16.0  # characters a token; running text has 2 to 6, source code up to 10
_UNKNOWN = 0.01  # share of tokens that stand for text outside the vocabulary


def tokens_of_text(source: Source, tokenizer: tokenizers.Tokenizer) -> str:
    """Describes how many characters of a source's first documents a token stands for, with a warning where too many.

    A tokenizer that cuts its input, or maps most of it to one token for the unknown, shows here.

    Raises:
      UserError: the source is missing or damaged.
    """
    texts = [d.text[:_CHARACTERS] for d in itertools.islice(documents(source), _SAMPLE)]
    found = [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    characters, count = sum(map(len, texts)), sum(map(len, found))
    said = f"{characters / max(1, count):.2f} characters a token in the first {len(texts)} document(s)"
    if characters > _MOST * count:
        said += f"; WARNING: text has fewer than {_MOST:g}, so this tokenizer seems to drop some of it"
    unknown = getattr(tokenizer.model, "unk_token", None)
    number = tokenizer.token_to_id(unknown) if unknown else None
    share = sum(ids.count(number) for ids in found) / max(1, count) if number is not None else 0
    if share > _UNKNOWN:
        said += f"; WARNING: {100 * share:.0f} % of the tokens are {unknown}, for text outside the vocabulary"
    return said


def check_ids(
    names: Sequence[str], tokens: Sequence[np.ndarray], tokenizer: tokenizers.Tokenizer, vocab_size: int
) -> None:
    """Checks that the model has an embedding for every token.

    Args:
      names: ids of the documents.
      tokens: of each document.
      tokenizer: which made them; it may have tokens that the model lacks.
      vocab_size: V of the model; 0 if any token is possible.

    Raises:
      UserError: a token is beyond the embedding.
    """
    if not vocab_size:
        return
    for name, ids in zip(names, tokens, strict=True):
        if len(ids) and (largest := int(ids.max())) >= vocab_size:
            raise UserError(
                f"{name}: has the token {tokenizer.id_to_token(largest)!r} of id {largest}, but the model's vocab_size "
                f"is {vocab_size}; remove that text, or use a model whose embedding was resized."
            )

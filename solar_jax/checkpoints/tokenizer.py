"""A checkpoint's tokenizer, checked against its model."""

import tokenizers

from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.errors import UserError


def load_tokenizer(c: Checkpoint) -> tokenizers.Tokenizer:
    """The checkpoint's tokenizer.

    Raises:
      UserError: it has none as tokenizer.json, or its ids do not fit the embedding.
    """
    if "tokenizer.json" not in c.companions:
        raise UserError(f"{c.where}: tokenizer.json is missing.")
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(c.companions["tokenizer.json"])
    except ValueError as e:
        raise UserError(f"{c.where}: tokenizer.json cannot be read: {e}.") from e
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest < 0:
        raise UserError(f"{c.where}: tokenizer.json has no tokens.")
    if largest >= c.cfg.vocab_size:
        raise UserError(
            f"{c.where}: the tokenizer has ids up to {largest}, but config.json's vocab_size is {c.cfg.vocab_size}."
        )
    return tokenizer


def eos_id(c: Checkpoint) -> int:
    """The token that ends a document (HF `eos_token_id`, the first where it lists several).

    Raises:
      UserError: config.json does not name one within the vocabulary.
    """
    found = c.hf_config.get("eos_token_id")
    first = found[0] if isinstance(found, list) and found else found
    if type(first) is not int or not 0 <= first < c.cfg.vocab_size:
        raise UserError(f"{c.where}: eos_token_id must be a token under {c.cfg.vocab_size}, found {found!r}.")
    return first

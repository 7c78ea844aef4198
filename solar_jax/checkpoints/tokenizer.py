"""Loads a checkpoint's tokenizer and checks it against the model."""

import tokenizers

from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.errors import UserError


def load_tokenizer(c: Checkpoint) -> tokenizers.Tokenizer:
    """Loads the checkpoint's tokenizer.

    Raises:
      UserError: tokenizer.json is missing or unreadable, or its ids exceed the embedding.
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
    """Returns the end-of-document token id (HF `eos_token_id`, the first if it is a list).

    Raises:
      UserError: config.json has none within the vocabulary.
    """
    found = c.hf_config.get("eos_token_id")
    first = found[0] if isinstance(found, list) and found else found
    if type(first) is not int or not 0 <= first < c.cfg.vocab_size:
        raise UserError(f"{c.where}: eos_token_id must be a token id below {c.cfg.vocab_size}, found {found!r}.")
    return first

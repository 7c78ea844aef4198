"""Loads a checkpoint's tokenizer, without what an earlier program left in it, and checks it against the model."""

import json
from typing import Any

import tokenizers

from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.errors import UserError


def load_tokenizer(c: Checkpoint) -> tokenizers.Tokenizer:
    """Loads the checkpoint's tokenizer.

    tokenizer.json also holds settings of the program that saved it: truncation, padding and BPE dropout. They are
    switched off, as transformers does for a call that does not ask for them.

    Raises:
      UserError: tokenizer.json is missing or unreadable, or none of its ids has an embedding.
    """
    if "tokenizer.json" not in c.companions:
        raise UserError(f"{c.where}: tokenizer.json is missing.")
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(c.companions["tokenizer.json"])
    except ValueError as e:
        raise UserError(f"{c.where}: tokenizer.json cannot be read: {e}.") from e
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    largest = max(ids, default=-1)
    if largest < 0:
        raise UserError(f"{c.where}: tokenizer.json has no tokens.")
    if min(ids) >= c.cfg.vocab_size:
        raise UserError(
            f"{c.where}: tokenizer.json has ids from {min(ids)} up, but config.json's vocab_size is {c.cfg.vocab_size}."
        )
    if largest >= c.cfg.vocab_size:
        print(
            f"{c.where}: the tokenizer has ids up to {largest}, more than the model's vocab_size of "
            f"{c.cfg.vocab_size} allows; a text with one is refused",
            flush=True,
        )
    return tokenizer


def eos_id(c: Checkpoint) -> int:
    """Returns the end-of-document token id (HF `eos_token_id`, the first if it is a list).

    It is that of config.json, or else of generation_config.json or tokenizer_config.json. A line tells if they
    contradict each other.

    Raises:
      UserError: none of the three has one, or it is outside the vocabulary.
    """
    found = {
        "config.json": _ids(c.hf_config.get("eos_token_id")),
        "generation_config.json": _ids(_json(c, "generation_config.json").get("eos_token_id")),
        "tokenizer_config.json": _ids(_token_id(c, _json(c, "tokenizer_config.json").get("eos_token"))),
    }
    given = {file: ids for file, ids in found.items() if ids}
    file, ids = next(iter(given.items()), ("config.json", [c.hf_config.get("eos_token_id")]))
    first = ids[0]
    if type(first) is not int or not 0 <= first < c.cfg.vocab_size:
        raise UserError(
            f"{c.where}: {file}'s eos_token_id must be a token id below {c.cfg.vocab_size}, found {first!r}."
        )
    # Chat models end a turn and a document with different tokens, and then list both.
    if any(first not in others and others[0] not in ids for others in given.values()):
        said = ", ".join(f"{others[0] if len(others) == 1 else others} in {name}" for name, others in given.items())
        print(f"{c.where}: eos_token_id is {said}; documents end with {first}", flush=True)
    return first


def end_ids(c: Checkpoint) -> list[int]:
    """Returns every token that ends an answer, by config.json, generation_config.json or tokenizer_config.json."""
    found = [
        *_ids(_json(c, "generation_config.json").get("eos_token_id")),
        *_ids(c.hf_config.get("eos_token_id")),
        *_ids(_token_id(c, _json(c, "tokenizer_config.json").get("eos_token"))),
    ]
    return [i for i in dict.fromkeys(found) if type(i) is int and 0 <= i < c.cfg.vocab_size]


def _ids(found: Any) -> list[Any]:
    if found is None or found == []:
        return []
    return found if isinstance(found, list) else [found]


def _json(c: Checkpoint, name: str) -> dict[str, Any]:
    try:
        content = json.loads(c.companions.get(name, b"{}"))
    except ValueError as e:
        raise UserError(f"{c.where}: {name} is not JSON: {e}.") from e
    return content if isinstance(content, dict) else {}


def _token_id(c: Checkpoint, token: Any) -> int | None:
    """Returns the id of a token that is given as text or, in older files, as an object with its content."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str) or "tokenizer.json" not in c.companions:
        return None
    return tokenizers.Tokenizer.from_buffer(c.companions["tokenizer.json"]).token_to_id(text)

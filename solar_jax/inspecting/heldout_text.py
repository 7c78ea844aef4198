"""A few held-out rows of a text, spread evenly over it."""

import dataclasses

import numpy as np

from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.checkpoints.tokenizer import eos_id, load_tokenizer
from solar_jax.config import DataConfig
from solar_jax.data.corpus import load_corpus
from solar_jax.data.embedded import TOPICS
from solar_jax.data.packing import Row
from solar_jax.data.sources import check_sources

_EVERY = 8  # one document in so many is held out, as in configs/dus_48l.py:smollm2


@dataclasses.dataclass(frozen=True)
class Sample:
    """Rows on which models are measured."""

    rows: list[Row]
    text: str  # the entry that they come from
    documents: int  # that the rows are parts of


def text_config(text: str | None, length: int) -> DataConfig:
    """Returns the config of a text: an entry of config.data.sources; pydoc-topics if None."""
    return DataConfig(
        sources=(text or TOPICS,), sequence_length=length, packing="concat", mask_documents=False,
        holdout_every=_EVERY, holdout="position",
    )  # fmt: skip


def check_sample_text(text: str | None, length: int) -> None:
    """Raises a UserError for an entry that is malformed or a local path that does not exist."""
    config = text_config(text, length)
    config.check()
    check_sources(config)


def heldout_sample(text: str | None, length: int, rows: int, c: Checkpoint) -> Sample:
    """Reads held-out rows of T = `length` tokens, documents 0, 8, 16, ... in one stream.

    Args:
      text: as in `text_config`.
      length: T.
      rows: how many, if there are so many; evenly spread.
      c: the checkpoint with the tokenizer.

    Raises:
      UserError: the text cannot be read, or is too small for a row.
    """
    config = text_config(text, length)
    corpus = load_corpus(config, load_tokenizer(c), eos_id(c), c.cfg.vocab_size)
    found = corpus.heldout[0][1]
    chosen = sorted({int(i) for i in np.linspace(0, len(found) - 1, min(rows, len(found)))})
    documents = {name for i in chosen for name in found.documents(i)}
    return Sample([found[i] for i in chosen], config.sources[0], len(documents))

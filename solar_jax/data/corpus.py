"""Training and held-out rows of every source of a run, prepared or packed at its start."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import SupportsIndex

import numpy as np
import tokenizers

from solar_jax.config import DataConfig
from solar_jax.data.chat.encoding import Rules
from solar_jax.data.chat.pairs import LogProbs, row_with
from solar_jax.data.chat.rows import Account, check_account, pack_records
from solar_jax.data.doubts import tokens_of_text
from solar_jax.data.packing import Row, Rows, pack
from solar_jax.data.prepared.rows import PreparedRows, is_prepared, open_prepared
from solar_jax.data.sources import Document, Source, choice, part, sources_of, split
from solar_jax.errors import UserError

_CHARACTERS_A_TOKEN = 32  # more than any token of running text has


@dataclasses.dataclass(frozen=True)
class FirstRows:
    """The first rows of a prepared source."""

    rows: PreparedRows
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: SupportsIndex) -> Row:
        return self.rows[range(self.count)[index]]

    @property
    def tokens(self) -> int:
        """Approximate number of targets: the average per row times the number of rows."""
        return self.rows.tokens * self.count // len(self.rows)

    def documents(self, index: int) -> list[str]:
        return self.rows.documents(range(self.count)[index])

    def sequences(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        return self.rows.sequences(range(self.count)[index])


AnyRows = Rows | PreparedRows | FirstRows


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Rows that a run trains on and is evaluated on, by source."""

    train: list[tuple[Source, AnyRows]]
    heldout: list[tuple[Source, AnyRows]]
    notes: list[str] = dataclasses.field(default_factory=list)  # what was read, and what looks wrong with it
    accounts: dict[str, Account] = dataclasses.field(default_factory=dict)  # of records, "train source 0" and so on


def load_corpus(
    cfg: DataConfig, tokenizer: tokenizers.Tokenizer, eos: int, vocab_size: int = 0, rules: Rules | None = None
) -> Corpus:
    """Opens every source: prepared folders directly; the documents of others are split, tokenised and packed.

    Args:
      cfg: the sources and the format of their rows.
      tokenizer: of the model.
      eos: the end-of-sequence token.
      vocab_size: V of the model, which no token may exceed; 0 if unknown.
      rules: how records become tokens, where the config's sources hold conversations or pairs.

    Raises:
      UserError: a source cannot be read, is too small for one row of each part, or has a token that the model lacks.
    """
    corpus = Corpus([], [])
    if rules is not None:
        corpus.notes.append(f"template {rules.template.name}")
        corpus.notes.extend(f"template {note}" for note in rules.check())
    for i, source in enumerate(sources_of(cfg)):
        # The limit counts training tokens; the held-out part keeps its proportion.
        limits = (source.limit, source.limit // (cfg.holdout_every - 1))
        if is_prepared(source.path):
            parts = _prepared(source, cfg, tokenizer, eos, limits, vocab_size, rules)
        elif rules is not None:
            parts = _of_records(i, source, cfg, rules, limits, vocab_size, corpus)
        else:
            parts, empty = _packed(source, cfg, tokenizer, eos, limits, vocab_size)
            corpus.notes.append(choice(source) + (f"; {empty:,} document(s) without text skipped" if empty else ""))
            corpus.notes.append(f"{source.path}: {tokens_of_text(source, tokenizer)}")
        for rows, name, into in zip(parts, ("training", "held-out"), (corpus.train, corpus.heldout), strict=True):
            if not len(rows):
                within = f" within its limit of {source.limit}" if source.limit else ""
                raise UserError(
                    f"config.data.sources: {source.path} has {_tokens(rows)} {name} tokens{within}, but a row of "
                    f"config.data.sequence_length={cfg.sequence_length} needs {cfg.sequence_length + 1}."
                )
            into.append((source, rows))
    return corpus


def _tokens(rows: AnyRows) -> int:
    return len(rows.stream) if isinstance(rows, Rows) else 0


def _of_records(
    i: int, source: Source, cfg: DataConfig, rules: Rules, limits: tuple[int, int], vocab_size: int, corpus: Corpus
) -> list[AnyRows]:
    """Returns the rows of both parts of source `i`, with their accounts and notes added to the corpus."""
    how, parts = split(source, cfg.holdout_every, cfg.holdout), []
    for held_out, name, limit in zip((False, True), ("train", "heldout"), limits, strict=True):
        rows, account = pack_records(
            part(source, how, held_out), rules, cfg.sequence_length, vocab_size=vocab_size, limit=limit
        )
        check_account(account, f"{source.path} ({'held-out' if held_out else 'training'} part)", cfg.train_on)
        corpus.accounts[f"{name} source {i}"] = account
        corpus.notes.append(f"{source.path}: {'held out, ' if held_out else ''}{account.line()}")
        parts.append(rows)
    corpus.notes.append(choice(source))
    return parts


def _prepared(
    source: Source, cfg: DataConfig, tokenizer: tokenizers.Tokenizer, eos: int, limits: tuple[int, int],
    vocab_size: int, rules: Rules | None,
) -> list[AnyRows]:  # fmt: skip
    found = open_prepared(source.path, tokenizer, eos, cfg, vocab_size, rules)
    parts: list[AnyRows] = []
    for rows, limit in zip((found.train, found.heldout), limits, strict=True):
        count = min(len(rows), limit * len(rows) // max(1, rows.tokens)) if source.limit else len(rows)
        parts.append(rows if count == len(rows) else FirstRows(rows, count))
    return parts


def _packed(
    source: Source, cfg: DataConfig, tokenizer: tokenizers.Tokenizer, eos: int, limits: tuple[int, int],
    vocab_size: int,
) -> tuple[list[AnyRows], int]:  # fmt: skip
    """Returns the rows of both parts, and how many documents without text the training part's reading met."""
    how = split(source, cfg.holdout_every, cfg.holdout)
    parts: list[AnyRows] = []
    empty: list[None] = []
    for held_out, limit in zip((False, True), limits, strict=True):
        on_empty = (lambda: None) if held_out else (lambda: empty.append(None))
        chosen: Iterable[Document] = part(source, how, held_out, on_empty)
        if source.limit:
            chosen = _within(chosen, tokenizer, limit)
        length, masks = cfg.sequence_length, cfg.mask_documents
        parts.append(
            pack(
                chosen, tokenizer, eos, length, packing=cfg.packing, mask_documents=masks, vocab_size=vocab_size
            )
        )  # fmt: skip
    return parts, len(empty)


def _within(documents: Iterable[Document], tokenizer: tokenizers.Tokenizer, limit: int) -> Iterator[Document]:
    """Yields the first documents, `limit` tokens in all with end-of-sequence tokens; the last one is cut to fit."""
    left = limit
    for document in documents:
        encoding = tokenizer.encode(document.text[: left * _CHARACTERS_A_TOKEN], add_special_tokens=False)
        if len(encoding.ids) < left:
            left -= len(encoding.ids) + 1
            yield document
            continue
        if left > 1:
            yield dataclasses.replace(document, text=document.text[: encoding.offsets[left - 2][1]])
        return


def heldout_indices(corpus: Corpus, windows: int) -> list[tuple[AnyRows, range]]:
    """Returns the first held-out rows of every source, at most `windows` in all, split among the sources by weight."""
    total = sum(source.weight for source, _ in corpus.heldout)
    out: list[tuple[AnyRows, range]] = []
    upto = 0.0
    for source, rows in corpus.heldout:
        begin, upto = upto, upto + windows * source.weight / total
        out.append((rows, range(min(round(upto) - round(begin), len(rows)))))
    return out


def heldout_rows(corpus: Corpus, windows: int, known: LogProbs | None = None) -> list[Row]:
    """Returns the rows at `heldout_indices`; `known` as in data.chat.pairs.row_with."""
    return [row_with(rows, i, known) for rows, indices in heldout_indices(corpus, windows) for i in indices]

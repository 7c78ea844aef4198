"""Rows of conversations and of pairs: whole sequences packed by best fit, and an account of what was left out."""

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
import tokenizers

from solar_jax.data.chat.encoding import Encoded, LeftOut, Rules
from solar_jax.data.chat.formats import kind_of
from solar_jax.data.doubts import check_ids
from solar_jax.data.packing import Rows, best_fit, blocks
from solar_jax.data.sources import Document
from solar_jax.errors import UserError

TOKENS_A_SEQUENCE = 16  # a row of T tokens has at most T / 16 sequences of pairs


def most_sequences(length: int) -> int:
    """The most sequences of pairs that a row of T = `length` tokens may hold, an even number."""
    return max(2, length // TOKENS_A_SEQUENCE // 2 * 2)


def split_rows(rows: np.ndarray, length: int) -> np.ndarray:
    """Rows [pairs] such that none has more sequences than `most_sequences`; pairs keep their order."""
    most, out = most_sequences(length) // 2, []
    seen: dict[int, int] = {}
    for row in rows.tolist():
        seen[row] = seen.get(row, -1) + 1
        out.append((row, seen[row] // most))
    number = {place: i for i, place in enumerate(sorted(set(out)))}
    return np.array([number[place] for place in out], np.int64)


@dataclasses.dataclass
class Account:
    """Records used and left out."""

    records: int = 0
    sequences: int = 0  # two of a pair
    tokens: int = 0
    trained: int = 0
    left_out: dict[str, list[str]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))

    @property
    def share(self) -> float:
        """Trained tokens among all."""
        return self.trained / max(1, self.tokens)

    def json(self) -> dict[str, Any]:
        return {"records": self.records, "tokens": self.tokens, "trained": self.trained, "left_out": self.left_out}

    def line(self) -> str:
        """A line for the announcement of a run."""
        said = f"{self.records:,} records of {self.tokens:,} tokens, {100 * self.share:.1f} % of them trained"
        dropped = ", ".join(f"{len(ids):,} {reason}" for reason, ids in self.left_out.items())
        return said + (f"; left out: {dropped}" if dropped else "")


def pack_records(
    documents: Iterable[Document], rules: Rules, length: int, *, vocab_size: int = 0, limit: int = 0
) -> tuple[Rows, Account]:
    """Packs records into rows of T = `length` tokens; a pair's two sequences follow each other in one row.

    Args:
      documents: with their records, in a fixed order, which determines the rows.
      rules: how a record becomes tokens.
      length: T.
      vocab_size: V of the model; 0 if unknown.
      limit: most tokens; 0: all.

    Raises:
      UserError: a record cannot be read, or has a token beyond the model's embedding.
    """
    account, tokenizer = Account(), tokenizers.Tokenizer.from_str(rules.tokenizer)
    ids: list[str] = []
    found: list[Encoded] = []
    owners: list[int] = []
    rows: list[np.ndarray] = []
    made = 0
    for block in blocks(documents, length):
        units: list[list[Encoded]] = []
        for document in block:
            if limit and account.tokens >= limit:
                break
            try:
                unit = rules.encode(document, length)
            except LeftOut as e:
                account.left_out[str(e)].append(document.id)
                continue
            check_ids([document.id] * len(unit), [e.tokens for e in unit], tokenizer, vocab_size)
            account.records += 1
            account.sequences += len(unit)
            account.tokens += sum(len(e.tokens) for e in unit)
            account.trained += sum(int(e.trained[1:].sum()) for e in unit)
            owners += [len(ids)] * len(unit)
            ids.append(document.id)
            units.append(unit)
        if units:
            its = best_fit(np.array([sum(len(e.tokens) - 1 for e in unit) for unit in units]), length)
            its = (split_rows(its, length) if kind_of(rules.form) == "pairs" else its) + made
            made = int(its.max()) + 1
            rows.append(np.repeat(its, [len(unit) for unit in units]))
            found += [e for unit in units for e in unit]
    return _in_rows(length, ids, found, np.array(owners, np.int64), rows), account


def rows_of_units(ids: list[str], units: list[list[Encoded]], length: int) -> Rows:
    """Packs records that are encoded already; `ids` are theirs."""
    its = best_fit(np.array([sum(len(e.tokens) - 1 for e in unit) for unit in units]), length)
    counts = [len(unit) for unit in units]
    its = split_rows(its, length) if max(counts) > 1 else its
    found, owners = [e for unit in units for e in unit], np.repeat(np.arange(len(units)), counts)
    return _in_rows(length, ids, found, owners, [np.repeat(its, counts)])


def _in_rows(
    length: int, ids: list[str], found: list[Encoded], owners: np.ndarray, rows: list[np.ndarray]
) -> Rows:  # fmt: skip
    """The packed rows, from the row of each sequence."""
    sizes = np.array([len(e.tokens) for e in found], np.int64)
    starts = np.cumsum([0, *sizes], dtype=np.int64)[:-1]
    row = np.concatenate(rows) if rows else np.empty(0, np.int64)
    order = np.argsort(row, kind="stable")
    firsts = np.cumsum(np.concatenate([[0], np.bincount(row) if len(row) else []]), dtype=np.int64)
    return Rows(
        packing="best_fit",
        length=length,
        mask_documents=True,
        ids=ids,
        stream=np.concatenate([e.tokens for e in found]) if found else np.empty(0, np.int32),
        begins=starts[order],
        sizes=sizes[order],
        owners=owners[order],
        firsts=firsts,
        trained=np.concatenate([e.trained for e in found]) if found else np.empty(0, bool),
    )


def check_account(account: Account, path: str, train_on: str) -> None:
    """Raises a UserError where nothing of a source is trained, or all of it although that was not asked for."""
    if not account.records:
        dropped = ", ".join(f"{len(ids):,} {reason}" for reason, ids in account.left_out.items())
        raise UserError(f"config.data.sources: {path}: no record is left to train on ({dropped or 'it has none'}).")
    if not account.trained:
        raise UserError(f"config.data.sources: {path}: none of its {account.tokens:,} tokens would be trained.")
    if train_on != "all" and account.trained >= account.tokens - account.sequences:
        raise UserError(
            f"config.data.sources: {path}: all of its {account.tokens:,} tokens would be trained, prompts too; "
            "config.data.train_on='all' asks for that."
        )

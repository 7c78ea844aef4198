"""Chunks of preference data for sDPO (arXiv 2403.19270): by source, difficulty, at random, or as a file lists them."""

import dataclasses
import json
import pathlib
import random
from collections.abc import Callable, Sequence

import numpy as np

from solar_jax.config import Config
from solar_jax.data.chat.encoding import Encoded
from solar_jax.data.chat.pairs import LogProbs, pairs_of
from solar_jax.data.chat.rows import rows_of_units
from solar_jax.data.corpus import Corpus
from solar_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class _Unit:
    key: str
    id: str  # of its record
    sides: list[Encoded]


def check_chunks(text: str) -> tuple[str, str]:
    """Reads `config.preferences.chunks`: its rule, and what follows the colon.

    Raises:
      UserError: it is none of "", source, difficulty:N, random:N and listed:FILE.
    """
    rule, _, rest = text.partition(":")
    good = {
        "": not rest,
        "source": not rest,
        "difficulty": rest.isdigit() and int(rest) > 0,
        "random": rest.isdigit() and int(rest) > 0,
        "listed": bool(rest),
    }
    if not good.get(rule):
        raise UserError(
            f"config.preferences.chunks must be source, difficulty:N, random:N or listed:FILE, found {text!r}."
        )
    if rule == "listed" and not pathlib.Path(rest).is_file():
        raise UserError(f"config.preferences.chunks: {rest}: does not exist.")
    return rule, rest


def make_chunks(corpus: Corpus, config: Config, margins: Callable[[], LogProbs]) -> list[Corpus]:
    """The chunks of a run in their order, each with its training rows; the held-out rows are all of the corpus.

    Args:
      corpus: of the run.
      config: the run.
      margins: gives the start model's log-probabilities of all pairs; called for chunks by difficulty.

    Raises:
      UserError: a chunk would have no pair, or a listed record is not there.
    """
    rule, rest = check_chunks(config.preferences.chunks)
    if not rule:
        return [corpus]
    if rule == "source":  # the rows that a run on that source alone would have
        return [dataclasses.replace(corpus, train=[part]) for part in corpus.train]
    units = _units(corpus)
    if rule == "listed":
        groups = _listed(units, pathlib.Path(rest))
    else:
        if rule == "random":
            random.Random(config.seed).shuffle(units)
        else:  # easiest first: the pairs that the start model tells apart best
            known = margins()
            units.sort(key=lambda u: (known[u.key][1] - known[u.key][0], u.id))
        groups = [[units[i] for i in part] for part in np.array_split(np.arange(len(units)), int(rest))]
    for i, group in enumerate(groups):
        if not group:
            raise UserError(f"config.preferences.chunks={config.preferences.chunks!r}: chunk {i + 1} has no pair.")
    source = dataclasses.replace(corpus.train[0][0], weight=1.0)
    length = config.data.sequence_length
    return [
        dataclasses.replace(corpus, train=[(source, rows_of_units([u.id for u in g], [u.sides for u in g], length))])
        for g in groups
    ]


def _units(corpus: Corpus) -> list[_Unit]:
    """The training pairs of all sources."""
    found = []
    for _, rows in corpus.train:
        for i in range(len(rows)):
            names = rows.documents(i)
            for (key, (tokens, sizes, trained)), name in zip(pairs_of(rows, i), names, strict=True):
                first = int(sizes[0])
                sides = [Encoded(tokens[:first], trained[:first]), Encoded(tokens[first:], trained[first:])]
                found.append(_Unit(key, name, sides))
    return sorted(found, key=lambda u: u.id)


def _listed(units: Sequence[_Unit], file: pathlib.Path) -> list[list[_Unit]]:
    """The pairs of each list of record ids in a JSON file."""
    try:
        lists = json.loads(file.read_text())
    except ValueError as e:
        raise UserError(f"{file}: is not JSON: {e}.") from e
    if not isinstance(lists, list) or not all(isinstance(ids, list) for ids in lists):
        raise UserError(f"{file}: must hold a list of lists of record ids (FILE:RECORD), one list a chunk.")
    by_id = {unit.id: unit for unit in units}
    for name in (name for ids in lists for name in ids):
        if name not in by_id:
            raise UserError(f"{file}: lists {name!r}, which is no training pair; one is {units[0].id!r}.")
    return [[by_id[name] for name in ids] for ids in lists]

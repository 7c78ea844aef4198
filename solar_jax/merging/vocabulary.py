"""The merged model's tokenizer, and embeddings whose rows follow it (mergekit `tokenizer_source`, `tokenizer`)."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.checkpoints.companions import template_files, template_text
from solar_jax.checkpoints.tensor_table import TENSORS
from solar_jax.data.chat.template import NAMED
from solar_jax.errors import UserError
from solar_jax.merging.recipe import Recipe, TokenRule, VocabularyRule
from solar_jax.merging.tensors import ROUND

_EMBEDDINGS = (TENSORS["embed"].hf, TENSORS["lm_head"].hf)
_MOST_READS = 64  # runs of rows that are read one by one; with more, the full tensor is read once
TOKENIZER = "tokenizer.json"

Rows = list[tuple[str, int]]  # (model, row) whose mean is an embedding; empty: zeros


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The tokenizer's files, and the inputs with embeddings in its order."""

    models: Mapping[str, Checkpoint]
    companions: dict[str, bytes]
    hf_config: dict[str, Any]  # keys that follow the tokenizer


def merged_vocabulary(recipe: Recipe, models: Mapping[str, Checkpoint]) -> Vocabulary | None:
    """Builds the tokenizer of a recipe and lays the models' embeddings out for it; None where it asks for none.

    Without a rule, a line says where the models' tokenizers differ.

    Raises:
      UserError: a tokenizer is missing, or a token has no embedding.
    """
    rule = recipe.vocabulary
    if rule is None:
        _tell_differences(models)
        return None
    base = recipe.base or recipe.models[0]
    donor = base if rule.source in ("union", "base") else rule.source
    vocabularies = {name: _vocabulary(name, c) for name, c in models.items()}
    tokenizer = _tokenizer(donor, models[donor])
    if rule.source == "union":
        _add_missing(tokenizer, [name for name in models if name != base], models)
    tokenizer.add_tokens([token for token in rule.tokens if tokenizer.token_to_id(token) is None])
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)

    companions = dict(models[donor].companions)
    if vocabulary != vocabularies[donor]:
        companions[TOKENIZER] = tokenizer.to_str(pretty=True).encode()
    ids = {key: value for key, value in models[donor].hf_config.items() if key.endswith("_token_id")}
    same = all(found == vocabulary for found in vocabularies.values()) and not any(rule.tokens.values())
    sizes = {c.cfg.vocab_size for c in models.values()}
    if same and len(sizes) == 1 and not rule.pad_to_multiple_of:
        if (padding := sizes.pop() - len(vocabulary)) > 0:
            print(f"the {padding} embeddings without a token are kept and merged like all others", flush=True)
        return Vocabulary(models, companions, ids)

    size = max(vocabulary.values()) + 1
    if rule.pad_to_multiple_of:
        size += -size % rule.pad_to_multiple_of
    places = {
        name: {vocabulary[token]: row for token, row in found.items() if token in vocabulary}
        for name, found in vocabularies.items()
    }
    dropped = {name: c.cfg.vocab_size - len(places[name]) for name, c in models.items()}
    told = ", ".join(f"{count} of {name}" for name, count in dropped.items() if count)
    print(
        f"merged vocabulary: {len(vocabulary)} tokens, {size} embeddings"
        + (f"; embeddings that no token uses are dropped: {told}" if told else ""),
        flush=True,
    )
    inputs = list(dict.fromkeys(source.model for section in recipe.sections for source in section.sources))
    aligned = dict(models)
    for name in inputs:
        aligned[name] = _aligned(name, models, inputs, recipe.base, rule, vocabulary, places, vocabularies, size)
    return Vocabulary(aligned, companions, ids | {"vocab_size": size})


def _tokenizer(name: str, c: Checkpoint) -> tokenizers.Tokenizer:
    if TOKENIZER not in c.companions:
        raise UserError(f"{name}: {TOKENIZER} is missing, so that its vocabulary cannot be merged.")
    return tokenizers.Tokenizer.from_buffer(c.companions[TOKENIZER])


def _vocabulary(name: str, c: Checkpoint) -> dict[str, int]:
    found = _tokenizer(name, c).get_vocab(with_added_tokens=True)
    if (largest := max(found, key=lambda token: found[token])) and found[largest] >= c.cfg.vocab_size:
        raise UserError(
            f"{name}: the token {largest!r} has the id {found[largest]}, but there are {c.cfg.vocab_size} embeddings."
        )
    return found


def _add_missing(tokenizer: tokenizers.Tokenizer, names: Sequence[str], models: Mapping[str, Checkpoint]) -> None:
    """Adds the tokens of other models that a tokenizer lacks, by model and id."""
    for name in names:
        other = _tokenizer(name, models[name])
        added = other.get_added_tokens_decoder()
        for row, token in sorted((row, token) for token, row in other.get_vocab(with_added_tokens=True).items()):
            if tokenizer.token_to_id(token) is not None:
                continue
            if row in added and added[row].special:
                tokenizer.add_special_tokens([added[row]])
            else:
                tokenizer.add_tokens([added.get(row, token)])


def _tell_differences(models: Mapping[str, Checkpoint]) -> None:
    first, known = "", None
    for name, c in models.items():
        if TOKENIZER not in c.companions:
            continue
        found = _tokenizer(name, c).get_vocab(with_added_tokens=True)
        if known is None:
            first, known = name, found
        elif different := sorted(
            token for token in known.keys() | found.keys() if known.get(token) != found.get(token)
        ):
            print(
                f"{name}: its tokenizer differs from that of {first} in {len(different)} tokens, {different[0]!r} "
                "first; rows of embeddings are merged by number. tokenizer_source merges them by token",
                flush=True,
            )


def _aligned(
    name: str, models: Mapping[str, Checkpoint], inputs: Sequence[str], base: str | None, rule: VocabularyRule,
    vocabulary: Mapping[str, int], places: Mapping[str, Mapping[int, int]], own: Mapping[str, Mapping[str, int]],
    size: int,
) -> Checkpoint:  # fmt: skip
    """A model whose embeddings are in the order of the merged vocabulary."""
    order = np.full(size, -1, np.int64)
    for row, source in places[name].items():
        order[row] = source
    made: dict[int, Rows] = {}
    for token, row in vocabulary.items():
        wanted = rule.tokens.get(token)
        if not (wanted and wanted.force) and order[row] >= 0:
            continue
        order[row] = -1
        made[row] = _source(token, row, wanted, inputs, base, places, own, models)
    c = models[name]
    padded = range(max(vocabulary.values()) + 1, size)
    embeddings = {
        tensor: _Embedding(tensor, c, models, order, made, padded) for tensor in _EMBEDDINGS if tensor in c.shape_of
    }

    def read(name: str, rows: slice = slice(None)) -> np.ndarray:
        return embeddings[name].read(rows) if name in embeddings else c.read(name, rows)

    return dataclasses.replace(
        c,
        hf_config=c.hf_config | {"vocab_size": size},
        cfg=dataclasses.replace(c.cfg, vocab_size=size),
        shape_of=c.shape_of | {tensor: (size, *c.shape_of[tensor][1:]) for tensor in embeddings},
        read=read,
        entry_of={tensor: entry for tensor, entry in c.entry_of.items() if tensor not in embeddings},
        origins={t: (c.origin(t), order.tobytes(), size) if t in embeddings else c.origin(t) for t in c.shape_of},
        view=None,
    )


def _source(
    token: str, row: int, wanted: TokenRule | None, inputs: Sequence[str], base: str | None,
    places: Mapping[str, Mapping[int, int]], own: Mapping[str, Mapping[str, int]], models: Mapping[str, Checkpoint],
) -> Rows:  # fmt: skip
    """The rows that make the embedding of a token which a model lacks: by the rule, the base's, or the mean of all."""
    if wanted is not None:
        if wanted.model is None:
            return []
        at = own[wanted.model].get(token) if wanted.token is None else wanted.token
        at = own[wanted.model].get(at) if isinstance(at, str) else at
        if at is None or not 0 <= at < models[wanted.model].cfg.vocab_size:
            raise UserError(f"{wanted.model}: has no embedding of {wanted.token or token!r}, which {token!r} needs.")
        return [(wanted.model, at)]
    have = [name for name in inputs if row in places[name]]
    if base in have and len(have) > 1:
        have = [str(base)]
    if not have:
        print(f"{token!r} is in none of the merged models; its embedding is zero", flush=True)
    return [(name, places[name][row]) for name in have]


@dataclasses.dataclass
class _Embedding:
    """One embedding table in the merged order."""

    tensor: str
    c: Checkpoint
    models: Mapping[str, Checkpoint]
    rows: np.ndarray  # [V] int64, row of the model; -1: in `made`, or padding
    made: Mapping[int, Rows]
    padded: range

    @functools.cached_property
    def _dtype(self) -> np.dtype:
        return self.c.dtype_of[self.tensor]

    @functools.cached_property
    def _runs(self) -> np.ndarray:
        """Where runs of consecutive rows begin in the merged order."""
        return np.flatnonzero(np.diff(self.rows, prepend=self.rows[0] - 2) != 1)

    @functools.cached_property
    def _full(self) -> np.ndarray:
        return self.c.read(self.tensor)

    @functools.cached_property
    def _filler(self) -> np.ndarray:
        """The mean of all tokens' embeddings, for rows without a token."""
        total = sum(self._laid_out(slice(i, i + 4096)).sum(axis=0, dtype=np.float64) for i in self._starts())
        return np.asarray(total / self.padded.start).astype(np.float32)

    def _starts(self) -> range:
        return range(0, self.padded.start, 4096)

    def read(self, at: slice) -> np.ndarray:
        start, stop, _ = at.indices(len(self.rows))
        x = self._laid_out(slice(start, stop))
        for row in range(max(self.padded.start, start), min(self.padded.stop, stop)):
            x[row - start] = self._filler
        return x

    def _laid_out(self, at: slice) -> np.ndarray:
        start, stop = at.start, min(at.stop, len(self.rows))
        rows = self.rows[start:stop]
        x = np.zeros((len(rows), *self.c.shape_of[self.tensor][1:]), self._dtype)
        has = rows >= 0
        begins = np.flatnonzero(np.diff(rows, prepend=rows[0] - 2) != 1)
        if len(self._runs) > _MOST_READS:
            x[has] = self._full[rows[has]]
        else:
            for first, last in zip(begins, [*begins[1:], len(rows)], strict=True):
                if rows[first] >= 0:
                    x[first:last] = self.c.read(self.tensor, slice(int(rows[first]), int(rows[last - 1]) + 1))
        for row in [row for row in self.made if start <= row < stop]:
            x[row - start] = self._mean(self.made[row])
        return x

    def _mean(self, sources: Rows) -> Any:
        """The mean of rows, rounded after each addition."""
        if not sources:
            return 0
        rounded: Callable[[np.ndarray], np.ndarray] = ROUND[self._dtype.name]
        total = np.zeros(self.c.shape_of[self.tensor][1:], np.float32)
        for name, row in sources:
            total = rounded(total + self.models[name].read(self.tensor, slice(row, row + 1))[0].astype(np.float32))
        return rounded(total / np.float32(len(sources)))


def chat_template_files(
    recipe: Recipe, models: Mapping[str, Checkpoint], companions: Mapping[str, bytes]
) -> dict[str, bytes]:
    """The files that carry the recipe's chat template: Jinja, one of our names, or "auto" for the models' most common.

    Raises:
      UserError: no such template.
    """
    wanted = recipe.chat_template
    if wanted is None:
        return {}
    if wanted == "auto":
        found = [text.strip() for c in models.values() if (text := template_text(c.companions))]
        if not found:
            print("chat_template: auto finds none in the models; the result has none", flush=True)
            return {}
        text = collections.Counter(found).most_common(1)[0][0]
    elif wanted in NAMED:
        text = NAMED[wanted]
    elif "{" in wanted:
        text = wanted
    else:
        raise UserError(f"chat_template must be auto, {', '.join(NAMED)} or Jinja text, found {wanted!r}.")
    return template_files(text, companions)

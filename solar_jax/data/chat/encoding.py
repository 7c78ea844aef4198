"""Conversations and pairs as tokens, with a mark on every token that is trained.

A conversation's text is tokenised once, whole. An answer is the text between the prompt for it and the end of its turn,
the token that ends it included; a token across the border belongs to the answer. Special tokens come from the template;
where it writes none, the tokenizer's BOS stands at the start and EOS after the last answer.
"""

import dataclasses
import datetime
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from solar_jax.config import DataConfig
from solar_jax.data.chat.formats import Conversation, Pair, content_text, kind_of, read_record
from solar_jax.data.chat.template import Span, Template, load_template
from solar_jax.data.sources import Document
from solar_jax.errors import UserError

# Reasons for which a record is left out
TOO_LONG = "too long"
NOTHING_LEFT = "no trained token within the row"
EMPTY = "empty answer"
EQUAL = "both answers equal after cutting"
TIE = "scores tied"
PROMPT_FILLS = "prompt fills the row"
_PROBE = "Qx7", "Ax9"  # a question and an answer that no template contains


class LeftOut(Exception):
    """A record that is not used; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A sequence of tokens, of which the last is only a target."""

    tokens: np.ndarray  # [N] int32
    trained: np.ndarray  # [N] bool


@dataclasses.dataclass(frozen=True)
class Rules:
    """Everything that a record's tokens depend on; sent to other processes."""

    tokenizer: str  # tokenizer.json
    eos: int
    template: Template
    form: str  # a name that data.chat.formats.read_record takes
    train_on: str = "answers"  # a name of `TRAINED`
    too_long: str = "cut"  # or "drop"
    keep_ties: bool = False

    def fingerprint(self) -> str:
        """A hash of the rules."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()

    def encode(self, document: Document, length: int) -> list[Encoded]:
        """The sequences of a record: one, or a pair's chosen and rejected one.

        Args:
          document: with its record.
          length: T. A conversation has at most T + 1 tokens, and each side of a pair T // 2 + 1.

        Raises:
          LeftOut: the record is not used.
          UserError: it is of no known form, the template fails, or its prompt is no prefix.
        """
        found = read_record(document.record, document.id, self.form)
        try:
            if isinstance(found, Pair):
                return self._pair(found, length // 2 + 1, document.id)
            return [self._conversation(found, length + 1, document.id)]
        except UserError as e:
            raise UserError(str(e) if str(e).startswith(document.id) else f"{document.id}: {e}") from e

    def _conversation(self, found: Conversation, most: int, where: str) -> Encoded:
        if not any(m["role"] == "assistant" for m in found.messages[found.prompt :]):
            raise UserError(f"{where}: has no answer of the assistant, found {[m['role'] for m in found.messages]}.")
        if not any(map(_says_something, found.messages[found.prompt :])):
            raise LeftOut(EMPTY)
        whole = self._whole(found)
        if len(whole.tokens) > most and self.too_long == "drop":
            raise LeftOut(TOO_LONG)
        cut = Encoded(whole.tokens[:most], whole.trained[:most])
        if not cut.trained[1:].any():
            raise LeftOut(NOTHING_LEFT)
        return cut

    def _pair(self, found: Pair, most: int, where: str) -> list[Encoded]:
        if found.tie and not self.keep_ties:
            raise LeftOut(TIE)
        sides = found.chosen, found.rejected
        if not all(any(map(_says_something, side.messages[side.prompt :])) for side in sides):
            raise LeftOut(EMPTY)
        encoded = [self._whole(side) for side in sides]
        if any(int(np.argmax(e.trained)) >= most for e in encoded):
            raise LeftOut(PROMPT_FILLS)
        if self.too_long == "drop" and any(len(e.tokens) > most for e in encoded):
            raise LeftOut(TOO_LONG)
        cut = [Encoded(e.tokens[:most], e.trained[:most]) for e in encoded]
        if np.array_equal(cut[0].tokens, cut[1].tokens):
            raise LeftOut(EQUAL)
        return cut

    def _whole(self, found: Conversation) -> Encoded:
        """All tokens of a conversation."""
        tokenizer, writes = _tokenizer(self.tokenizer), _writes(self.tokenizer, self.template)
        how: dict[str, Any] = dict(found.kwargs) | {"tools": found.tools}
        text, marked = self.template.render_with_spans(found.messages, **how)
        encoding = tokenizer.encode(text, add_special_tokens=False)
        tokens, offsets = encoding.ids, np.array(encoding.offsets, np.int64).reshape(-1, 2)
        trained = np.zeros(len(tokens), bool)
        for begin, end in TRAINED[self.train_on](self.template, found, text, marked, how):
            trained |= (offsets[:, 1] > begin) & (offsets[:, 0] < end)
        if not writes.specials and (bos := _bos(self.tokenizer)) is not None and tokens[:1] != [bos]:
            tokens, trained = [bos, *tokens], np.concatenate([[False], trained])
        if not writes.end and found.messages[-1]["role"] == "assistant":
            last_is_trained = found.messages[-1].get("weight", 1) != 0 or self.train_on == "all"
            tokens, trained = [*tokens, self.eos], np.concatenate([trained, [last_is_trained]])
        return Encoded(np.array(tokens, np.int32), trained)

    @property
    def end(self) -> int:
        """The token that ends an answer."""
        return _writes(self.tokenizer, self.template).end_id or self.eos

    def check(self) -> list[str]:
        """Tries the template, and returns what a user should know of it.

        Raises:
          UserError: it fails, or the token that ends an answer would not be trained.
        """
        writes = _writes(self.tokenizer, self.template)
        if writes.end_is_outside and self.train_on != "all":
            raise UserError(
                f"{self.template.name}: the chat template's {{% generation %}} ends before the token that ends an "
                "answer, so that a model would not learn to stop; enclose that token too."
            )
        notes = []
        if writes.rewrites and self.train_on == "answers" and not writes.marks:
            notes.append("the template changes earlier turns, so only the last answer of a conversation is trained")
        if not writes.end:
            notes.append("the template writes no token after an answer, so EOS follows the last one")
        return notes


def _says_something(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant" and bool(content_text(message).strip() or message.get("tool_calls"))


def load_rules(
    cfg: DataConfig, companions: Mapping[str, bytes], where: str, tokenizer: tokenizers.Tokenizer, eos: int,
    date: str = "",
) -> Rules | None:  # fmt: skip
    """The rules of a config's records; None for text.

    Args:
      cfg: the run's.
      companions: files beside the model's weights.
      where: the model, for messages.
      tokenizer: of the model.
      eos: its end-of-sequence token.
      date: ISO date that the template writes; "": today, at 00:00.

    Raises:
      UserError: there is no template, or it fails.
    """
    if kind_of(cfg.format) == "text":
        return None
    template = load_template(cfg.template, companions, where)
    if template.needs_date:
        template = dataclasses.replace(template, date=date or datetime.date.today().isoformat())
    return Rules(tokenizer.to_str(), eos, template, cfg.format, cfg.train_on, cfg.too_long, cfg.keep_ties)


# ---- What is trained -------------------------------------------------------------------------------------------------
def _answers(
    template: Template, found: Conversation, text: str, marked: list[Span], how: dict[str, Any]
) -> list[Span]:  # fmt: skip
    """The spans of the answers: those the template marks, or those between prefixes of the conversation."""
    answers = [i for i, m in enumerate(found.messages) if m["role"] == "assistant"]
    if marked and all(i >= found.prompt and found.messages[i].get("weight", 1) != 0 for i in answers):
        return marked
    if marked and len(marked) == len(answers):
        spans: dict[int, Span | None] = dict(zip(answers, marked, strict=True))
    else:
        spans = {i: _between_prefixes(template, found, i, text, how) for i in answers if i >= found.prompt}
        if answers and spans.get(answers[-1], ()) is None:
            raise UserError(
                f"{template.name}: the prompt for the last answer is no prefix of the whole conversation, so the "
                "trained tokens are unknown; a template with {% generation %} marks them."
            )
    wanted = [i for i in answers if i >= found.prompt and found.messages[i].get("weight", 1) != 0]
    return [span for i in wanted if (span := spans[i]) is not None]


def _between_prefixes(
    template: Template, found: Conversation, i: int, text: str, how: dict[str, Any]
) -> Span | None:  # fmt: skip
    """The span of answer `i`; None where the conversation up to it is written otherwise than within the whole."""
    last = i == len(found.messages) - 1
    try:
        before = template.render(found.messages[:i], add_generation_prompt=True, **how)
        after = text if last else template.render(found.messages[: i + 1], **how)
    except UserError:
        if last:
            raise
        return None
    return (len(before), len(after)) if text.startswith(after) and after.startswith(before) else None


def _last(template: Template, found: Conversation, *rest: Any) -> list[Span]:
    answers = [i for i, m in enumerate(found.messages) if m["role"] == "assistant"]
    silent = [m | {"weight": 0} if i in answers[:-1] else m for i, m in enumerate(found.messages)]
    return _answers(template, dataclasses.replace(found, messages=silent), *rest)


def _all(template: Template, found: Conversation, text: str, *rest: Any) -> list[Span]:
    del template, found, rest
    return [(0, len(text))]


# config.data.train_on -> (template, conversation, its text, the spans it marks, arguments) -> the spans trained
TRAINED: dict[str, Callable[..., Sequence[Span]]] = {"answers": _answers, "last": _last, "all": _all}


# ---- Facts of a tokenizer and a template -----------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class _Writes:
    """Facts of a template, found by a probe."""

    specials: bool  # any special token
    end: bool  # one after an answer
    end_id: int | None  # that token
    end_is_outside: bool  # which {% generation %} does not enclose
    marks: bool  # it uses {% generation %}
    rewrites: bool  # earlier turns are written otherwise once others follow


@functools.lru_cache(maxsize=4)
def _tokenizer(text: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(text)


@functools.lru_cache(maxsize=4)
def _bos(text: str) -> int | None:
    """The token that the tokenizer itself puts at the start of a text; None if it puts none."""
    tokenizer = _tokenizer(text)
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    found = tokenizer.encode("a", add_special_tokens=True).ids
    at = found.index(plain[0]) if plain and plain[0] in found else 0
    return found[0] if at else None


@functools.lru_cache(maxsize=4)
def _writes(text: str, template: Template) -> _Writes:
    question, answer = _PROBE
    turn = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    written, spans = template.render_with_spans(turn)
    specials = {token.content for token in _tokenizer(text).get_added_tokens_decoder().values() if token.special}
    specials |= {value for name, value in template.specials if name in ("bos_token", "eos_token")}
    if answer not in written:
        raise UserError(f"{template.name}: the chat template does not write the answer of a conversation.")
    begin = written.rindex(answer) + len(answer)
    tail = written[begin:]
    trained = written[begin : spans[-1][1]] if spans else tail

    def any_in(part: str) -> bool:
        return any(special in part for special in specials)

    try:
        longer = Conversation([*turn, *turn], 0)
        rewrites = _between_prefixes(template, longer, 1, template.render(longer.messages), {}) is None
    except UserError:
        rewrites = False
    ends = sorted((tail.index(special), special) for special in specials if special in tail)
    end_id = _tokenizer(text).token_to_id(ends[0][1]) if ends else None
    return _Writes(
        any_in(written), any_in(tail), end_id, any_in(tail) and not any_in(trained), bool(spans), rewrites
    )  # fmt: skip

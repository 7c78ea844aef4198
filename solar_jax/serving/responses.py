"""OpenAI's answers: whole, or in the chunks of a stream."""

import dataclasses
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any

from solar_jax.decoding.engine import NewText
from solar_jax.decoding.logprobs import LogProbs
from solar_jax.decoding.model import Loaded
from solar_jax.serving.prepared import PreparedCall, token_offsets
from solar_jax.serving.token_bytes import TokenBytes

_LEAST = -9999.0  # stands for minus infinity, which JSON does not have


@dataclasses.dataclass(frozen=True)
class _Place:
    """A token of a choice with its log-probability; none for the first of a prompt."""

    token: int
    log_prob: float | None
    top: Sequence[tuple[int, float]]
    offset: int  # in the choice's text


@dataclasses.dataclass
class _Part:
    """Part of a choice, or all of it."""

    text: str = ""
    places: list[_Place] = dataclasses.field(default_factory=list)
    finish: str | None = None

    def add(self, other: "_Part") -> None:
        self.text += other.text
        self.places += other.places
        self.finish = other.finish


class Responses:
    """The answers to one call, in OpenAI's form."""

    def __init__(self, prepared: PreparedCall, model: Loaded, name: str, token_bytes: TokenBytes):
        self._prepared, self._model, self._token_bytes = prepared, model, token_bytes
        chat = prepared.call.chat
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": "text_completion" if not chat else "chat.completion",
            "created": int(time.time()),
            "model": name,
        }
        self._begun: set[int] = set()  # choices of which something was given
        self._made = 0  # tokens that were generated

    def whole(self, found: Iterable[tuple[int, NewText]]) -> dict[str, Any]:
        """Returns the answer made of everything that was generated, each piece with its choice."""
        parts = [_Part() for _ in self._prepared.requests]
        for index, piece in found:
            parts[index].add(self._part(index, piece))
        choices = [self._choice(i, part) for i, part in enumerate(parts)]
        return self._head | {"choices": choices, "usage": self.usage}

    def chunks(self, index: int, piece: NewText) -> list[dict[str, Any]]:
        """Returns a choice's next chunks of a stream."""
        call, is_first = self._prepared.call, index not in self._begun
        part = self._part(index, piece)
        choices = []
        if call.chat and is_first:
            choices.append(self._delta(index, {"role": "assistant", "content": ""}, _Part()))
        if part.text or part.places or part.finish is None:
            said = dataclasses.replace(part, finish=None)
            choices.append(self._delta(index, {"content": part.text}, said) if call.chat else self._choice(index, said))
        if part.finish is not None:
            end = _Part(finish=part.finish)
            choices.append(self._delta(index, {}, end) if call.chat else self._choice(index, end))
        return [self._chunk([choice], None) for choice in choices]

    @property
    def last_chunk(self) -> dict[str, Any]:
        """The chunk with the tokens counted."""
        return self._chunk([], self.usage)

    @property
    def usage(self) -> dict[str, int]:
        prompt = sum(len(one.tokens) for one in self._prepared.prompts)
        return {"prompt_tokens": prompt, "completion_tokens": self._made, "total_tokens": prompt + self._made}

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> dict[str, Any]:
        kind = {"object": "chat.completion.chunk"} if self._prepared.call.chat else {}
        counted = {"usage": usage} if self._prepared.call.usage else {}
        return self._head | kind | {"choices": choices} | counted

    # ---- Choices -----------------------------------------------------------------------------------------------------
    def _part(self, index: int, piece: NewText) -> _Part:
        """Reads a piece; the first of a choice begins with the prompt if that is echoed."""
        call, part = self._prepared.call, _Part()
        prompt = self._prepared.prompt_of(index)
        base = len(prompt.text) if call.echo else 0
        if call.echo and index not in self._begun:
            part.text = prompt.text
            if call.top is not None:
                part.places += _prompt_places(piece.prompt, prompt.tokens, token_offsets(prompt, self._model))
        self._begun.add(index)
        part.text += piece.text
        part.places += [_Place(one.token, one.log_prob, one.top, base + one.offset) for one in piece.log_probs]
        if piece.answer is not None:
            part.finish = piece.answer.finish
            self._made += piece.answer.made
        return part

    def _choice(self, index: int, part: _Part) -> dict[str, Any]:
        if self._prepared.call.chat:
            message = {"role": "assistant", "content": part.text, "refusal": None}
            shown = {"index": index, "message": message, "logprobs": self._chat_log_probs(part)}
        else:
            shown = {"index": index, "text": part.text, "logprobs": self._log_probs(part)}
        return shown | {"finish_reason": part.finish}

    def _delta(self, index: int, delta: dict[str, str], part: _Part) -> dict[str, Any]:
        return {
            "index": index, "delta": delta, "logprobs": self._chat_log_probs(part), "finish_reason": part.finish,
        }  # fmt: skip

    # ---- Log-probabilities -------------------------------------------------------------------------------------------
    def _log_probs(self, part: _Part) -> dict[str, Any] | None:
        """Log-probabilities of a completion; None where none are asked for, and at the end of a stream."""
        if self._prepared.call.top is None or not (part.places or part.text):
            return None
        return {
            "tokens": [self._token_bytes.text(place.token) for place in part.places],
            "token_logprobs": [_number(place.log_prob) for place in part.places],
            "top_logprobs": [self._top(place) for place in part.places],
            "text_offset": [place.offset for place in part.places],
        }

    def _top(self, place: _Place) -> dict[str, float | None] | None:
        """The most likely tokens and the one that stands there; of those with one text, the most likely."""
        if place.log_prob is None:
            return None
        found: dict[str, float | None] = {}
        for token, log_prob in (*place.top[: self._prepared.call.top], (place.token, place.log_prob)):
            found.setdefault(self._token_bytes.text(token), _number(log_prob))
        return found

    def _chat_log_probs(self, part: _Part) -> dict[str, Any] | None:
        if self._prepared.call.top is None or not part.places:
            return None
        content = []
        for place in part.places:
            top = [self._scored(*one) for one in place.top[: self._prepared.call.top]]
            content.append(self._scored(place.token, place.log_prob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _scored(self, token: int, log_prob: float | None) -> dict[str, Any]:
        found = self._token_bytes.of(token)
        return {"token": found.decode(errors="replace"), "logprob": _number(log_prob), "bytes": list(found)}


def _prompt_places(found: LogProbs | None, tokens: Sequence[int], offsets: Sequence[int]) -> list[_Place]:
    first = _Place(tokens[0], None, (), offsets[0])
    if found is None:
        return [first]
    chosen, ids, top = (array.tolist() for array in (found.chosen, found.ids, found.top))
    return [first, *(
        _Place(token, chosen[i], tuple(zip(ids[i], top[i], strict=True)), offsets[i + 1])
        for i, token in enumerate(tokens[1:])
    )]  # fmt: skip


def _number(log_prob: float | None) -> float | None:
    return None if log_prob is None else max(log_prob, _LEAST)

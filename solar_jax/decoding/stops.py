"""Text of tokens as they come, and strings that end it, also across tokens and across UTF-8 characters."""

import dataclasses
from collections.abc import Sequence

import tokenizers

from solar_jax.errors import UserError

_BROKEN = "\N{REPLACEMENT CHARACTER}"  # stands for bytes that are no character yet


def check_stops(stops: object) -> tuple[str, ...]:
    """Returns stop strings as a tuple.

    Raises:
      UserError: it is no string or list of strings that are not empty.
    """
    found = [stops] if isinstance(stops, str) else stops
    if not isinstance(found, list | tuple) or not all(isinstance(s, str) and s for s in found):
        raise UserError(f"stop must be a string or a list of strings that are not empty, found {stops!r}.")
    return tuple(found)


@dataclasses.dataclass
class TextStream:
    """The text of one answer, which grows token by token.

    `push` returns what can no longer change: whole characters that no stop string may begin in.
    """

    tokenizer: tokenizers.Tokenizer
    stops: tuple[str, ...] = ()
    skip_special: bool = True
    tokens: list[int] = dataclasses.field(default_factory=list)
    text: str = ""  # all that was returned
    stopped: bool = False  # a stop string was met; it is not part of the text

    _from: int = 0  # first token that is decoded again
    _settled: int = 0  # tokens whose text is known, from `_from` on
    _held: str = ""  # text that is not returned yet

    @property
    def length(self) -> int:
        """Characters that the tokens so far have settled, held back ones too."""
        return len(self.text) + len(self._held)

    def push(self, token: int) -> str:
        """Adds a token and returns the text that is new."""
        self.tokens.append(token)
        before = self._decode(self._from, self._settled)
        now = self._decode(self._from, len(self.tokens))
        if now.endswith(_BROKEN):
            return ""  # in the middle of a character
        self._from, self._settled = self._settled, len(self.tokens)
        self._held += now[len(before) :]
        return self._release(final=False)

    def finish(self) -> str:
        """Returns what is left once no token follows."""
        if not self.stopped and self._settled < len(self.tokens):
            before = self._decode(self._from, self._settled)
            self._held += self._decode(self._from, len(self.tokens))[len(before) :]
            self._settled = len(self.tokens)
        return self._release(final=True)

    def _decode(self, start: int, stop: int) -> str:
        return self.tokenizer.decode(self.tokens[start:stop], skip_special_tokens=self.skip_special)

    def _release(self, *, final: bool) -> str:
        if self.stopped:
            return ""
        found = min((at for stop in self.stops if (at := self._held.find(stop)) >= 0), default=-1)
        if found >= 0:
            self.stopped, keep = True, found
        else:
            keep = len(self._held) - (0 if final else _possible(self._held, self.stops))
        out, self._held = self._held[:keep], self._held[keep:]
        self.text += out
        return out


def _possible(text: str, stops: Sequence[str]) -> int:
    """How many of the last characters may be the beginning of a stop string."""
    longest = 0
    for stop in stops:
        for n in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:n]):
                longest = n
                break
    return longest

"""The bytes that each token stands for, which need not be whole characters."""

import functools
import re

import tokenizers

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's


class TokenBytes:
    """The bytes and the text of a tokenizer's tokens."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        self._added = tokenizer.get_added_tokens_decoder()
        decoder = str(tokenizer.decoder)
        self._byte_level, self._spaced = "ByteLevel(" in decoder, _SPACE in decoder
        self.of = functools.lru_cache(maxsize=1 << 17)(self._of)

    def _of(self, token: int) -> bytes:
        """Returns a token's bytes; none for a token that the tokenizer does not know."""
        if token in self._added:
            return self._added[token].content.encode()
        text = self._tokenizer.id_to_token(token)
        if text is None:
            return b""
        if self._byte_level and all(c in _BYTES for c in text):
            return bytes(_BYTES[c] for c in text)
        if not self._byte_level and (match := re.fullmatch(r"<0x([0-9A-F]{2})>", text)):
            return bytes([int(match[1], 16)])
        if self._spaced:
            return text.replace(_SPACE, " ").encode()
        return self._tokenizer.decode([token], skip_special_tokens=False).encode()

    def text(self, token: int) -> str:
        r"""Returns a token's text; bytes that are no whole characters are written as OpenAI does, bytes:\xe2\x80."""
        found = self.of(token)
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)


def _alphabet() -> dict[str, int]:
    """Returns the byte of each character by which byte-level vocabularies write bytes."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + i): byte for i, byte in enumerate(rest)}


_BYTES = _alphabet()

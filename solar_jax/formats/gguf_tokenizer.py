"""Converts a GGUF tokenizer to tokenizer.json: byte-level BPE, and SentencePiece BPE rebuilt from pieces and scores."""

import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from solar_jax.errors import UserError
from solar_jax.formats.gguf_header import short

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type
_SPACE = "▁"  # SentencePiece's space marker
_PREFIX = "tokenizer.ggml."
_LONGEST_PIECE = 256  # SentencePiece's default limit is 16
_BYTES = [f"<0x{i:02X}>" for i in range(256)]


def _cut(*patterns: str) -> pre_tokenizers.PreTokenizer:
    """Splits text at every match of the first pattern, then splits the remainder by the next pattern, and so on."""
    cuts = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@dataclasses.dataclass(frozen=True)
class Words:
    """Pre-tokenization rules: how text is split into words before byte-level BPE."""

    pre_tokenizer: pre_tokenizers.PreTokenizer
    nfc: bool = False  # the text is NFC-normalised first
    whole: bool = False  # a word in the vocabulary is one token, whatever the merges say
    bos: bool = False  # prepend BOS unless the file says otherwise


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = Words(_cut(_CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST), whole=True, bos=True)
_QWEN2 = Words(_cut(_CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST), nfc=True)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# `tokenizer.ggml.pre` -> rules
WORDS = {
    "gpt-2": Words(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "smollm": Words(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    ),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    # llama.cpp's fallback where its converter did not recognise the model's pre-tokenizer.
    "default": Words(_cut(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
    """Validated metadata under `tokenizer.ggml`."""

    path: pathlib.Path
    fields: dict[str, Any]
    tokens: list[str]
    kinds: list[int]

    def of_kind(self, kind: int) -> list[str]:
        return [token for token, k in zip(self.tokens, self.kinds, strict=True) if k == kind]

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    def token(self, name: str) -> str | None:
        """Returns the token of a role such as "bos", or None where the file names none.

        Raises:
          UserError: the token is not in the vocabulary.
        """
        key = f"{_PREFIX}{name}_token_id"
        if (value := self.fields.get(key)) is None:
            return None
        if type(value) is not int or not 0 <= value < len(self.tokens):
            raise UserError(f"{self.path}: {key} must be below {len(self.tokens)}, found {short(value)}.")
        return self.tokens[value]

    def flag(self, name: str, default: bool) -> bool:
        value = self.fields.get(f"{_PREFIX}{name}", default)
        if type(value) is not bool:
            raise UserError(f"{self.path}: {_PREFIX}{name} must be true or false, found {short(value)}.")
        return value


def files(path: pathlib.Path, fields: dict[str, Any], context_length: Any) -> dict[str, bytes]:
    """Builds tokenizer.json and tokenizer_config.json.

    Args:
      path: the GGUF file, for messages.
      fields: the file's metadata.
      context_length: the model's context length.

    Raises:
      UserError: the tokenizer type is not supported, or metadata are missing or contradictory.
    """
    kind, pre = fields.get(f"{_PREFIX}model"), fields.get(f"{_PREFIX}pre")
    words = WORDS.get(pre) if kind == "gpt2" and isinstance(pre, str) else None
    if words is None and kind != "llama":
        known = ", ".join(["llama", *(f"gpt2/{name}" for name in WORDS)])
        raise UserError(f"{path}: the tokenizer must be one of {known}, found {short(kind)}/{short(pre)}.")
    tokens = _strings(path, fields, "tokens")
    kinds = _numbers(path, fields, "token_type", len(tokens))
    vocabulary = _Vocabulary(path, fields, tokens, kinds)
    try:
        tokenizer = _byte_level(vocabulary, words) if words else _sentencepiece(vocabulary)
    except UserError:
        raise
    except Exception as e:  # the library raises plain Exception
        text = " ".join(str(e).split())[:300]
        raise UserError(f"{path}: {_PREFIX}tokens and {_PREFIX}merges do not form a tokenizer: {text}.") from e
    added = [tokenizers.AddedToken(t, normalized=False) for t in vocabulary.of_kind(_USER_DEFINED) if t]
    special = [t for t in vocabulary.of_kind(_CONTROL) + vocabulary.of_kind(_UNKNOWN) if t]
    tokenizer.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens(added)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }
    if words:
        config["add_prefix_space"] = False
    for name, hf_name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        if (token := vocabulary.token(name)) is not None:
            config[f"{hf_name}_token"] = token
    _add_ends(tokenizer, vocabulary, bos=words.bos if words else True)
    template = fields.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{path}: tokenizer.chat_template must be text, found {short(template)}.")
    if template:
        config["chat_template"] = template
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode(),
    }


def _byte_level(vocabulary: _Vocabulary, words: Words) -> tokenizers.Tokenizer:
    model = models.BPE(vocab=vocabulary.ids, merges=_listed_merges(vocabulary), ignore_merges=words.whole)
    tokenizer = tokenizers.Tokenizer(model)
    if words.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = words.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    """Builds SentencePiece BPE as in Llama 2 and Mistral: spaces are characters, unknown characters become bytes."""
    unknown = vocabulary.token("unknown") or next(iter(vocabulary.of_kind(_UNKNOWN)), None)
    if unknown is None and not set(_BYTES) <= set(vocabulary.tokens):
        raise UserError(f"{vocabulary.path}: the tokenizer needs all 256 byte tokens or an unknown one, found neither.")
    merges = _listed_merges if f"{_PREFIX}merges" in vocabulary.fields else _merges_of_scores
    model = models.BPE(
        vocab=vocabulary.ids, merges=merges(vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    tokenizer = tokenizers.Tokenizer(model)
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    spaces = normalizers.Replace(" ", _SPACE)
    if vocabulary.flag("add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _listed_merges(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    merges = []
    for merge in _strings(vocabulary.path, vocabulary.fields, "merges"):
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            raise UserError(f"{vocabulary.path}: {_PREFIX}merges must be pairs of tokens, found {short(merge)}.")
        merges.append((left, right))
    return merges


def _merges_of_scores(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Derives merges from SentencePiece scores, best first: pieces with higher scores are merged earlier.

    Every split of a piece into two other pieces is a merge.
    """
    scores = _numbers(vocabulary.path, vocabulary.fields, "scores", len(vocabulary.tokens))
    normal = {
        token: score
        for token, score, kind in zip(vocabulary.tokens, scores, vocabulary.kinds, strict=True)
        if kind == _NORMAL
    }
    made = [score for token, score in normal.items() if len(token) > 1]
    if (len(made) > 1 and len(set(made)) == 1) or not all(map(math.isfinite, made)):
        raise UserError(f"{vocabulary.path}: {_PREFIX}scores must order the pieces, found {short(made)}.")
    if (longest := max(map(len, normal), default=0)) > _LONGEST_PIECE:
        raise UserError(f"{vocabulary.path}: pieces must have at most {_LONGEST_PIECE} characters, found {longest}.")
    ids = vocabulary.ids
    merges = []
    for token, score in normal.items():
        ways = [
            (left, token[i:]) for i in range(1, len(token)) if (left := token[:i]) in normal and token[i:] in normal
        ]
        merges += [(score, *way) for way in sorted(ways, key=lambda way: (ids[way[0]], ids[way[1]]))]
    merges.sort(key=lambda merge: (-merge[0], -len(merge[1]), -len(merge[2])))
    return [(left, right) for _, left, right in merges]


def _add_ends(tokenizer: tokenizers.Tokenizer, vocabulary: _Vocabulary, bos: bool) -> None:
    """Adds BOS and EOS to encoded text as the file requests."""
    ends = {}
    for name, default in (("bos", bos), ("eos", False)):
        token = vocabulary.token(name)
        if token and vocabulary.flag(f"add_{name}_token", default):
            ends[name] = token
    if not ends:
        return
    bos_part, eos_part = ([name] if name in ends else [] for name in ("bos", "eos"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*bos_part, "$A", *eos_part],
        pair=[
            *bos_part,
            "$A",
            *eos_part,
            *(f"{name}:1" for name in bos_part),
            "$B:1",
            *(f"{name}:1" for name in eos_part),
        ],
        special_tokens=[{"id": name, "ids": [vocabulary.ids[t]], "tokens": [t]} for name, t in ends.items()],
    )


def _strings(path: pathlib.Path, fields: dict[str, Any], name: str) -> list[str]:
    value = _present(path, fields, name)
    if not isinstance(value, list):
        raise UserError(f"{path}: {_PREFIX}{name} must list strings, found {short(value)}.")
    return value


def _numbers(path: pathlib.Path, fields: dict[str, Any], name: str, count: int) -> list[Any]:
    value = _present(path, fields, name)
    if not hasattr(value, "itemsize"):
        raise UserError(f"{path}: {_PREFIX}{name} must list numbers, found {short(value)}.")
    if len(value) != count:
        raise UserError(f"{path}: {_PREFIX}{name} must have {count} entries, found {len(value)}.")
    return list(value)


def _present(path: pathlib.Path, fields: dict[str, Any], name: str) -> Any:
    if f"{_PREFIX}{name}" not in fields:
        raise UserError(f"{path}: the metadata key {_PREFIX}{name} is missing.")
    return fields[f"{_PREFIX}{name}"]

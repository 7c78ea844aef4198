"""Numbers as exact fractions: the one that an answer ends in, and those that a question names."""

import collections
import re
import unicodedata
from fractions import Fraction

_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
_MONEY = r"[$€£¥]?"
# A value is a mixed number, or a number with or without a denominator.
_VALUE = rf"(?:(?P<whole>\d+)\s+(?P<a>\d+)\s*/\s*(?P<b>\d+)|(?P<n>{_DIGITS})(?:\s*/\s*(?P<d>{_DIGITS}))?)"
_NAMED = re.compile(_VALUE)
_STATED = re.compile(
    rf"[\s$*\"'(:~≈]*(?:[A-Za-z]\w*\s*=\s*)?[\s$*(]*(?P<sign>[-+]?)\s*{_MONEY}\s*(?P<sign2>[-+]?)\s*{_VALUE}"
)
# After the value: a unit of words, "%" or "cm^2", and then nothing but what may follow a comma. A letter right behind
# a number is a variable, as in "2x".
_UNIT = r"(?:[\s%$°€£¥*)\"']*(?:(?:(?<=[\s%$°-])|(?=[A-Za-z]{2}))[A-Za-z][A-Za-z\s/.'’²³-]*(?:\^\{?[23]\}?)?)?)"
_REST = re.compile(rf"{_UNIT}[\s.$*)\"'%]*(?:$|[,;:(](?!\s*[\d$(-]))")
# Forms of LaTeX and typography -> plain text.
_PLAIN = (
    (re.compile(r"[−–]"), "-"),
    (re.compile(r"\\left|\\right|\\[!,;: ]"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\[dtc]?frac\s*(\d)\s*(\d)(?!\d)"), r" \1/\2"),
    (re.compile(r"\\[dtc]?frac\s*\{\s*([\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}"), r" \1/\2"),
    (re.compile(r"\\(?:text|mathrm|textbf|mbox|mathbf)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\^\{?\\circ\}?"), " degrees"),
    (re.compile(r"\\[()\[\]]"), " "),
    (re.compile(r"\*\*|`"), ""),
)
_VULGAR = re.compile(r"[¼-¾⅐-⅞]")
# Marks that a final number stands behind. What the first two mark must be it: then no earlier mark is read.
_HASHES = re.compile(r"^[ \t]*####[ \t]*([^\n]*)", re.MULTILINE)
_BOXED = re.compile(r"\\f?boxed\s*\{")
_SAID = re.compile(r"\banswer\b[\s*]*(?:is|:|=)[\s:*]*([^\n]*)", re.IGNORECASE)
_SENTENCE = re.compile(r"[.!?](?=\s|$)")
_LONGEST = 300  # characters in which a number and its unit are looked for; a model may repeat itself without end
_MOST_DIGITS = 100  # of a number; Python itself refuses some thousand
# fmt: off
_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
# fmt: on
_WORDS = {word: Fraction(i) for i, word in enumerate(_ONES)}
_WORDS |= {word: Fraction(10 * i) for i, word in enumerate(_TENS, 2)}
_WORDS |= {"half": Fraction(1, 2), "dozen": Fraction(12)}
_WORD = re.compile(
    rf"\b(?:(?P<ten>{'|'.join(_TENS)})[- ](?P<one>{'|'.join(_ONES[1:10])})|(?P<word>{'|'.join(_WORDS)}))\b",
    re.IGNORECASE,
)


def final_number(answer: str) -> Fraction | None:
    r"""Returns the number that an answer ends in, or None.

    It stands behind `####`, in `\boxed{}` or behind "the answer is", whichever comes last; or it is the result or the
    only number of the last line. Currency, percent signs and units are ignored.
    """
    marks = [m for pattern in (_HASHES, _BOXED, _SAID) for m in pattern.finditer(answer)]
    for mark in sorted(marks, key=lambda m: m.start(), reverse=True):
        number = _stated(_up_to_brace(answer, mark.end()) if mark.re is _BOXED else _sentence(mark[1]))
        if number is not None or mark.re is not _SAID:
            return number
    last = next((line for line in reversed(answer.splitlines()) if line.strip()), "")
    if marks or not last:
        return None
    if "=" in last:
        return _stated(_sentence(last.rpartition("=")[2]))
    named = [_value(m) for m in _NAMED.finditer(_plain(last))]
    return named[0] if len(named) == 1 and "-" not in last else _stated(_sentence(last))


def lost_and_added(original: str, rephrased: str) -> tuple[list[Fraction], list[Fraction]]:
    """Compares the numbers of two questions, each as often as it occurs.

    A number in digits may become its word, or the other way; words alone, such as "one", are not compared.

    Returns:
      The numbers that only the original has, and those that only the rephrased question has.
    """
    (digits, words), (new_digits, new_words) = _named(original), _named(rephrased)
    lost = (digits - new_digits) - (new_words - words)
    added = (new_digits - digits) - (words - new_words)
    return sorted(lost.elements()), sorted(added.elements())


def _named(text: str) -> tuple[collections.Counter[Fraction], collections.Counter[Fraction]]:
    """Counts the numbers that a text has in digits, and those that it has in words."""
    digits = [number for m in _NAMED.finditer(_plain(text)) if (number := _value(m)) is not None]
    words = [
        _WORDS[m["word"].lower()] if m["word"] else _WORDS[m["ten"].lower()] + _WORDS[m["one"].lower()]
        for m in _WORD.finditer(text)
    ]
    return collections.Counter(digits), collections.Counter(words)


def _stated(text: str) -> Fraction | None:
    """Returns the number that a text begins with, if nothing but a unit follows."""
    text = _plain(text[:_LONGEST]).strip()
    match = _STATED.match(text)
    if match is None or not _REST.match(text, match.end()):
        return None
    number = _value(match)
    return -number if number is not None and "-" in (match["sign"], match["sign2"]) else number


def _sentence(text: str) -> str:
    return _SENTENCE.split(text.strip())[0]


def _value(match: re.Match[str]) -> Fraction | None:
    """Returns the value of a match of `_VALUE`, or None if it divides by zero."""
    parts = (match["whole"] or "0", match["a"] or match["n"], match["b"] or match["d"] or "1")
    if any(len(part) > _MOST_DIGITS for part in parts):
        return None
    whole, above, below = (Fraction(part.replace(",", "")) for part in parts)
    return whole + above / below if below else None


def _plain(text: str) -> str:
    text = _VULGAR.sub(lambda m: f" {unicodedata.normalize('NFKC', m[0])}", text).replace("\N{FRACTION SLASH}", "/")
    for pattern, plain in _PLAIN:
        text = pattern.sub(plain, text)
    return text


def _up_to_brace(text: str, begin: int) -> str:
    """Returns what stands before the brace that closes the one before `begin`."""
    depth = 1
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if not depth:
            return text[begin:i]
    return text[begin:]

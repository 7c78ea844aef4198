"""Reasons for which a record is dropped, a table, and the checks that find them."""

import dataclasses
import re
import unicodedata
from collections.abc import Callable

from solar_jax.data.making.endpoint import Reply
from solar_jax.data.making.numbers import final_number, lost_and_added
from solar_jax.data.making.seeds import Seed
from solar_jax.data.prepared.decontamination import Index, Match
from solar_jax.data.sources import Document

# Name of a reason -> what it means, in the order in which they are counted in a report.
REASONS = {
    "contaminated": "shares consecutive words with an evaluation set",
    "no_original_number": "the original answer ends in no number to compare with",
    "refused": "the endpoint refused the request",
    "empty": "the endpoint wrote nothing",
    "cut_off": "the endpoint stopped before the text was complete",
    "unchanged": "the rephrased question is the original",
    "changed_numbers": "the rephrased question lost or added numbers",
    "no_final_number": "the answer ends in no number",
    "wrong_final_number": "the answer ends in another number than the original",
    "same_answer": "the chosen answer is the rejected one",
    "duplicate": "the rephrased question occurred before",
}
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_SHOWN = 200  # characters of a line
_CUT = {"length", "content_filter"}  # finish reasons
Check = Callable[[Seed, str], str | None]  # (seed, text) -> details if it fails


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A reason of `REASONS`, with what was found."""

    reason: str
    details: str
    evaluation: str = ""  # the record of an evaluation set, where one was found


def normalised(text: str) -> str:
    """Returns the words of a text in lower case, without whitespace and punctuation."""
    text = _THOUSANDS.sub("", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(re.findall(r"[^\W_]+", text))


def _unchanged(seed: Seed, question: str) -> str | None:
    return "but for case, whitespace and punctuation" if normalised(seed.question) == normalised(question) else None


def _changed_numbers(seed: Seed, question: str) -> str | None:
    lost, added = lost_and_added(seed.question, question)
    sides = [f"{what} {', '.join(map(str, side))}" for what, side in (("lost", lost), ("added", added)) if side]
    return "; ".join(sides) or None


def _no_final_number(seed: Seed, answer: str) -> str | None:
    del seed
    last = ([line for line in answer.splitlines() if line.strip()] or [""])[-1]
    return f"its last line is {last.strip()[:_SHOWN]!r}" if final_number(answer) is None else None


def _wrong_final_number(seed: Seed, answer: str) -> str | None:
    found = final_number(answer)
    return f"{found} in place of {seed.number}" if found != seed.number else None


# Reason -> its check, in the order in which they are made.
QUESTION_CHECKS: dict[str, Check] = {"unchanged": _unchanged, "changed_numbers": _changed_numbers}
ANSWER_CHECKS: dict[str, Check] = {"no_final_number": _no_final_number, "wrong_final_number": _wrong_final_number}


def first_failure(checks: dict[str, Check], seed: Seed, text: str) -> Dropped | None:
    for reason, check in checks.items():
        if (details := check(seed, text)) is not None:
            return Dropped(reason, details)
    return None


def incomplete(reply: Reply, text: str, what: str) -> Dropped | None:
    """Returns a reason if a reply is cut off or has no text; `what` names it."""
    if reply.finish in _CUT:
        return Dropped("cut_off", f"{what}: {reply.finish}")
    return None if text else Dropped("empty", what)


def contaminated(index: Index | None, where: str, text: str) -> Dropped | None:
    match: Match | None = index.matches(Document(where, text)) if index else None
    if match is None:
        return None
    return Dropped("contaminated", f"shares {match.words!r} with {match.evaluation}", match.evaluation)

"""Prompts that ask a model to rephrase a question and to answer it, as data.

`PROMPTS_VERSION` changes with any of them: it is part of every record, and a job goes on only with its own.
"""

import re
from typing import Any

PROMPTS_VERSION = "1"
REPHRASE = (
    "You rewrite mathematical questions. Keep every number, every unit and the meaning, so that the answer stays the "
    "same; write numbers as the question does. Change words, order and sentences as much as you can. Do not solve the "
    "question and do not hint at its answer. Reply with the new question alone."
)
ANSWER = (
    "You solve mathematical questions. Reason step by step, one step a line, and show each calculation. End with a "
    "line of its own: The answer is: NUMBER. NUMBER is the result alone, as an integer, a decimal or a fraction."
)
# The k-th rephrasing of a question takes the k-th manner, so that several differ even at temperature 0.
MANNERS = (
    "",
    "Put what is asked at the beginning.",
    "Tell it as a short everyday scene.",
    "Write it tersely, as an exam would.",
    "Write it as one person who asks another.",
)
_THOUGHT = re.compile(r"\s*<think>.*?(?:</think>|\Z)", re.DOTALL)
_LABEL = re.compile(
    r"\s*(?:here(?: i|')s (?:the|a|your) [a-z ]{0,20}(?:question|version|problem) ?:"
    r"|\**(?:the )?(?:(?:rephrased|rewritten|new) )?question\**\s*:)\s*\**\s*",
    re.IGNORECASE,
)
_QUOTES = {'"': '"', "“": "”", "'": "'"}


def rephrase_messages(question: str, rephrasing: int) -> list[dict[str, Any]]:
    manner = MANNERS[rephrasing % len(MANNERS)]
    return _asked(f"{REPHRASE} {manner}".rstrip(), question)


def answer_messages(question: str) -> list[dict[str, Any]]:
    return _asked(ANSWER, question)


def _asked(system: str, user: str) -> list[dict[str, Any]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def said_question(text: str) -> str:
    """Returns the question in a reply, without thoughts, a label such as "Question:" or quotes around it."""
    text = _LABEL.sub("", said_answer(text), count=1) if _LABEL.match(said_answer(text)) else said_answer(text)
    inner = text[1:-1]
    return inner.strip() if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[0] not in inner else text


def said_answer(text: str) -> str:
    """Returns a reply without the thoughts that some models write before it."""
    return (_THOUGHT.sub("", text, count=1) if _THOUGHT.match(text) else text).strip()

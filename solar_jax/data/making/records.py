"""Forms of the records that are made: conversations, and pairs of a rephrased answer and the original one."""

from collections.abc import Callable
from typing import Any

Texts = tuple[str, str, str]  # rephrased question, answer to it, original answer


def _said_by(role: str, text: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": text}]


def _instruct(texts: Texts) -> dict[str, Any]:
    question, answer, _ = texts
    return {"prompt": _said_by("user", question), "completion": _said_by("assistant", answer)}


def _alignment(texts: Texts) -> dict[str, Any]:
    question, answer, original = texts
    return {
        "prompt": _said_by("user", question), "chosen": _said_by("assistant", answer),
        "rejected": _said_by("assistant", original),
    }  # fmt: skip


# --kind -> the record; data.chat.formats reads the first as `prompt_completion` and the second as `preference`.
MADE: dict[str, Callable[[Texts], dict[str, Any]]] = {"math_instruct": _instruct, "math_alignment": _alignment}
PAIRED = "math_alignment"

"""Forms of conversation and preference records, a table: known by their keys, and turned into messages."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from solar_jax.errors import UserError

Message = dict[str, Any]  # {"role", "content"}, and whatever else the template reads; "weight": 0 is not trained
ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
             "bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system", "tool": "tool",
             "observation": "tool", "function_response": "tool"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages, and what a template takes beside them. The first `prompt` messages are never trained."""

    messages: list[Message]
    prompt: int = 0
    tools: list[Any] | None = None
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # `chat_template_kwargs`


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two conversations that share a prompt; `tie` where the record's own scores are equal."""

    chosen: Conversation
    rejected: Conversation
    tie: bool = False


Reader = Callable[[dict[str, Any], str], Any]  # (record, where) -> Conversation or Pair


def _text(record: dict[str, Any], key: str, where: str, optional: bool = False) -> str:
    value = record.get(key)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} must hold text, found {type(value).__name__}.")
    return value


def _message(value: Any, where: str, roles: Mapping[str, str] | None = None) -> Message:
    """A message with a known role; ShareGPT's `from` and `value` become `role` and `content`."""
    role_key, content_key = ("from", "value") if roles else ("role", "content")
    if not isinstance(value, dict) or role_key not in value:
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise UserError(f"{where}: a message must have {role_key!r} and {content_key!r}, found {found}.")
    role = (roles or {}).get(value[role_key], value[role_key])
    if role not in ROLES:
        raise UserError(f"{where}: a message's {role_key!r} must be one of {', '.join(ROLES)}, found {role!r}.")
    content = value.get(content_key)
    if content is None and not value.get("tool_calls"):
        raise UserError(f"{where}: a message of the role {role!r} has no {content_key!r}.")
    if not isinstance(content, str | list | None):
        raise UserError(f"{where}: a message's {content_key!r} must hold text, found {type(content).__name__}.")
    rest = {key: v for key, v in value.items() if key not in (role_key, content_key) and v is not None}
    return {"role": role, "content": content} | rest


def _messages(value: Any, where: str, key: str, roles: Mapping[str, str] | None = None) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {key!r} must hold a list of messages, found {type(value).__name__}.")
    return [_message(one, where, roles) for one in value]


def _beside(record: dict[str, Any], where: str) -> dict[str, Any]:
    """The tools and template arguments of a record."""
    tools, kwargs = record.get("tools"), record.get("chat_template_kwargs") or {}
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as e:
            raise UserError(f"{where}: 'tools' is not JSON: {e}.") from e
    if tools is not None and not isinstance(tools, list):
        raise UserError(f"{where}: 'tools' must hold a list, found {type(tools).__name__}.")
    if not isinstance(kwargs, dict):
        raise UserError(f"{where}: 'chat_template_kwargs' must hold an object, found {type(kwargs).__name__}.")
    return {"tools": tools or None, "kwargs": kwargs}


def _said(user: str, system: str = "") -> list[Message]:
    head: list[Message] = [{"role": "system", "content": system}] if system else []
    return [*head, {"role": "user", "content": user}]


def _answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _instruction(record: dict[str, Any], where: str) -> list[Message]:
    instruction, more = _text(record, "instruction", where), _text(record, "input", where, optional=True)
    return _said(f"{instruction}\n\n{more}" if more else instruction, _text(record, "system", where, optional=True))


def _chat(record: dict[str, Any], where: str) -> Conversation:
    return Conversation(_messages(record["messages"], where, "messages"), **_beside(record, where))


def _sharegpt(record: dict[str, Any], where: str) -> Conversation:
    messages = _messages(record["conversations"], where, "conversations", _SHAREGPT)
    if (system := _text(record, "system", where, optional=True)) and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return Conversation(messages, **_beside(record, where))


def _prompt_of(value: Any, where: str) -> list[Message]:
    return _said(value) if isinstance(value, str) else _messages(value, where, "prompt")


def _prompt_completion(record: dict[str, Any], where: str) -> Conversation:
    prompt, completion = _prompt_of(record["prompt"], where), record["completion"]
    answer = [_answer(completion)] if isinstance(completion, str) else _messages(completion, where, "completion")
    return Conversation([*prompt, *answer], len(prompt), **_beside(record, where))


def _alpaca(record: dict[str, Any], where: str) -> Conversation:
    return Conversation([*_instruction(record, where), _answer(_text(record, "output", where))])


def _openorca(record: dict[str, Any], where: str) -> Conversation:
    user = _said(_text(record, "question", where), _text(record, "system_prompt", where, optional=True))
    return Conversation([*user, _answer(_text(record, "response", where))])


def _metamath(record: dict[str, Any], where: str) -> Conversation:
    return Conversation([*_said(_text(record, "query", where)), _answer(_text(record, "response", where))])


def _gsm8k(record: dict[str, Any], where: str) -> Conversation:
    return Conversation([*_said(_text(record, "question", where)), _answer(_text(record, "answer", where))])


def _pair_of(prompt: list[Message], record: dict[str, Any], where: str) -> Pair:
    """A pair whose answers are text or messages; messages may repeat the prompt."""
    sides, beside, before = [], _beside(record, where), [(m["role"], m["content"]) for m in prompt]
    for key in ("chosen", "rejected"):
        value = record[key]
        answer = [_answer(value)] if isinstance(value, str) else _messages(value, where, key)
        if before and [(m["role"], m["content"]) for m in answer[: len(before)]] == before:
            answer = answer[len(before) :]
        sides.append(answer)
    if not prompt:
        if any(isinstance(record[key], str) for key in ("chosen", "rejected")):
            raise UserError(f"{where}: 'chosen' and 'rejected' are text, which needs a 'prompt'.")
        shared = 0
        while all(len(side) > shared + 1 for side in sides) and sides[0][shared] == sides[1][shared]:
            shared += 1
        prompt, sides = sides[0][:shared], [side[shared:] for side in sides]
    if not prompt or any(not side or side[0]["role"] != "assistant" for side in sides):
        raise UserError(
            f"{where}: 'chosen' and 'rejected' must share a prompt that each goes on with an answer of the assistant; "
            f"found {[m['role'] for m in [*prompt, *sides[0]]]} and {[m['role'] for m in [*prompt, *sides[1]]]}."
        )
    chosen, rejected = (Conversation([*prompt, *side], len(prompt), **beside) for side in sides)
    return Pair(chosen, rejected, _tied(record))


def _tied(record: dict[str, Any]) -> bool:
    if isinstance(record.get("metadata"), dict):
        record = record["metadata"] | record
    for a, b in (("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating"),
                 ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating")):  # fmt: skip
        if record.get(a) is not None and record.get(b) is not None:
            return record[a] == record[b]
    return False


def _preference(record: dict[str, Any], where: str) -> Pair:
    prompt = record.get("prompt")
    if isinstance(prompt, str) and (system := record.get("system")):
        return _pair_of(_said(prompt, system), record, where)
    return _pair_of([] if not prompt else _prompt_of(prompt, where), record, where)


def _orca_pairs(record: dict[str, Any], where: str) -> Pair:
    system = _text(record, "system", where, optional=True)
    return _pair_of(_said(_text(record, "question", where), system), record, where)


def _alpaca_pairs(record: dict[str, Any], where: str) -> Pair:
    return _pair_of(_instruction(record, where), record, where)


# Name -> (the keys that a record of this form has, its reader); the first whose keys are all there is taken.
CONVERSATIONS: dict[str, tuple[tuple[str, ...], Reader]] = {
    "messages": (("messages",), _chat),
    "sharegpt": (("conversations",), _sharegpt),
    "prompt_completion": (("prompt", "completion"), _prompt_completion),
    "alpaca": (("instruction", "output"), _alpaca),
    "openorca": (("question", "response"), _openorca),
    "metamath": (("query", "response"), _metamath),
    "gsm8k": (("question", "answer"), _gsm8k),
}
PAIRS: dict[str, tuple[tuple[str, ...], Reader]] = {
    "orca_pairs": (("question", "chosen", "rejected"), _orca_pairs),
    "alpaca_pairs": (("instruction", "chosen", "rejected"), _alpaca_pairs),
    "preference": (("chosen", "rejected"), _preference),
}
KINDS = {"conversations": CONVERSATIONS, "pairs": PAIRS}


FORMS = ("text", *(name for kind, table in KINDS.items() for name in (kind, *table)))  # config.data.format


def kind_of(form: str) -> str:
    """The kind of record that config.data.format names: a name of `KINDS`, or "text"."""
    return form if form in KINDS else next((kind for kind, table in KINDS.items() if form in table), "text")


def read_record(record: Any, where: str, form: str) -> Conversation | Pair:
    """Reads a record.

    Args:
      record: as a file holds it.
      where: its name, for messages.
      form: a name of `KINDS`, whose forms are known by the record's keys, or the name of one form.

    Raises:
      UserError: it is of no known form, or a part of it is missing or of another type.
    """
    table = KINDS[kind_of(form)]
    if not isinstance(record, dict):
        raise UserError(f"{where}: must be a record with keys, found {type(record).__name__}.")
    if form in KINDS:
        form = next((name for name, (keys, _) in table.items() if all(record.get(k) is not None for k in keys)), "")
        if not form:
            known = "; ".join(f"{name}: {', '.join(keys)}" for name, (keys, _) in table.items())
            raise UserError(f"{where}: is of no known form ({known}), found the keys {sorted(record)}.")
    keys, reader = table[form]
    missing = [key for key in keys if record.get(key) is None]
    if missing:
        raise UserError(f"{where}: a record of the form {form!r} must have {missing[0]!r}, found {sorted(record)}.")
    return reader(record, where)


def contents(found: Conversation | Pair) -> str:
    """The text of a record's messages, by which it is split, deduplicated and searched for evaluation sets."""
    if isinstance(found, Pair):
        rejected = dataclasses.replace(found.rejected, messages=found.rejected.messages[found.rejected.prompt :])
        return f"{contents(found.chosen)}\n\n{contents(rejected)}"
    return "\n\n".join(content_text(message) for message in found.messages)


def content_text(message: Message) -> str:
    """A message's content as text, also where it is a list of parts."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text", "") if isinstance(part, dict) else str(part) for part in content)
    return content or ""

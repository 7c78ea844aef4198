"""OpenAI's requests, checked field by field and read into one form.

Fields that are not known are ignored, as OpenAI does, but for those that ask for another answer than would be given.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from solar_jax.decoding.logprobs import MOST_TOP
from solar_jax.decoding.sampling import Sampling
from solar_jax.decoding.stops import check_stops
from solar_jax.errors import UserError
from solar_jax.serving.api_errors import ApiError
from solar_jax.serving.fields import encodable, integer, number, truth, wrong

MOST_CHOICES = 128  # n
_MOST_PROMPTS = 2048
_MOST_TOKEN = 2**31 - 1
_MOST_SEED = 2**63
_NEW = 16  # tokens of a completion where the request says nothing, as OpenAI's
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

# Fields that would change the answer and are not supported, with the values that ask for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "suffix": ("",), "logit_bias": ({},), "presence_penalty": (0,),
    "frequency_penalty": (0,), "modalities": (["text"],), "audio": (), "web_search_options": (),
    # Other servers' own.
    "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (), "structured_outputs": (),
    "grammar": ("",), "json_schema": (), "min_tokens": (0,), "ignore_eos": (False,), "stop_token_ids": ([],),
    "bad_words": ([],), "use_beam_search": (False,), "length_penalty": (1,), "prompt_embeds": (),
    "truncate_prompt_tokens": (), "chat_template": (), "chat_template_kwargs": ({},), "documents": ([],),
    "continue_final_message": (False,), "add_generation_prompt": (True,),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Call:
    """A request for answers."""

    chat: bool
    model: str | None
    prompts: tuple[str | tuple[int, ...], ...] = ()  # of a completion: each a text or tokens
    messages: tuple[dict[str, str], ...] = ()  # of a chat
    n: int = 1  # answers to each prompt
    most_new: int | None = None  # tokens of an answer; None: what the context leaves
    sampling: Sampling = dataclasses.field(default_factory=Sampling)  # but for the seed
    seed: int | None = None  # of the first answer to each prompt; None: any
    stops: tuple[str, ...] = ()
    stream: bool = False
    usage: bool = False  # a stream ends with the tokens counted
    echo: bool = False  # the prompt stands before its answers
    top: int | None = None  # most likely tokens beside each log-probability; None: no log-probabilities


def read_completion(body: Mapping[str, Any]) -> Call:
    """Reads the body of /v1/completions.

    Raises:
      ApiError: a field is missing, wrong, or asks for what is not supported.
    """
    echo = truth(body, "echo")
    most_new = integer(body, "max_tokens", _NEW, 0, _MOST_TOKEN)
    if most_new == 0 and not echo:
        raise ApiError("max_tokens must be at least 1 where echo is not set, found 0.", param="max_tokens")
    shared = _shared(body)
    if body.get("best_of") not in (None, shared["n"]):
        raise ApiError(f"best_of is not supported, but for the value of n, {shared['n']}.", param="best_of")
    top = integer(body, "logprobs", None, 0, MOST_TOP)
    prompts = _prompts(body.get("prompt"))
    if (answers := len(prompts) * shared["n"]) > _MOST_PROMPTS:
        raise ApiError(f"{len(prompts)} prompts of n={shared['n']} are {answers}, above {_MOST_PROMPTS}.", param="n")
    return Call(chat=False, prompts=prompts, echo=echo, most_new=most_new, top=top, **shared)


def read_chat(body: Mapping[str, Any]) -> Call:
    """Reads the body of /v1/chat/completions.

    Raises:
      ApiError: as in `read_completion`.
    """
    shared = _shared(body)
    if body.get("best_of") not in (None, 1):
        raise ApiError("best_of is not supported.", param="best_of")
    most_new = integer(body, "max_completion_tokens", None, 1, _MOST_TOKEN)
    if most_new is None:
        most_new = integer(body, "max_tokens", None, 1, _MOST_TOKEN)
    top = integer(body, "top_logprobs", None, 0, MOST_TOP)
    if not truth(body, "logprobs"):
        if top:
            raise ApiError("top_logprobs needs logprobs to be true.", param="top_logprobs")
        top = None
    elif top is None:
        top = 0
    return Call(chat=True, messages=_messages(body.get("messages")), most_new=most_new, top=top, **shared)


# ---- Fields of both --------------------------------------------------------------------------------------------------
def _shared(body: Mapping[str, Any]) -> dict[str, Any]:
    for name, harmless in _REFUSED.items():
        if (value := body.get(name)) is not None and value not in harmless:
            raise ApiError(f"{name} is not supported; leave it out.", param=name)
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise wrong("model", "a name", model)
    stream = truth(body, "stream")
    return {
        "model": model,
        "n": integer(body, "n", 1, 1, MOST_CHOICES),
        "sampling": _sampling(body),
        "seed": integer(body, "seed", None, -_MOST_SEED, _MOST_SEED - 1),
        "stops": _stops(body.get("stop")),
        "stream": stream,
        "usage": _include_usage(body.get("stream_options"), stream),
    }


def _sampling(body: Mapping[str, Any]) -> Sampling:
    return Sampling(
        temperature=number(body, "temperature", 1.0, 0, 100),
        top_k=integer(body, "top_k", 0, 0, 1 << 30) or 0,
        top_p=number(body, "top_p", 1.0, 1e-6, 1),
        min_p=number(body, "min_p", 0.0, 0, 1),
        repetition_penalty=number(body, "repetition_penalty", 1.0, 1e-3, 1e3),
    )


def _stops(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    try:
        return tuple(encodable("stop", text) for text in check_stops(value))
    except UserError as e:
        raise ApiError(str(e), param="stop") from e


def _include_usage(value: Any, stream: bool) -> bool:
    if value is None:
        return False
    if not isinstance(value, dict):
        raise wrong("stream_options", "an object", value)
    if not stream:
        raise ApiError("stream_options needs stream to be true.", param="stream_options")
    return truth(value, "include_usage")


# ---- Prompts ---------------------------------------------------------------------------------------------------------
def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(value, str):
        return (encodable("prompt", value),)
    kinds = {type(item) for item in value} if isinstance(value, list) else set()
    if kinds == {str} and len(value) <= _MOST_PROMPTS:
        return tuple(encodable("prompt", item) for item in value)
    if kinds == {int}:
        return (_tokens(value),)
    if kinds == {list} and len(value) <= _MOST_PROMPTS:
        return tuple(_tokens(item) for item in value)
    raise wrong("prompt", f"a text, a list of tokens, or a list of at most {_MOST_PROMPTS} of either", value)


def _tokens(value: list[Any]) -> tuple[int, ...]:
    if not all(type(token) is int and 0 <= token <= _MOST_TOKEN for token in value):
        raise wrong("prompt", "made of tokens, integers that are not negative", value)
    return tuple(value)


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise wrong("messages", "a list of at least one message", value)
    return tuple(_message(f"messages[{i}]", message) for i, message in enumerate(value))


def _message(where: str, message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise wrong(where, "an object with a role and content", message)
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise wrong(f"{where}.role", f"one of {', '.join(_ROLES)}", role)
    for name in ("tool_calls", "function_call", "audio"):
        if message.get(name):
            raise ApiError(f"{where}.{name} is not supported.", param=f"{where}.{name}")
    return {"role": _ROLES[role], "content": _content(f"{where}.content", message.get("content"))}


def _content(where: str, value: Any) -> str:
    if isinstance(value, str):
        return encodable(where, value)
    if not isinstance(value, list) or not value:
        raise wrong(where, "a text or a list of text parts", value)
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise wrong(where, 'made of parts {"type": "text", "text": ...}', part)
    return "\n".join(encodable(where, part["text"]) for part in value)

"""A call made ready for the engine: its prompts as tokens, and a request for each answer."""

import dataclasses
import secrets
from collections.abc import Iterator

from solar_jax.decoding.engine import Engine, Request
from solar_jax.decoding.model import Loaded
from solar_jax.decoding.stops import TextStream
from solar_jax.errors import UserError
from solar_jax.serving.api_errors import ApiError
from solar_jax.serving.protocol import Call


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as text and as tokens."""

    text: str
    tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class PreparedCall:
    """A call with what the engine is asked."""

    call: Call
    prompts: tuple[Prompt, ...]
    requests: tuple[Request, ...]  # the answers to the first prompt, then those to the second, and so on

    def prompt_of(self, index: int) -> Prompt:
        """Returns the prompt of a choice."""
        return self.prompts[index // self.call.n]


def prepare_call(call: Call, model: Loaded, engine: Engine) -> PreparedCall:
    """Tokenises a call's prompts and checks that each can be answered; takes as long as the prompts are.

    Raises:
      ApiError: one cannot.
    """
    field = "messages" if call.chat else "prompt"
    try:
        prompts = tuple(_prompts(call, model))
        requests = tuple(one for prompt in prompts for one in _requests(call, prompt, engine))
        for request in requests[:: call.n]:
            engine.check(request)
    except UserError as e:
        raise ApiError(str(e), param=field) from e
    return PreparedCall(call, prompts, requests)


def _prompts(call: Call, model: Loaded) -> list[Prompt]:
    if call.chat:
        return [Prompt("", tuple(model.encode_chat(list(call.messages))))]
    return [_prompt(given, model) for given in call.prompts]


def _prompt(given: str | tuple[int, ...], model: Loaded) -> Prompt:
    if isinstance(given, str):
        return Prompt(given, tuple(model.encode(given)))
    if (largest := max(given, default=0)) >= model.cfg.vocab_size:
        raise UserError(f"the prompt has the token {largest}, but the model has {model.cfg.vocab_size}.")
    return Prompt(model.tokenizer.decode(given, skip_special_tokens=False), given)


def _requests(call: Call, prompt: Prompt, engine: Engine) -> Iterator[Request]:
    """Yields what the engine is asked for a prompt: n answers, each drawn with a seed of its own."""
    new = engine.context - len(prompt.tokens) if call.most_new is None else call.most_new
    if call.most_new is None and new < 1:
        raise UserError(
            f"the prompt's {len(prompt.tokens)} tokens leave none for an answer in the context of {engine.context}."
        )
    seed = secrets.randbits(63) if call.seed is None else call.seed
    for choice in range(call.n):
        yield Request(
            prompt.tokens, new, dataclasses.replace(call.sampling, seed=(seed + choice) % 2**63), call.stops,
            log_probs=call.top is not None,
            prompt_log_probs=new == 0 or (call.echo and call.top is not None),
        )  # fmt: skip


def token_offsets(prompt: Prompt, model: Loaded) -> list[int]:
    """Returns the place of each token in its prompt's text; tokens that the tokenizer put in front are at 0."""
    stream, places = TextStream(model.tokenizer, skip_special=False), []
    for token in prompt.tokens:
        places.append(stream.length)
        stream.push(token)
    stream.finish()
    before = max(0, stream.length - len(prompt.text))
    return [min(max(0, place - before), len(prompt.text)) for place in places]

"""Decoding engine: rows of a cache, each with a request of its own, that join and leave while others go on."""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jax.sharding import Mesh

from solar_jax.config import ModelConfig
from solar_jax.decoding import logprobs
from solar_jax.decoding.forward import (
    Cache,
    Layout,
    cache_bytes,
    empty_cache,
)
from solar_jax.decoding.programs import make_programs
from solar_jax.decoding.sampling import Sampling, settings_of
from solar_jax.decoding.stops import TextStream
from solar_jax.decoding.weights import laid_out
from solar_jax.errors import UserError
from solar_jax.hardware import chips
from solar_jax.model.shapes import Params
from solar_jax.parallel import rules

# Lengths of prompts and of the cache are rounded up to one of these, each compiled once.
BUCKETS = tuple(sorted({2**n for n in range(4, 21)} | {k * 2**n for k in (4, 5, 6, 7) for n in range(6, 18)}))
_FIRST = 128  # the shortest cache
_FULL = 0.9  # share of a device's memory that weights and cache may take


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and how it is answered."""

    tokens: tuple[int, ...]
    max_new_tokens: int = 256
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    stops: tuple[str, ...] = ()
    log_probs: bool = False  # of the answer's tokens
    prompt_log_probs: bool = False  # of the prompt's; no token need then be generated


@dataclasses.dataclass(frozen=True)
class Answer:
    """Generated tokens and their text, without the end token and without the stop string."""

    tokens: tuple[int, ...]
    text: str
    finish: str  # "stop" or "length"
    made: int = 0  # tokens that were generated, with the end token


@dataclasses.dataclass(frozen=True)
class NewText:
    """New text of a request."""

    number: int  # of the request
    text: str
    answer: Answer | None = None  # once it is complete
    log_probs: tuple[logprobs.TokenLogProb, ...] = ()  # of the tokens whose text is new
    prompt: logprobs.LogProbs | None = None  # of the prompt's tokens after the first, once, as numpy arrays


@dataclasses.dataclass
class _Row:
    number: int
    request: Request
    stream: TextStream
    position: int  # of the token that is fed next
    token: int  # that token
    made: int = 0
    held: list[logprobs.TokenLogProb] = dataclasses.field(default_factory=list)  # of tokens whose text is not out yet


def bucket(length: int, most: int) -> int:
    """Returns the bucket of a length: the next one, at most `most`."""
    return min(next(size for size in BUCKETS if size >= length), most)


@functools.partial(jax.jit, donate_argnums=0)
def _copied(into: Cache, cache: Cache) -> Cache:
    """A longer cache with the content of a shorter one."""
    return jax.tree.map(lambda new, old: jax.lax.dynamic_update_slice_in_dim(new, old, 0, new.ndim - 2), into, cache)


class Engine:
    """A model that answers requests."""

    def __init__(
        self, cfg: ModelConfig, params: Params, tokenizer: tokenizers.Tokenizer, *, ends: Sequence[int],
        compute_dtype: Any = jnp.float32, rows: int = 1, context: int = 0, mesh: Mesh | None = None,
    ):  # fmt: skip
        """Prepares a model.

        Args:
          cfg: the architecture.
          params: the state, on its devices.
          tokenizer: of the model.
          ends: tokens that end an answer.
          compute_dtype: dtype of matmuls, activations and cache.
          rows: B, requests that are answered at a time.
          context: most tokens of a prompt with its answer; the model's own if 0.
          mesh: of the state; rows are rounded up to what its axes of the batch divide. None: one device.
        """
        self.cfg, self.tokenizer, self.ends = cfg, tokenizer, frozenset(ends)
        self.context = min(context or cfg.max_position_embeddings, cfg.max_position_embeddings)
        rows = rules.padded_rows(rows, mesh) if mesh else rows
        self._dtype, self.rows = compute_dtype, rows
        self._layout = Layout(apart=jax.default_backend() == "cpu", mesh=mesh)
        self._lay_out = jax.jit(functools.partial(laid_out, cfg=cfg, compute_dtype=compute_dtype))
        self._params: Params = self._lay_out(params)
        self._length = 0
        self._cache: Cache = {}
        self._free = list(range(rows))[::-1]
        self._active: dict[int, _Row] = {}
        self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
        self._numbers = itertools.count()
        self._programs = make_programs(cfg, rows, compute_dtype, self._layout)
        self._seen = self._programs.unseen()

    def use(self, params: Params) -> None:
        """Puts other parameters of the same shape in place of these; none, to free them and the cache."""
        self._params = self._lay_out(params) if params else {}
        if not params:
            self._cache, self._length = {}, 0

    def check(self, request: Request) -> None:
        """Raises a UserError for a request that cannot be answered."""
        if not request.tokens:
            raise UserError("the prompt has no tokens.")
        if request.max_new_tokens < (least := 0 if request.prompt_log_probs else 1):
            raise UserError(f"max_new_tokens must be at least {least}, found {request.max_new_tokens}.")
        if (total := len(request.tokens) + request.max_new_tokens) > self.context:
            raise UserError(
                f"the prompt's {len(request.tokens)} tokens and {request.max_new_tokens} new ones are {total}, more "
                f"than the context of {self.context}."
            )
        if (largest := max(request.tokens)) >= self.cfg.vocab_size:
            raise UserError(f"the prompt has the token {largest}, but the model has {self.cfg.vocab_size}.")
        self._check_memory(bucket(total, self.context))

    def _check_memory(self, length: int) -> None:
        """Raises a UserError if a cache of this length does not fit on this process's devices, beside the weights."""
        devices = jax.local_devices()
        needed = cache_bytes(self.cfg, self.rows, length, self._dtype) // jax.process_count()
        weights = sum(s.data.nbytes for x in jax.tree.leaves(self._params) for s in x.addressable_shards)
        memories = len(devices) if devices[0].platform != "cpu" else 1  # devices on a CPU share theirs
        space = int(_FULL * memories * chips.memory_bytes(devices[0])) - weights
        if needed > space:
            most = space // max(1, cache_bytes(self.cfg, 1, length, self._dtype))
            raise UserError(
                f"the cache of {self.rows} rows of {length} tokens needs {needed:,} bytes, but {max(0, space):,} are "
                f"left beside the weights: {max(0, most)} rows fit."
            )

    def submit(self, request: Request) -> int:
        """Queues a request and returns its number.

        Raises:
          UserError: as in `check`.
        """
        self.check(request)
        number = next(self._numbers)
        self._waiting.append((number, request))
        return number

    def cancel(self, number: int) -> None:
        """Drops a request, whether it waits or is being answered."""
        self._waiting = collections.deque(item for item in self._waiting if item[0] != number)
        for row, one in list(self._active.items()):
            if one.number == number:
                self._release(row)

    @property
    def is_idle(self) -> bool:
        return not (self._waiting or self._active)

    def step(self) -> list[NewText]:
        """Admits requests to free rows, generates one token for each row, and returns what is new."""
        pieces = []
        while self._waiting and self._free:
            pieces += self._admit(*self._waiting.popleft())
        if not self._active:
            return pieces
        rows = [self._active.get(i) for i in range(self.rows)]
        self._grow(max(row.position for row in rows if row) + 1)
        tokens = np.array([row.token if row else 0 for row in rows], np.int32)
        positions = np.array([row.position if row else 0 for row in rows], np.int32)
        steps = np.array([row.made if row else 0 for row in rows], np.int32)
        plain = all(row.request.sampling.is_plain for row in rows if row)
        scored = any(row.request.log_probs for row in rows if row)
        settings = settings_of([row.request.sampling if row else Sampling() for row in rows])
        found, self._cache, self._seen, scores = self._programs.decode(
            self._params,
            self._cache,
            self._seen,
            *self._programs.placed((tokens, positions, settings, steps)),
            plain=plain,
            scored=scored,
        )
        scores = logprobs.on_host(scores)
        for i, token in enumerate(np.asarray(found).tolist()):
            if i in self._active:
                self._active[i].position += 1
                pieces += self._took(i, token, scores, i)
        return pieces

    def answers(self, requests: Iterable[Request]) -> Iterator[tuple[int, Answer]]:
        """Yields the answer of each request with its place among them, as they are completed."""
        places = {self.submit(request): place for place, request in enumerate(requests)}
        while not self.is_idle:
            for piece in self.step():
                if piece.answer is not None and piece.number in places:
                    yield places[piece.number], piece.answer

    def _admit(self, number: int, request: Request) -> list[NewText]:
        row = self._free.pop()
        length = len(request.tokens)
        padded = bucket(length, self.context)
        self._grow(max(padded, min(length + 1, self.context)))
        tokens = np.zeros(padded, np.int32)
        tokens[:length] = request.tokens
        inputs = (tokens, np.int32(length), np.int32(row), settings_of([request.sampling]))
        found, self._cache, self._seen, scores, prompt = self._programs.prefill(
            self._params, self._cache, self._seen, *self._programs.placed(inputs), plain=request.sampling.is_plain,
            scored=request.log_probs, whole=request.prompt_log_probs,
        )  # fmt: skip
        stream = TextStream(self.tokenizer, request.stops)
        self._active[row] = _Row(number, request, stream, length, 0)
        first = [NewText(number, "", prompt=logprobs.on_host(prompt, length - 1))] if prompt is not None else []
        if request.max_new_tokens == 0:
            self._release(row)
            return [*first, NewText(number, "", Answer((), "", "length"))]
        return [*first, *self._took(row, int(found[0]), logprobs.on_host(scores), 0)]

    def _took(self, row: int, token: int, scores: logprobs.LogProbs | None, place: int) -> list[NewText]:
        """Takes a row's next token, whose log-probability is in a place of `scores`; returns the text that is new."""
        one = self._active[row]
        one.made += 1
        one.token = token
        if scores is not None and one.request.log_probs:
            one.held.append(logprobs.placed(scores, place, token, one.stream.length))
        ended = token in self.ends
        new = "" if ended else one.stream.push(token)
        finish = "stop" if ended or one.stream.stopped else "length" if one.made >= one.request.max_new_tokens else ""
        if not finish and not new:
            return []
        if not finish:
            return [NewText(one.number, new, None, logprobs.take_released(one.held, one.stream, final=False))]
        new += one.stream.finish()
        finish = "stop" if one.stream.stopped else finish
        self._release(row)
        answer = Answer(tuple(one.stream.tokens), one.stream.text, finish, one.made)
        return [NewText(one.number, new, answer, logprobs.take_released(one.held, one.stream, final=True))]

    def _release(self, row: int) -> None:
        del self._active[row]
        self._free.append(row)

    def _grow(self, length: int) -> None:
        """Makes the cache hold so many positions."""
        if length <= self._length:
            return
        wanted = bucket(max(length, _FIRST), self.context)
        fresh = empty_cache(self.cfg, self.rows, wanted, self._dtype, self._layout)
        if self._length:
            fresh = _copied(fresh, self._cache)
        self._cache, self._length = fresh, wanted

"""lm-eval's view of a model: what it asks is computed in this process, on the mesh, with common beginnings shared."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from solar_jax.checkpoints.checkpoint import numpy_dtype
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.cli.progress import count_bar
from solar_jax.decoding.engine import Answer, Engine, Request
from solar_jax.decoding.model import Loaded, load_model
from solar_jax.decoding.sampling import Sampling
from solar_jax.errors import UserError
from solar_jax.evaluation.scoring import BUDGET, Scored, Scorer
from solar_jax.evaluation.store import Store, key_of_text
from solar_jax.evaluation.trie import Query
from solar_jax.model.shapes import Params

NAME = "solar_jax"  # as lm-eval's --model takes it
_T = TypeVar("_T")
_MOST_NEW = 256  # tokens of an answer where the task says nothing

Pair = tuple[tuple[str, str], list[int], list[int]]  # (context, continuation) as text, and the tokens of each


@register_model(NAME)
class SolarModel(TemplateLM):
    """A model for lm-eval, with the tokenisation and truncation of its own Hugging Face class."""

    def __init__(
        self, pretrained: str | Loaded, *, dtype: str = "float32", max_length: int | str | None = None,
        add_bos_token: bool | str | None = None, rows: int | str = 8, budget: int | str = BUDGET, share: bool = True,
        store: Store | None = None, scorer: Scorer | None = None, quiet: bool = False,
        **ignored: Any,
    ):  # fmt: skip
        """Loads a model.

        Args:
          pretrained: SRC, or a model that is loaded.
          dtype: of weights and activations.
          max_length: most tokens of a context with its continuation; the model's own if None.
          add_bos_token: whether texts begin with the BOS token; as the tokenizer does if None.
          rows: answers that are generated side by side.
          budget: tokens of a row in which sequences are scored.
          share: compute common beginnings once.
          store: answers that are known, of the same model and settings.
          scorer: that scores, if it is made already.
          quiet: no progress bars.
          ignored: settings of other classes, such as batch_size, device and max_batch_size.
        """
        super().__init__()
        self.loaded = pretrained if isinstance(pretrained, Loaded) else load_model(open_checkpoint(pretrained), dtype)
        longest = self.loaded.cfg.max_position_embeddings
        self.max_length = min(int(max_length), longest) if max_length else longest
        self._add_bos = {"True": True, "False": False}.get(str(add_bos_token))
        self._rows, self._share = int(rows), share in (True, "True")
        compute_dtype = numpy_dtype(self.loaded.dtype)
        self.scorer = scorer or Scorer(
            self.loaded.cfg, self.loaded.params, mesh=self.loaded.mesh, compute_dtype=compute_dtype, budget=int(budget)
        )
        self._store, self._quiet = store, quiet
        self._made: Engine | None = None
        self._whole: Callable[[], Params] | None = None
        specials = self.loaded.specials
        known = {name: self.loaded.tokenizer.token_to_id(text) for name, text in specials.items()}
        self._ids = {name: found for name, found in known.items() if found is not None}
        if "eos_token" not in self._ids:
            raise UserError(f"{self.loaded.where}: tokenizer_config.json names no eos_token, which lm-eval needs.")

    def use(self, params: Params, whole: Callable[[], Params]) -> None:
        """Puts other parameters in place of these.

        Args:
          params: for the scorer.
          whole: makes the stacked state for answers; called only if some are asked for.
        """
        self.scorer.params, self._whole = params, whole
        if self._made is not None:
            self._made.use({})

    # ---- Tokens ------------------------------------------------------------------------------------------------------
    @property
    def eot_token_id(self) -> int:
        return self._ids["eos_token"]

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context: BOS, or EOS where there is none."""
        return self._ids.get("bos_token", self.eot_token_id)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        del kwargs
        special = True if self._add_bos is None else self._add_bos
        if add_special_tokens is not None:
            special = add_special_tokens
        elif string.startswith(self._prefix):
            special = False
        return self.loaded.tokenizer.encode(string, add_special_tokens=special).ids

    @functools.cached_property
    def _prefix(self) -> str:
        return self.loaded.tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)

    # ---- Log-likelihoods ---------------------------------------------------------------------------------------------
    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        del disable_tqdm, kwargs
        found: list[Any] = [(0.0, True)] * len(requests)
        asked = [(i, self._query(context, continuation)) for i, (_, context, continuation) in enumerate(requests)]
        asked = [(i, query) for i, query in asked if query.targets]
        for number, scored in self._scores([query for _, query in asked]):
            found[asked[number][0]] = (scored.total, scored.all_greedy)
        return found

    def _scores(self, queries: list[Query]) -> Iterator[tuple[int, Scored]]:
        scores = self.scorer.scores(queries, share=self._share, store=self._store)
        return self._shown(scores, len(queries), "continuations scored")

    def _shown(self, answers: Iterator[tuple[int, _T]], count: int, what: str) -> Iterator[tuple[int, _T]]:
        """Passes answers on, with a bar of their number."""
        if self._quiet or not count:
            yield from answers
            return
        with count_bar(count, 0, what) as update:
            for answer in answers:
                update(1, "")
                yield answer

    def _query(self, context: Sequence[int], continuation: Sequence[int]) -> Query:
        tokens = [*context, *continuation][-(self.max_length + 1) :][:-1]
        return Query(tuple(tokens), tuple(continuation[-len(tokens) :] if tokens else ()))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        del disable_tqdm
        windows = [(i, window) for i, request in enumerate(requests) for window in self._windows(request.args[0])]
        queries = [self._query(*window) for _, window in windows]
        totals = [0.0] * len(requests)
        for number, scored in self._scores(queries):
            totals[windows[number][0]] += scored.total
        return totals

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        tokens = self.tok_encode(text)
        windows = utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
        return map(utils.make_disjoint_window, windows)

    # ---- Generation --------------------------------------------------------------------------------------------------
    def _engine(self, requests: int) -> Engine:
        """An engine for so many requests; the one there is, if it has the rows."""
        rows = min(self._rows, max(1, requests))
        if self._whole is not None:
            self.loaded = dataclasses.replace(self.loaded, params=self._whole())
        if self._made is None or self._made.rows < rows:
            self._made = self.loaded.engine(rows, self.max_length)
        elif self._whole is not None:
            self._made.use(self.loaded.params)
        if self._whole is not None:
            self.loaded, self._whole = dataclasses.replace(self.loaded, params={}), None
        return self._made

    def _answers(self, requests: list[Request]) -> Iterator[tuple[int, Answer]]:
        return self._engine(len(requests)).answers(requests) if requests else iter(())

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        del disable_tqdm
        asked = [self._request(*request.args) for request in requests]
        keys = [key_of_text(request) for request in asked]
        found = [self._store.text(key) if self._store else None for key in keys]
        left = [i for i, text in enumerate(found) if text is None]
        for place, answer in self._shown(self._answers([asked[i] for i in left]), len(left), "answers generated"):
            found[left[place]] = answer.text
            if self._store:
                self._store.add_text(keys[left[place]], answer.text)
        return [text or "" for text in found]

    def _request(self, context: str, gen_kwargs: dict[str, Any]) -> Request:
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, _MOST_NEW))
        new = int(kwargs["max_gen_toks"])
        if self.max_length <= new:
            raise UserError(f"max_gen_toks={new} must be below the context of {self.max_length} tokens.")
        stops = handle_stop_sequences(list(kwargs.get("until") or []), eos=None)
        sampling = Sampling(
            float(kwargs.get("temperature") or 0.0), int(kwargs.get("top_k") or 0), float(kwargs.get("top_p") or 1.0)
        )
        tokens = self.tok_encode(context)[-(self.max_length - new) :]
        return Request(tuple(tokens), new, sampling, tuple(stop for stop in stops if stop))

    # ---- Chats -------------------------------------------------------------------------------------------------------
    @property
    def tokenizer_name(self) -> str:
        return self.loaded.where.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.loaded.template.text if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if add_generation_prompt:
            return self.loaded.template.render(chat_history, add_generation_prompt=True)
        # The last message is to be continued: the text up to where its content ends.
        text, last = self.loaded.template.render(chat_history), chat_history[-1]["content"]
        return text[: text.rindex(last) + len(last)]

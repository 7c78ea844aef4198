"""The search of a cut: which layers of a base to repeat so that the deeper model starts at the lowest loss."""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from solar_jax.checkpoints import lineage
from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.cli.progress import count_bar, duration
from solar_jax.model.shapes import is_vector, layer_axes, size
from solar_jax.searching.cache import Scorer, make_scorer
from solar_jax.searching.candidates import Cut, blocks_text, check_added, dus_cut, slices_text, source_layers
from solar_jax.searching.plan import Ledger, forwards, run_search
from solar_jax.searching.predict import rank_correlation, seam_ratios
from solar_jax.searching.store import LossStore, search_key
from solar_jax.searching.texts import SearchText, by_document, mean_and_error

ROWS = 16  # of a batch at most
FINALISTS = 5


@dataclasses.dataclass(frozen=True)
class SearchSettings:
    """Numbers of a search, which its result depends on."""

    add: int
    forwards: float = 80.0  # budget, in forwards of the base over the search text
    finalists: int = FINALISTS  # cuts that are scored on the final text


@dataclasses.dataclass(frozen=True)
class Scored:
    """A cut and its loss on the search text."""

    cut: Cut
    loss: float  # nats a token
    final_loss: float | None = None  # over the search text and the final one, of finalists


@dataclasses.dataclass(frozen=True)
class Confirmation:
    """Losses on a text that the search did not see."""

    text: SearchText
    losses: dict[Cut, float]  # () is the base
    errors: dict[tuple[Cut, Cut], tuple[float, float]]  # (x, y) -> loss(x) - loss(y), its standard error by documents


@dataclasses.dataclass(frozen=True)
class FoundCut:
    """Result of a search. `blocks` and `slices` are what config.growth takes."""

    best: Scored
    dus: Scored | None  # None where the base is too short for it
    base_loss: float
    candidates: tuple[Scored, ...]  # that add all layers, lowest loss first
    partial: tuple[Scored, ...]  # that add fewer, for the ranking alone
    ratios: np.ndarray  # [n + 1, n + 1], of predict.seam_ratios
    confirmed: tuple[Confirmation, ...]
    layers: int  # n
    spent: float  # forwards of the base
    ended: str  # why

    @property
    def blocks(self) -> str:
        return blocks_text(self.best.cut)

    @property
    def source_layers(self) -> tuple[int, ...]:
        return source_layers(self.best.cut, self.layers)

    @property
    def slices(self) -> str:
        return slices_text(self.source_layers)

    def correlation(self) -> dict[int, tuple[int, float]]:
        """Spearman's correlation of seam ratio and excess over single blocks of two visits: length -> (number, it)."""
        found: dict[int, list[tuple[float, float]]] = {}
        for scored in (*self.candidates, *self.partial):
            if len(scored.cut) == 1 and scored.cut[0].visits == 2:
                block = scored.cut[0]
                found.setdefault(block.b - block.a, []).append((self.ratios[block.a, block.b], scored.loss))
        pairs = {length: np.array(values) for length, values in sorted(found.items(), reverse=True) if len(values) > 2}
        return {length: (len(v), rank_correlation(v[:, 0], v[:, 1])) for length, v in pairs.items()}


def find_cut(
    c: Checkpoint, mesh: Mesh, text: SearchText, settings: SearchSettings, *, final: SearchText | None = None,
    confirm: Sequence[SearchText] = (), dtype: str = "float32", store: pathlib.Path | None = None,
    say: Callable[[str], None] = print,
) -> FoundCut:  # fmt: skip
    """Finds the cut of a base that adds so many layers at the lowest loss, by copies alone.

    The best few on `text` are scored on `final` too, another part of the same documents, which decides between them.
    Nothing is chosen by the texts to confirm.

    Args:
      c: the base.
      mesh: of a run.
      text: what losses are measured on.
      settings: added layers and budget.
      final: decides between the best; the search text alone does if None.
      confirm: texts that the search did not see.
      dtype: of weights and activations, "float32" or "bfloat16".
      store: losses are kept beside this file, in `store_file`, from which the same search goes on; None keeps none.
      say: prints a line.

    Raises:
      UserError: the base cannot grow by so many layers.
    """
    n = c.cfg.num_hidden_layers
    check_added(settings.add, n)
    texts = [text, *([final] if final else []), *confirm]
    most, length = max(len(t.rows) for t in texts), len(text.rows[0]["tokens"])
    scorer = make_scorer(c, mesh, dtype=dtype, rows=min(ROWS, most, len(text.rows)), length=length, add=settings.add)
    key, _ = search_identity(c, texts, settings, dtype)
    known = LossStore(store_file(store, key) if store else None)
    measure = _Measure(scorer, text, known, say)
    ledger = Ledger(n, settings.add, measure, settings.forwards * (n + measure.head), measure.head)
    with count_bar(round(ledger.budget), 0, "search") as bar:
        measure.begin(ledger, bar)
        ended = run_search(ledger, measure.ratios)
    say(f"search     ended as {ended}: {len(ledger.excess)} cuts, {forwards(ledger):.0f} forwards of the base")

    scored = [Scored(cut, measure.base_loss + excess) for cut, excess in ledger.excess.items()]
    of_cut = {s.cut: s for s in scored}
    dus = dus_cut(settings.add, n)
    full = [of_cut[cut] for cut in ledger.best()]
    compared = list(dict.fromkeys([s.cut for s in full[: settings.finalists]] + ([dus] if dus else [])))
    if final is not None:
        say(f"finals     {len(compared)} cuts on {final.tokens:,} tokens of {final.name}")
        sums = _sums(scorer, known, final, [(), *compared], say)
        joined = measure.joined(final, sums, compared)
        full = [dataclasses.replace(s, final_loss=joined.get(s.cut)) for s in full]
    finalists = [s for s in full if s.final_loss is not None] or full[:1]
    best = min(finalists, key=lambda s: (s.loss if s.final_loss is None else s.final_loss, s.cut))
    shown = list(dict.fromkeys([best.cut, *compared[:2], *([dus] if dus else [])]))
    return FoundCut(
        best=best,
        dus=next((s for s in full if s.cut == dus), None),
        base_loss=measure.base_loss,
        candidates=tuple(full),
        partial=tuple(s for s in scored if sum(b.added for b in s.cut) != settings.add),
        ratios=measure.ratios,
        confirmed=tuple(_confirmed(scorer, known, other, best.cut, shown, say) for other in confirm),
        layers=n,
        spent=forwards(ledger),
        ended=ended,
    )


def store_file(out: pathlib.Path, key: str) -> pathlib.Path:
    """Returns the file of a search's losses beside its result, for the caller to remove once that is written."""
    return out.with_name(f".{out.name}.{key}")


def search_identity(
    c: Checkpoint, texts: Sequence[SearchText], settings: SearchSettings, dtype: str
) -> tuple[str, dict[str, Any]]:
    """Returns the key of a search and what it is a hash of: base, texts, settings and dtype."""
    what = {
        "source": lineage.public_fingerprint(c),
        "texts": [text.sha256() for text in texts],
        "settings": dataclasses.asdict(settings),
        "dtype": dtype,
    }
    return search_key(what), what


class _Measure:
    """Excess of a cut on the search text, from its cache; known losses are not computed again."""

    def __init__(self, scorer: Scorer, text: SearchText, known: LossStore, say: Callable[[str], None]):
        """Runs the base over the text, and times it."""
        self.text, self._known, self._hash = text, known, text.sha256()
        self._bar: Callable[[int, str], None] = lambda n, note: None
        self._ledger: Ledger | None = None
        cfg = scorer.cfg
        weights = sum(size(cfg, letters) for name, letters in layer_axes(cfg).items() if not is_vector(name))
        self.head = size(cfg, "DV") / weights  # layers that take as long as the output projection
        begin = time.perf_counter()
        self._batches = scorer.traced(text.rows)
        self.base_sums = self._measured(())
        compiled = time.perf_counter() - begin
        begin = time.perf_counter()
        self._batches[0].losses(())
        head = (time.perf_counter() - begin) * len(self._batches)
        self.seconds_a_layer = head / self.head
        self.base_loss = mean_and_error(self.base_sums, self.counts)[0]
        self.ratios = seam_ratios(self._norms())
        say(f"base       loss {self.base_loss:.4f} on {text.tokens:,} tokens; {duration(compiled)} with compilation")

    @property
    def counts(self) -> np.ndarray:
        return by_document(np.zeros(self.text.owners.shape), self.text)[1]

    def begin(self, ledger: Ledger, bar: Callable[[int, str], None]) -> None:
        self._ledger, self._bar = ledger, bar

    def __call__(self, cut: Cut) -> float:
        """Excess of a cut in nats a token, and progress."""
        excess = mean_and_error(self._measured(cut) - self.base_sums, self.counts)[0]
        if self._ledger is not None:
            best = self._ledger.best()
            lowest = min([self._ledger.excess[x] for x in best[:1]] or [excess])
            self._bar(round(self._ledger.cost(cut)), f"lowest excess {lowest:.4f}, {cut_name(cut)} {excess:.4f}")
        return excess

    def _measured(self, cut: Cut) -> np.ndarray:
        key = f"{self._hash} {blocks_text(cut)}"
        found = self._known.get(key)
        if found is None:
            values = np.concatenate([batch.losses(cut) for batch in self._batches])[: len(self.text.rows)]
            found = by_document(values, self.text)[0]
            self._known.add(key, found)
        return found

    def _norms(self) -> np.ndarray:
        """[n + 1, tokens] of tokens that count."""
        norms = np.concatenate([np.asarray(batch.norms) for batch in self._batches], axis=1)[:, : len(self.text.rows)]
        return norms[:, self.text.weights > 0].astype(np.float64)

    def joined(self, final: SearchText, sums: dict[Cut, np.ndarray], cuts: Sequence[Cut]) -> dict[Cut, float]:
        """Losses over the search text and the final one together."""
        more = by_document(np.zeros(final.owners.shape), final)[1].sum()
        own = self.counts.sum()
        return {cut: float((self._measured(cut).sum() + sums[cut].sum()) / (own + more)) for cut in cuts}


def cut_name(cut: Cut) -> str:
    """Returns a cut's blocks, "base" if it has none."""
    return blocks_text(cut) or "base"


def _sums(
    scorer: Scorer, known: LossStore, text: SearchText, cuts: Sequence[Cut], say: Callable[[str], None]
) -> dict[Cut, np.ndarray]:
    """Returns sums of losses by document of each cut on a text that is not cached."""
    digest = text.sha256()
    key = {cut: f"{digest} {blocks_text(cut)}" for cut in cuts}
    if left := [cut for cut in cuts if known.get(key[cut]) is None]:
        begin = time.perf_counter()
        values = scorer.losses(text.rows, left)
        for cut, of_cut in zip(left, values, strict=True):
            known.add(key[cut], by_document(of_cut, text)[0])
        say(f"           {len(left)} models on {text.name}: {duration(time.perf_counter() - begin)}")
    found = {cut: known.get(key[cut]) for cut in cuts}
    return {cut: sums for cut, sums in found.items() if sums is not None}


def _confirmed(
    scorer: Scorer, known: LossStore, text: SearchText, best: Cut, cuts: Sequence[Cut], say: Callable[[str], None]
) -> Confirmation:
    """Measures the base and some cuts on a text, and how much the best is below the others, paired by document."""
    sums = _sums(scorer, known, text, [(), *cuts], say)
    counts = by_document(np.zeros(text.owners.shape), text)[1]
    return Confirmation(
        text,
        {cut: mean_and_error(own, counts)[0] for cut, own in sums.items()},
        {(best, cut): mean_and_error(sums[best] - sums[cut], counts) for cut in sums if cut != best},
    )

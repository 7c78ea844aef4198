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
from solar_jax.searching.cache import CutScorer, make_scorer
from solar_jax.searching.candidates import Cut, blocks_text, check_added, dus_cut, slices_text, source_layers
from solar_jax.searching.plan import Evaluations, Measured, added_by, forwards, run_search
from solar_jax.searching.predict import rank_correlation, seam_ratios
from solar_jax.searching.store import LossStore, search_key
from solar_jax.searching.texts import SearchText, by_document, counts_of, mean_and_error

ROWS = 16  # of a batch at most
PARTS = 4  # batches of a search text; a hopeless cut costs one of them
HOPELESS, _SLACK = 1.4, 0.02  # times the best cut's excess on the same batches, and nats
FINALISTS = 5
SHOWN = 2  # cuts that are confirmed, beside dus


@dataclasses.dataclass(frozen=True)
class SearchSettings:
    """Numbers of a search, which its result depends on."""

    add: int
    forwards: float = 60.0  # budget, in forwards of the base over the search text
    finalists: int = FINALISTS  # cuts that are scored on the final text


@dataclasses.dataclass(frozen=True)
class ScoredCut:
    """A cut and its loss on the search text."""

    cut: Cut
    loss: float  # nats a token; where the share is below 1, the base's and the excess on that part
    share: float = 1.0  # of the search text
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

    best: ScoredCut
    dus: ScoredCut | None  # None where the base is too short for it
    base_loss: float
    candidates: tuple[ScoredCut, ...]  # that add all layers, lowest loss first
    partial: tuple[ScoredCut, ...]  # that add fewer, for the ranking alone
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
    length = len(text.rows[0]["tokens"])
    rows = max(1, min(ROWS, -(-len(text.rows) // PARTS)))
    scorer = make_scorer(c, mesh, dtype=dtype, rows=rows, length=length, add=settings.add)
    key, _ = search_identity(c, texts, settings, dtype)
    known = LossStore(store_file(store, key) if store else None)
    measure = _Measure(scorer, text, settings.add, known, say)
    done = Evaluations(n, settings.add, measure, settings.forwards * (n + measure.head), measure.head)
    with count_bar(round(done.budget), 0, "search") as bar:
        measure.report = lambda cut, measured: bar(round(done.cost(cut) * measured.share), _note(done, cut, measured))
        ended = run_search(done, measure.ratios)
    say(f"search     ended as {ended}: {len(done.found)} cuts, {forwards(done):.0f} forwards of the base")

    scored = [ScoredCut(cut, measure.base_loss + x.excess, x.share) for cut, x in done.found.items()]
    whole = sorted((s for s in scored if added_by(s.cut) == settings.add), key=lambda s: (-s.share, s.loss, s.cut))
    finalists = done.best()[: settings.finalists]
    if final is not None:
        say(f"finals     {len(finalists)} cuts on {final.tokens:,} tokens of {final.name}")
        sums, tokens = _sums(scorer, known, final, finalists, say), counts_of(final).sum() + counts_of(text).sum()
        joined = {cut: float((measure.sums(cut).sum() + sums[cut].sum()) / tokens) for cut in finalists}
        whole = [dataclasses.replace(s, final_loss=joined.get(s.cut)) for s in whole]
        finalists.sort(key=lambda cut: (joined[cut], cut))
    dus, of_cut = dus_cut(settings.add, n), {s.cut: s for s in whole}
    shown = list(dict.fromkeys([*finalists[:SHOWN], *([dus] if dus else [])]))
    return FoundCut(
        best=of_cut[finalists[0]],
        dus=of_cut.get(dus) if dus else None,
        base_loss=measure.base_loss,
        candidates=tuple(whole),
        partial=tuple(s for s in scored if added_by(s.cut) != settings.add),
        ratios=measure.ratios,
        confirmed=tuple(_confirmed(scorer, known, other, shown, say) for other in confirm),
        layers=n,
        spent=forwards(done),
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
    """Excess of a cut on the search text, from its cache, batch by batch; known losses are not computed again.

    A cut that is hopeless on the first batches is not measured on the others: one whose excess is `HOPELESS` times
    that of the best so far on the same batches, or that adds fewer layers than asked and serves the ranking alone.
    """

    def __init__(self, scorer: CutScorer, text: SearchText, add: int, known: LossStore, say: Callable[[str], None]):
        """Runs the base over the text."""
        self.text, self._known, self._add, self._rows = text, known, add, scorer.rows
        self._key = f"{text.sha256()} {scorer.rows}"
        self.report: Callable[[Cut, Measured], None] = lambda cut, measured: None
        cfg = scorer.cfg
        weights = sum(size(cfg, letters) for name, letters in layer_axes(cfg).items() if not is_vector(name))
        self.head = size(cfg, "DV") / weights  # layers that take as long as the output projection
        begin = time.perf_counter()
        self._batches = scorer.traced(text.rows)
        self.counts = [self._by_document(np.zeros_like(text.weights[i : i + self._rows]), i)[1] for i in self._starts]
        self.base_loss = mean_and_error(self.sums(()), counts_of(text))[0]
        norms = np.concatenate([np.asarray(batch.norms) for batch in self._batches], axis=1)[:, : len(text.rows)]
        self.ratios = seam_ratios(norms[:, text.weights > 0].astype(np.float64))
        took = duration(time.perf_counter() - begin)
        say(f"base       loss {self.base_loss:.4f} on {text.tokens:,} tokens; {took} with compilation")

    @property
    def _starts(self) -> range:
        return range(0, len(self.text.rows), self._rows)

    def _by_document(self, values: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
        return by_document(values, self.text, start)

    def __call__(self, cut: Cut, best: Cut | None) -> Measured:
        own, base, leader, count = (np.zeros(len(self.text.documents)) for _ in range(4))
        measured = Measured(0.0)
        for i in range(len(self._batches)):
            own, base, count = own + self._of_batch(i, cut), base + self._of_batch(i, ()), count + self.counts[i]
            excess = mean_and_error(own - base, count)[0]
            measured = Measured(excess, (i + 1) / len(self._batches))
            if added_by(cut) < self._add:
                break
            if best is not None:
                leader = leader + self._of_batch(i, best)
                if excess > HOPELESS * max(mean_and_error(leader - base, count)[0], 0.0) + _SLACK:
                    break
        self.report(cut, measured)
        return measured

    def sums(self, cut: Cut) -> np.ndarray:
        """Sums of losses by document over the whole text."""
        return np.sum([self._of_batch(i, cut) for i in range(len(self._batches))], axis=0)

    def _of_batch(self, i: int, cut: Cut) -> np.ndarray:
        key = f"{self._key} {i} {blocks_text(cut)}"
        found = self._known.get(key)
        if found is None:
            start = self._starts[i]
            values = self._batches[i].losses(cut)[: len(self.text.rows) - start]
            found = self._by_document(values, start)[0]
            self._known.add(key, found)
        return found


def _note(done: Evaluations, cut: Cut, measured: Measured) -> str:
    """Progress in words."""
    best = done.best()
    lowest = f"{cut_name(best[0])} {done.excess[best[0]]:.4f}; " if best else ""
    return f"lowest {lowest}{cut_name(cut)} {measured.excess:.4f}" + (" in part" if measured.share < 1 else "")


def cut_name(cut: Cut) -> str:
    """Returns a cut's blocks, "base" if it has none."""
    return blocks_text(cut) or "base"


def _sums(
    scorer: CutScorer, known: LossStore, text: SearchText, cuts: Sequence[Cut], say: Callable[[str], None]
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
    scorer: CutScorer, known: LossStore, text: SearchText, cuts: Sequence[Cut], say: Callable[[str], None]
) -> Confirmation:
    """Measures the base and cuts on a text, and how much the first is below the others, paired by document."""
    sums = _sums(scorer, known, text, [(), *cuts], say)
    counts, best = counts_of(text), cuts[0]
    return Confirmation(
        text,
        {cut: mean_and_error(own, counts)[0] for cut, own in sums.items()},
        {(best, cut): mean_and_error(sums[best] - sums[cut], counts) for cut in sums if cut != best},
    )

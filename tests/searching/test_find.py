"""A search finds the best of all cuts of a small model, within its budget, and again from what it kept."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.tokenizer import eos_id, load_tokenizer
from solar_jax.config import MeshConfig
from solar_jax.data.packing import pack
from solar_jax.data.sources import Document
from solar_jax.parallel.mesh import make_mesh
from solar_jax.searching.candidates import Cut, Repeat, blocks_text, dus_cut, layers_from_cache
from solar_jax.searching.find import FoundCut, SearchSettings, find_cut
from solar_jax.searching.plan import Evaluations, Measured, forwards, run_search
from solar_jax.searching.predict import seam_ratios
from solar_jax.searching.texts import SearchText, text_of_rows
from tests.searching.test_candidates import enumerated

LENGTH = 32


@pytest.fixture(scope="module")
def base(tiny) -> Checkpoint:
    return open_checkpoint(str(tiny))


def text_of(c: Checkpoint, name: str, seed: int) -> SearchText:
    words = np.random.default_rng(seed).choice(["depth", "up", "scaling", "grows", "a", "model"], (8, 7))
    documents = [Document(f"{name}{i}", " ".join(some)) for i, some in enumerate(words)]
    rows = pack(documents, load_tokenizer(c), eos_id(c), LENGTH)
    return text_of_rows(name, [(rows, i) for i in range(len(rows))])


def found_on(base: Checkpoint, store: pathlib.Path | None = None, **changes) -> FoundCut:
    settings = dataclasses.replace(SearchSettings(3, forwards=60), **changes)
    return find_cut(
        base, make_mesh(MeshConfig(), jax.devices()[:2]), text_of(base, "search", 0), settings,
        final=text_of(base, "final", 1), confirm=[text_of(base, "other", 2)], store=store, say=lambda line: None,
    )  # fmt: skip


def test_the_best_is_the_lowest_of_the_finalists_and_confirmed_beside_dus(base):
    found = found_on(base)
    full = [s for s in found.candidates if s.share == 1]
    assert full == sorted(full, key=lambda s: s.loss)
    finalists = [s for s in found.candidates if s.final_loss is not None]
    assert [s.cut for s in finalists] == [s.cut for s in full[:5]]
    assert found.best == min(finalists, key=lambda s: s.final_loss or 0)
    assert found.dus is not None
    assert found.dus.cut == dus_cut(3, 6) == (Repeat(1, 4),)
    assert found.dus.share == 1  # whatever its excess
    (confirmed,) = found.confirmed
    difference, error = confirmed.errors.get((found.best.cut, found.dus.cut), (0.0, 0.0))
    assert difference == pytest.approx(confirmed.losses[found.best.cut] - confirmed.losses[found.dus.cut], abs=1e-6)
    assert error >= 0
    assert len(found.source_layers) == 9
    assert found.slices.startswith("0:")


def test_a_search_that_goes_on_gives_the_same_and_computes_nothing_that_is_known(base, tmp_path, monkeypatch):
    out = tmp_path / "found.json"
    first = found_on(base, out)
    (kept,) = tmp_path.iterdir()
    lines = kept.read_text().splitlines(keepends=True)
    kept.write_text("".join(lines[: len(lines) // 2]) + lines[-1][:9])  # killed half-way, the last line cut short
    again = found_on(base, out)
    for field in dataclasses.fields(FoundCut):
        if field.name not in ("ratios", "confirmed"):
            assert getattr(again, field.name) == getattr(first, field.name), field.name
    assert [c.losses for c in again.confirmed] == [c.losses for c in first.confirmed]
    assert len(kept.read_text().splitlines()) == len(lines)

    def refused(*_):
        raise AssertionError("a known loss was computed again")

    monkeypatch.setattr("solar_jax.searching.cache.TracedBatch.losses", refused)
    assert found_on(base, out).best == first.best


# ---- The order of evaluations, on a made-up excess -------------------------------------------------------------------
N, ADD = 10, 4
LOGS = np.arange(N + 1) ** 1.2 / 4


def made_excess(cut: Cut) -> float:
    """Lowest for 3:5,6:8, which no single block is: a price for each seam, third visit and layer added elsewhere."""
    seams = sum((LOGS[x.b] - LOGS[x.a]) * (x.visits - 1) ** 1.5 for x in cut) ** 0.7
    added = np.array([sum(x.visits - 1 for x in cut if x.a <= layer < x.b) for layer in range(N)])
    third = np.maximum(added - 1, 0).sum()
    return float(0.1 * seams + 0.05 * len(cut) + 0.1 * third + 0.2 * added @ np.array([9, 3, 1, 0, 0, 1, 0, 0, 1, 3]))


def made_search(budget: float) -> Evaluations:
    done = Evaluations(N, ADD, lambda cut, best: Measured(made_excess(cut)), budget, head=2)
    run_search(done, seam_ratios(np.exp(LOGS)[:, None]))
    return done


def test_the_search_finds_the_best_of_all_cuts_without_trying_most():
    done = made_search(1e9)
    everything = enumerated(ADD, N)
    assert done.best()[0] == min(everything, key=made_excess) == (Repeat(3, 5), Repeat(6, 8))
    assert len(done.best()) < len(everything) / 3, (len(done.best()), len(everything))


def test_the_budget_is_kept_and_dus_is_always_measured():
    for budget in (1.0, 60.0, 200.0):
        done = made_search(budget)
        assert next(iter(done.found)) == dus_cut(ADD, N)
        assert done.spent <= max(budget, done.cost((Repeat(3, 7),)))
        assert done.spent == sum(map(done.cost, done.found))
    assert forwards(done) == done.spent / 12
    assert done.cost((Repeat(3, 7),)) == len(layers_from_cache((Repeat(3, 7),), N)[1]) + 2 == N - 3 + 2


def test_a_cut_that_was_measured_in_part_is_never_the_best():
    first = made_search(1e9).best()[0]

    def measure(cut: Cut, best: Cut | None) -> Measured:
        return Measured(made_excess(cut), 0.25 if cut == first else 1.0)

    done = Evaluations(N, ADD, measure, 1e9, head=2)
    run_search(done, seam_ratios(np.exp(LOGS)[:, None]))
    assert done.excess[first] < done.excess[done.best()[0]], blocks_text(first)
    assert first not in done.best()

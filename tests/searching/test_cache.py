"""Losses from the cache are the whole deeper model's, on one device and on a mesh, whatever the architecture."""

import dataclasses

import jax
import numpy as np
import pytest

from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.checkpoints.load import load_params
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.tokenizer import eos_id, load_tokenizer
from solar_jax.checkpoints.views import grown
from solar_jax.config import GrowthConfig, MeshConfig, TrainConfig
from solar_jax.data.packing import Row, pack
from solar_jax.data.pipeline import heldout_batches
from solar_jax.data.sources import Document
from solar_jax.growth.operators import make_layer_map
from solar_jax.parallel import rules
from solar_jax.parallel.mesh import make_mesh
from solar_jax.searching.cache import CutScorer, layer_programs, make_scorer, mesh_for_search
from solar_jax.searching.candidates import Cut, Repeat, slices_text, source_layers
from solar_jax.training.step import make_eval_step, mean_loss

LENGTH = 32
CUTS = [(), (Repeat(1, 5),), (Repeat(0, 1, 3), Repeat(1, 3), Repeat(4, 6)), (Repeat(3, 6),)]
# More steps of a residual stream in float32 than the 1e-5 that is promised of a trained model's loss.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def base(tiny) -> Checkpoint:
    return open_checkpoint(str(tiny))


@pytest.fixture(scope="module")
def rows(base) -> list[Row]:
    """Rows of several short documents, which must not see each other."""
    texts = ["depth up scaling " * k for k in (1, 2, 1, 3, 1, 1, 2, 1)]
    found = pack([Document(str(i), t) for i, t in enumerate(texts)], load_tokenizer(base), eos_id(base), LENGTH)
    rows = [found[i] for i in range(len(found))]
    assert any(len(set(row["segment_ids"])) > 2 for row in rows)
    return rows


def scorer_on(c: Checkpoint, devices: int, rows: int = 4, **mesh: int) -> CutScorer:
    on = make_mesh(MeshConfig(**mesh), jax.devices()[:devices])
    return make_scorer(c, on, dtype="float32", rows=rows, length=LENGTH, add=6)


def whole_loss(c: Checkpoint, cut: Cut, rows: list[Row]) -> float:
    """The loss of the deeper model by the evaluation step of a run."""
    n = c.cfg.num_hidden_layers
    map_ = make_layer_map(n, GrowthConfig("slices", slices=slices_text(source_layers(cut, n))))
    deeper, mesh = grown(c, map_), make_mesh(MeshConfig(), jax.devices()[:1])
    step = make_eval_step(deeper.cfg, TrainConfig(precision="float32", remat="none"), LENGTH, mesh)
    return mean_loss(step, load_params(deeper), heldout_batches(rows, len(rows), rules.batch_sharding(mesh)))


def cached_loss(scorer: CutScorer, cut: Cut, rows: list[Row]) -> float:
    weights = np.stack([row["weights"] for row in rows])
    values = np.concatenate([batch.losses(cut) for batch in scorer.traced(rows)])[: len(rows)]
    return float((values * weights).sum() / weights.sum())


@pytest.mark.parametrize(
    ("devices", "mesh"),
    [(1, {}), (4, {}), (4, {"fsdp": 1, "tensor": 2, "data": 2}), (8, {"slice": 2, "context": 2, "fsdp": 2})],
    ids=["one device", "fsdp", "tensor and data", "slices and split rows"],
)
def test_cached_losses_are_those_of_the_whole_deeper_model(base, rows, devices, mesh):
    scorer = scorer_on(base, devices, **mesh)
    for cut in CUTS:
        assert cached_loss(scorer, cut, rows) == pytest.approx(whole_loss(base, cut, rows), abs=CLOSE), cut


def test_layers_keep_what_they_are_when_they_are_repeated(base, rows):
    """Layers without rotation, and a window; a negative control where the window is forgotten."""
    cfg = dataclasses.replace(base.cfg, no_rope_layers=(1, 4), sliding_window=5)
    c = dataclasses.replace(base, cfg=cfg)
    scorer = scorer_on(c, 1)
    for cut in CUTS[1:3]:
        assert cached_loss(scorer, cut, rows) == pytest.approx(whole_loss(c, cut, rows), abs=CLOSE), cut
        assert abs(cached_loss(scorer_on(base, 1), cut, rows) - whole_loss(c, cut, rows)) > 1e-3


def test_a_row_without_its_segments_has_another_loss(base, rows):
    """A negative control: documents of a row would be seen."""
    scorer = scorer_on(base, 1)
    seen = [row | {"segment_ids": np.zeros_like(row["segment_ids"])} for row in rows]
    assert abs(cached_loss(scorer, CUTS[1], rows) - cached_loss(scorer, CUTS[1], seen)) > 1e-3


def test_two_programs_are_compiled_for_any_number_of_cuts(base, rows):
    scorer = scorer_on(base, 1)
    for cut in CUTS:
        cached_loss(scorer, cut, rows)
    scorer.losses(rows, CUTS)
    programs = layer_programs(scorer.cfg, scorer.train, scorer.rows, LENGTH, scorer.mesh)
    assert programs.trace._cache_size() == programs.score._cache_size() == 1  # pyrefly: ignore[missing-attribute]


def test_losses_without_a_cache_are_the_same_and_padding_is_left_out(base, rows):
    scorer = scorer_on(base, 1, rows=4)
    assert len(rows) % 4
    found = scorer.losses(rows, CUTS)
    assert found.shape == (len(CUTS), len(rows), LENGTH)
    assert np.array_equal(found[1], np.concatenate([b.losses(CUTS[1]) for b in scorer.traced(rows)])[: len(rows)])


def test_a_runs_mesh_is_joined_where_rows_would_be_split():
    mesh = make_mesh(MeshConfig(slice=2, context=2, fsdp=2))
    joined = mesh_for_search(mesh)
    assert dict(joined.shape) == {"slice": 1, "data": 2, "fsdp": 4, "expert": 1, "context": 1, "tensor": 1}
    assert list(joined.devices.flat) == list(mesh.devices.flat)

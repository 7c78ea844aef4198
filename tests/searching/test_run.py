"""A run that searches its own cut: it grows by what was found, says so in its lineage, and searches once."""

import json

import pytest

from solar_jax import train
from solar_jax.errors import UserError
from solar_jax.growth.operators import make_layer_map
from solar_jax.searching import run
from tests.test_train import make_config


def test_a_run_grows_by_the_cut_that_its_search_finds_and_searches_once(tiny, text, tmp_path, monkeypatch):
    config = make_config(
        tiny, text, growth_operator="search", growth_add=2, train_steps=2, evaluation_every=0, checkpoint_every=1
    )
    with monkeypatch.context() as patch:
        patch.setattr("solar_jax.train.RECIPES", {"text": ()})  # stops before training, as a kill would
        with pytest.raises((ValueError, KeyError, UserError)):
            train.run(config, tmp_path / "run")
    found = json.loads((tmp_path / "run.search.json").read_text())
    monkeypatch.setattr(run, "find_cut", lambda *_, **__: pytest.fail("searched again"))
    summary = train.run(config, tmp_path / "run")
    assert summary["source_layers"] == found["best"]["source_layers"]
    assert summary["layers"] == 8
    lineage = json.loads((tmp_path / "run/model/lineage.json").read_text())
    assert lineage["search"]["best"] == found["best"]
    assert lineage["search"]["text"]["sha256"] == found["text"]["sha256"]
    assert json.loads((tmp_path / "run/config.json").read_text())["growth"]["slices"] == found["best"]["slices"]
    assert found["best"]["loss"] <= found["dus"]["loss"]


def test_a_search_in_a_run_without_a_number_of_layers_is_refused(tiny, text, tmp_path):
    with pytest.raises(UserError, match=r"needs config\.growth\.add of at least 1 and at_step=0, found add=0"):
        train.run(make_config(tiny, text, growth_operator="search"), tmp_path / "run")
    with pytest.raises(UserError, match=r"operator=search is for train alone"):
        make_layer_map(6, make_config(tiny, text, growth_operator="search", growth_add=2).growth)

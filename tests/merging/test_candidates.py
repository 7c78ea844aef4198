"""Candidates are the merges that their names say, and mistakes in them are named."""

import pytest

from solar_jax.errors import UserError
from solar_jax.merging.candidates import best_of, make_candidates


def test_the_papers_candidates_are_three_means_and_slerp():
    found = make_candidates("paper", ["A", "B"], None, None)
    assert [one.name for one in found] == [
        "linear (0.5, 0.5)", "linear (0.4, 0.6)", "linear (0.6, 0.4)", "slerp (0.5, 0.5)",
    ]  # fmt: skip
    weights = [source.parameters["weight"] for source in found[1].recipe.sections[0].sources]
    assert weights == [0.4, 0.6]
    assert found[3].recipe.parameters[-1]["t"] == 0.5
    assert [source.model for source in found[3].recipe.sections[0].sources] == ["A", "B"]


def test_a_grid_is_what_its_entries_say():
    found = make_candidates("slerp:0.25,linear:1,slerp:0.25", ["A", "B"], None, "float32")
    assert [one.name for one in found] == ["slerp (0.75, 0.25)", "linear (0, 1)"]
    assert {one.recipe.dtype for one in found} == {"float32"}


@pytest.mark.parametrize("text", ["papers", "linear", "linear:2", "linear:x", "magic:0.5", ""])
def test_an_entry_that_is_none_is_named(text):
    with pytest.raises(UserError, match="--candidates must be paper, or METHOD:WEIGHT"):
        make_candidates(text, ["A", "B"], None, None)


def test_three_models_are_refused():
    with pytest.raises(UserError, match="merges two models, found 3"):
        make_candidates("paper", ["A", "B", "C"], None, None)


def test_the_lowest_loss_wins_and_of_equal_ones_the_first():
    assert best_of({"a": 2.0, "b": 1.0, "c": 1.0}) == "b"

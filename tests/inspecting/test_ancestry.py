"""Layer maps from lineages, and the weights that growth gave, where they can be found."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from solar_jax.checkpoints.convert import Target, convert_checkpoint
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.views import grown
from solar_jax.config import GrowthConfig
from solar_jax.errors import UserError
from solar_jax.growth.operators import make_layer_map
from solar_jax.inspecting.ancestry import ancestry, find_start

NAME = "model.layers.{}.mlp.up_proj.weight"


def write(source, out: pathlib.Path, growth: GrowthConfig | None = None, made_by: str = "upscale", **target):
    """A model written from another by the package, as `upscale --source SOURCE` would."""
    c = open_checkpoint(str(source))
    if growth is not None:
        c = grown(c, make_layer_map(c.cfg.num_hidden_layers, growth))
    convert_checkpoint(c, Target(out, **target), made_by)
    place = (out if (out / "lineage.json").exists() else out / "model") / "lineage.json"
    record = json.loads(place.read_text())
    place.write_text(json.dumps(record | {"command": ["upscale", f"--source={source}", "--out=x"]}))
    return open_checkpoint(str(out))


@pytest.fixture(scope="module")
def family(tiny, tmp_path_factory):
    """A base, grown to eight layers, that converted to a run's format and dtype, and it grown again."""
    folder = tmp_path_factory.mktemp("family")
    once = write(tiny, folder / "once", GrowthConfig("dus", m=2))
    run = write(folder / "once", folder / "run", None, "train", form="orbax", dtype="bfloat16")
    twice = write(folder / "once", folder / "twice", GrowthConfig("slices", slices="0:8,7:8"))
    return folder, once, run, twice


def test_the_layer_map_is_that_of_the_growth_through_whatever_followed_it(family):
    _, once, run, _ = family
    for c in (once, run):
        its = ancestry(c)
        assert its.layer_map.source == (0, 1, 2, 3, 2, 3, 4, 5)
        assert (its.layer_map.base_layers, its.layer_map.operator, its.notes) == (6, "dus(m=2)", ())
        assert [i for i, new in enumerate(its.layer_map.new) if new] == [4, 5]


def test_two_growths_are_composed_to_the_first_base(family):
    *_, twice = family
    its = ancestry(twice)
    assert its.layer_map.source == (0, 1, 2, 3, 2, 3, 4, 5, 5)
    assert its.last.source == (0, 1, 2, 3, 4, 5, 6, 7, 7)
    assert its.layer_map.operator == "dus(m=2), then slices(0:8,7:8)"


@pytest.mark.parametrize(
    "growth",
    [
        GrowthConfig("linear_lesa", every=2),
        GrowthConfig("zeroed", m=2, inner="normal"),
        GrowthConfig("zeroed", m=2, inner="mean"),
        GrowthConfig("gated", m=2, beta=0.25),
    ],
    ids=str,
)
def test_the_start_of_a_grown_model_is_what_growth_made_of_its_base(tiny, tmp_path, growth):
    c = write(tiny, tmp_path / "out", growth)
    start = find_start(c, ancestry(c), None)
    assert start.checkpoint is not None, start.said
    for layer in (3, 4):
        np.testing.assert_array_equal(start.checkpoint.read(NAME.format(layer)), c.read(NAME.format(layer)))


def test_a_scale_and_a_mean_come_through(tiny, tmp_path):
    c = write(tiny, tmp_path / "pro", GrowthConfig("llama_pro", every=3))
    assert ancestry(c).layer_map == make_layer_map(6, GrowthConfig("llama_pro", every=3))
    c = write(tiny, tmp_path / "mean", GrowthConfig("average", every=2))
    assert ancestry(c).layer_map == make_layer_map(6, GrowthConfig("average", every=2))
    again = ancestry(write(tmp_path / "mean", tmp_path / "deeper", GrowthConfig("dus", m=2)))
    assert "layer map is that of the last growth alone" in " ".join(again.notes)
    assert again.layer_map == again.last


def test_a_model_without_growth_is_said_to_be_one(tiny, tmp_path):
    bare = ancestry(open_checkpoint(str(tiny)))
    assert bare.layer_map.is_identity
    assert bare.notes == ("It has no lineage.json, so it is taken as a model without growth.",)
    converted = ancestry(write(tiny, tmp_path / "same", made_by="convert"))
    assert converted.layer_map.is_identity
    assert converted.notes == ("No growth is in its lineage.",)


def test_a_lineage_that_contradicts_the_model_is_refused(family, tmp_path):
    folder, *_ = family
    for change, said in (
        ({"source_layers": [0, 1, 2]}, "lineage.json is of 3 layers, but the model has 8."),
        ({"source_layers": "all"}, "lineage.json's source_layers must be a list of layers, found all."),
        ({"source_layers": [0, 1, 2, 3, 2, 3, 4, -5]}, "must be a list of layers"),
        ({"parents": [{"source_layers": [0, 1]}]}, "lineage.json copies layer 5 of 2."),
    ):
        shutil.copytree(folder / "once", tmp_path / "bad")
        record = json.loads((tmp_path / "bad" / "lineage.json").read_text())
        (tmp_path / "bad" / "lineage.json").write_text(json.dumps(record | change))
        with pytest.raises(UserError, match=r"bad: lineage") as e:
            ancestry(open_checkpoint(str(tmp_path / "bad")))
        assert said in str(e.value)
        shutil.rmtree(tmp_path / "bad")


def test_the_start_is_found_by_the_lineages_commands_and_grown_and_rounded_as_the_model_was(family, tiny):
    base = open_checkpoint(str(tiny))
    _, once, run, twice = family
    for c in (once, run):
        start = find_start(c, ancestry(c), None)
        assert start.said == "Distances are from `llama`, grown by dus(m=2)."
        found = start.checkpoint
        assert found is not None
        assert found.cfg == c.cfg
        for i, j in enumerate((0, 1, 2, 3, 2, 3, 4, 5)):
            x = base.read(NAME.format(j)).astype(c.dtype_of[NAME.format(i)])
            np.testing.assert_array_equal(found.read(NAME.format(i)), x)
            np.testing.assert_array_equal(c.read(NAME.format(i)), x)
    # Of a model that grew twice it is what the last growth grew.
    start = find_start(twice, ancestry(twice), None)
    assert start.said == "Distances are from `once`, grown by slices(0:8,7:8)."


def test_a_start_with_other_bytes_is_not_taken_and_its_absence_is_said(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "base")
    c = write(tmp_path / "base", tmp_path / "grown", GrowthConfig("dus", m=2))
    assert find_start(c, ancestry(c), None).checkpoint is not None
    file = tmp_path / "base" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    start = find_start(c, ancestry(c), None)
    assert start.checkpoint is None
    assert start.said == (
        "Distances from a start are left out: base, which the lineage names, was not found here; --source SRC names it."
    )
    # Named by hand it is taken, with a word about it.
    start = find_start(c, ancestry(c), str(tmp_path / "base"))
    assert start.checkpoint is not None
    assert start.said == "Distances are from `base`; its files are not those that the lineage names."


def test_a_start_by_hand_is_the_base_or_the_grown_model_and_nothing_else(family, tiny, tmp_path):
    folder, once, run, _ = family
    its = ancestry(run)
    for source in (tiny, folder / "once"):
        found = find_start(run, its, str(source)).checkpoint
        assert found is not None
        assert found.cfg.num_hidden_layers == 8
        np.testing.assert_array_equal(found.read(NAME.format(4)), run.read(NAME.format(4)))
    write(tiny, tmp_path / "short", GrowthConfig("slices", slices="0:3"))
    with pytest.raises(UserError, match=r"short: expected the base that dus\(m=2\) grows to 8 layers of 64, or the"):
        find_start(once, ancestry(once), str(tmp_path / "short"))
    bare = open_checkpoint(str(tiny))
    assert find_start(bare, ancestry(bare), None).said == (
        "Distances from a start are left out: no lineage names one; --source SRC does."
    )

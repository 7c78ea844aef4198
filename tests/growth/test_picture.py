"""The picture of a layer map says what a person has to check before a long run."""

import re

import pytest

from solar_jax.config import GrowthConfig
from solar_jax.growth.operators import identity, make_layer_map
from solar_jax.growth.picture import layer_list, picture


def test_the_papers_growth_is_drawn_with_counts_map_and_seam():
    lines = picture(make_layer_map(32, GrowthConfig("dus")), 7_241_732_096, 10_731_524_096).splitlines()
    assert lines[0] == "dus(m=8): 32 -> 48 layers, 7,241,732,096 -> 10,731,524,096 parameters (1.48x)"
    first, second = (line.split() for line in lines[2:4])
    assert first == ["0..23", "<-", "0..23", "█" * 24 + "·" * 8]
    assert second == ["24..47", "<-", "8..31", "·" * 8 + "█" * 24]
    assert lines[4].strip() == "seam 23|24: source 23 -> 8, layer distance 15"
    assert lines[5].strip() == "16 new layers"
    assert len(lines) == 6


def test_the_bars_stand_under_the_ruler_of_source_layers():
    lines = picture(make_layer_map(32, GrowthConfig("dus")), 1, 1).splitlines()
    first, last = lines[1].index(" 0 ") + 1, len(lines[1]) - 1
    assert lines[1].endswith(" 31")
    assert lines[2].index("█") == first
    assert lines[3].rindex("█") == last


def test_zeroed_layers_are_marked_and_counted():
    lines = picture(make_layer_map(6, GrowthConfig("zeroed", m=2)), 100, 150).splitlines()
    bars = [line.split()[3] for line in lines[2:5]]
    assert bars == ["████··", "··oo··", "··oo██"]
    assert lines[-1].strip() == "4 new layers, 4 with o_proj and down_proj zeroed"


def test_every_seam_of_a_short_plan_is_listed():
    text = picture(make_layer_map(4, GrowthConfig("interleave")), 1, 2)
    assert re.findall(r"seam (\d+)\|(\d+): source (\d+) -> (\d+), layer distance (\d+)", text) == [
        ("0", "1", "0", "0", "0"),
        ("2", "3", "1", "1", "0"),
        ("4", "5", "2", "2", "0"),
        ("6", "7", "3", "3", "0"),
    ]


@pytest.mark.parametrize("operator", ["interleave", "average", "llama_pro"])
def test_a_plan_with_many_seams_shows_every_layer_in_order(operator):
    layer_map = make_layer_map(32, GrowthConfig(operator, every=2))
    text = picture(layer_map, 1, 2)
    cells = [cell for row in re.findall(r"^ +\d+ \| (.*)$", text, re.MULTILINE) for cell in row.split()]
    mark = {"interleave": "*", "average": "*", "llama_pro": "o"}[operator]
    expected = [
        (f"{s}/{p}" if s != p else f"{s}") + (mark if new else "")
        for s, p, new in zip(layer_map.source, layer_map.partner, layer_map.new, strict=True)
    ]
    assert cells == expected
    assert f"{len(layer_map.seams)} seams, layer distance 0 to 1, " in text


def test_means_are_counted():
    assert "2 new layers, 2 means of two neighbours" in picture(
        make_layer_map(6, GrowthConfig("average", every=2)), 1, 2
    )


def test_a_model_that_is_not_grown_has_no_seam():
    text = picture(identity(30), 5, 5)
    assert "identity: 30 -> 30 layers, 5 -> 5 parameters (1.00x)" in text
    assert "no seam: every layer follows its own predecessor" in text
    assert "0 new layers" in text


@pytest.mark.parametrize(
    ("layers", "expected"),
    [([], ""), ([3], "3"), ([0, 1], "0-1"), ([0, 1, 2, 5, 7, 8], "0-2, 5, 7-8"), (list(range(48)), "0-47")],
)
def test_layer_list_joins_neighbours_and_drops_none(layers, expected):
    assert layer_list(layers) == expected

"""Pictures of made-up numbers: which panels and maps are drawn, and for which models."""

import pytest

from solar_jax.growth.operators import LayerMap
from solar_jax.inspecting.picture import PICTURES, distinct_maps, draw_subject


def made(name: str, source: tuple[int, ...], scale: tuple[float, ...] = (), pairs=(), moved=False) -> dict:
    """A model of seam.json with the keys that pictures read."""
    n, its = len(source), LayerMap(f"map of {name}", max(source) + 1, source, scale)
    values, more = [0.1 * i + 0.1 for i in range(n)], [0.1 * i + 0.1 for i in range(n + 1)]
    kinds = ("all", "attention", "mlp", "norms")
    changes = {"difference": 0.5, "error": None}
    return {
        "name": name,
        "layers": n,
        "layer_map": {
            "operator": its.operator, "base_layers": its.base_layers, "source": list(source), "partner": None,
            "scale": list(scale) or None, "new": [i for i, new in enumerate(its.new) if new], "seams": list(its.seams),
        },
        "stream": {"norm_median": more, "cosine": values, "attention": values, "mlp": values},
        "lens": {"kl": more, "loss": more, "agreement": more},
        "gradients": dict.fromkeys((*kinds, "stream"), values),
        "moved": {"relative": {kind: [None, *values[1:]] for kind in kinds}} if moved else {"left_out": "..."},
        "twins": {"pairs": list(pairs), **{v: {k: [0.1] * len(pairs) for k in kinds} for v in ("relative", "cosine")}},
        "without": [{"layer": i, **changes} for i in range(n)] if moved else [],
        "exchanged_twins": [{"layers": list(pair), **changes} for pair in pairs],
    }  # fmt: skip


GROWN = made("grown", (0, 1, 2, 1, 2, 3), (1, 1, 1, 0, 1, 1), pairs=[(1, 3), (2, 4)], moved=True)
BASE = made("$base_", (0, 1, 2, 3))
MANY = made("interleaved", tuple(i // 2 for i in range(40)))


def axes_of(monkeypatch, name: str, models: list[dict]):
    """The figure's axes, instead of its PNG."""
    kept = []
    monkeypatch.setattr("solar_jax.inspecting.picture.png_bytes", lambda figure: kept.append(figure) or b"")
    return kept[0].axes if draw_subject(name, models) is not None else None


@pytest.mark.parametrize("name", PICTURES)
def test_every_panel_with_something_to_show_stands_above_the_maps_and_marks_the_seam(name, monkeypatch):
    axes = axes_of(monkeypatch, name, [GROWN, BASE])
    assert axes is not None
    assert len(axes) == len(PICTURES[name][1]) + 2  # both models have a map of their own
    for ax in axes[:-1]:  # all but the base's map; the lines at x = 2.5
        assert any(list(line.get_xdata()) == [2.5, 2.5] for line in ax.lines)
    heights = [bar.get_height() for bar in axes[-2].patches]
    assert heights == [1, 2, 3, 2, 3, 4]
    faces = [bar.get_facecolor() for bar in axes[-2].patches]
    assert faces[3][3] == 0  # zeroed: hollow
    assert faces[4] != faces[1] == faces[5]  # new ones in colour


def test_a_picture_without_anything_to_show_is_not_drawn(monkeypatch):
    assert axes_of(monkeypatch, "ablations", [BASE]) is None
    assert axes_of(monkeypatch, "weights", [BASE]) is None
    axes = axes_of(monkeypatch, "lens", [BASE])
    assert axes is not None
    assert draw_subject("lens", [BASE]) == b""


def test_models_with_one_layer_map_share_it_and_many_seams_are_left_out(monkeypatch):
    assert distinct_maps([GROWN, BASE, GROWN | {"name": "healed"}]) == [GROWN, BASE]
    axes = axes_of(monkeypatch, "lens", [MANY])
    assert axes is not None
    assert [len(ax.lines) for ax in axes] == [1, 1, 1, 0]  # the values alone


def test_a_real_picture_is_a_png():
    png = draw_subject("stream", [GROWN, BASE])
    assert png is not None
    assert png.startswith(b"\x89PNG")

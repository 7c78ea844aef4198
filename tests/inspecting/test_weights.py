"""Distances of weights, by numpy by hand, for opened checkpoints."""

import dataclasses

import numpy as np
import pytest
import safetensors.numpy

from solar_jax.checkpoints import checkpoint
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.views import grown
from solar_jax.config import GrowthConfig
from solar_jax.growth.operators import make_layer_map
from solar_jax.inspecting.weights import ALL, GROUPS, array_group, moved_from, twin_distances
from solar_jax.model.shapes import LAYER_AXES
from tests.conftest import hf_model, moved, save_hf

KIND = {"attention": "self_attn.", "mlp": "mlp.", "norms": "layernorm"}


def told(n: int, note: str) -> None:
    del n, note


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A model and one near it, with their tensors in float64."""
    folder = tmp_path_factory.mktemp("weights")
    save_hf(hf_model(), folder / "a")
    save_hf(moved(hf_model(), seed=1, by=0.01), folder / "b")
    found = []
    for name in "ab":
        tensors = safetensors.numpy.load_file(folder / name / "model.safetensors")
        found.append((open_checkpoint(str(folder / name)), {k: x.astype(np.float64) for k, x in tensors.items()}))
    return found


def vector(tensors, layer: int, part: str = "") -> np.ndarray:
    """The tensors of a layer whose names have `part` in them, end to end."""
    start = f"model.layers.{layer}."
    return np.concatenate([tensors[k].ravel() for k in sorted(tensors) if k.startswith(start) and part in k])


def test_distances_from_the_start_are_those_of_the_layers_as_vectors(pair, monkeypatch):
    (a, a_tensors), (b, b_tensors) = pair
    monkeypatch.setattr(checkpoint, "BLOCK", 1000)  # several blocks of rows a tensor
    found = moved_from(b, a, told)
    for i in range(6):
        for group, part in {**KIND, ALL: "", "q_proj": "q_proj", "mlp_norm": "post_attention"}.items():
            x, y = vector(b_tensors, i, part), vector(a_tensors, i, part)
            distance = np.linalg.norm(x - y)
            assert found["distance"][group][i] == pytest.approx(distance, rel=1e-9)
            assert found["relative"][group][i] == pytest.approx(distance / np.linalg.norm(y), rel=1e-9)
            assert found["relative"][group][i] > 1e-3
    assert set(moved_from(a, a, told)["distance"][ALL]) == {0.0}


def test_distances_of_twins_are_relative_to_both(pair):
    (_, tensors), (_, _) = pair
    found = twin_distances(pair[0][0], [(1, 4), (2, 2)], told)
    for group, part in {**KIND, ALL: "", "down_proj": "down_proj"}.items():
        x, y = vector(tensors, 1, part), vector(tensors, 4, part)
        mean = np.sqrt((x @ x + y @ y) / 2)
        assert found["relative"][group][0] == pytest.approx(np.linalg.norm(x - y) / mean, rel=1e-9)
        assert found["cosine"][group][0] == pytest.approx(x @ y / np.sqrt((x @ x) * (y @ y)), rel=1e-9)
        assert (found["relative"][group][1], found["cosine"][group][1]) == (0.0, pytest.approx(1.0))
    assert twin_distances(pair[0][0], [], told) == {"relative": {}, "cosine": {}}


def test_where_a_start_is_zero_a_distance_is_absolute_alone(pair):
    (a, tensors), _ = pair
    deeper = grown(a, make_layer_map(6, GrowthConfig("llama_pro", every=3)))  # 0 1 2 2' 3 4 5 5'
    twins = twin_distances(deeper, [(2, 3)], told)
    assert twins["relative"]["o_proj"] == [pytest.approx(np.sqrt(2))]  # |a| over sqrt(|a| ** 2 / 2)
    assert twins["cosine"]["o_proj"] == [None]
    assert twins["relative"]["q_proj"] == [0.0]
    # A layer that grew out of zero: its distance is its norm, and relative to nothing.
    filled = dataclasses.replace(
        deeper, read=lambda name, rows=slice(None): deeper.read(name.replace("layers.3.", "layers.2."), rows),
        origins={}, where="filled",
    )  # fmt: skip
    back = moved_from(filled, deeper, told)
    assert back["relative"]["o_proj"][3] is None
    expected = np.linalg.norm(vector(tensors, 2, "o_proj"))
    assert back["distance"]["o_proj"][3] == pytest.approx(expected, rel=1e-6)


def test_every_array_of_a_layer_belongs_to_a_group():
    assert {array_group(name) for name in LAYER_AXES} == set(GROUPS)
    assert {name: array_group(name) for name in ("q_norm", "k_bias", "o_proj", "up_bias", "mlp_out_norm")} == {
        "q_norm": "norms", "k_bias": "attention", "o_proj": "attention", "up_bias": "mlp", "mlp_out_norm": "norms",
    }  # fmt: skip

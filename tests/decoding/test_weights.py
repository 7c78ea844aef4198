"""Int8 weights are the nearest ones of 255 steps, and an engine multiplies by just these, also split over devices."""

import jax
import numpy as np
import pytest

from solar_jax.checkpoints.load import load_params
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.tokenizer import load_tokenizer
from solar_jax.decoding.engine import Engine, Request
from solar_jax.decoding.model import load_model
from solar_jax.decoding.weights import quantised
from solar_jax.model.lora import INPUTS
from solar_jax.model.shapes import Params
from tests.conftest import hf_model, save_hf


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_hf(hf_model(), tmp_path_factory.mktemp("int8") / "model")


def dense(params: Params) -> Params:
    """The values that int8 weights stand for, as plain arrays."""
    layers = dict(params["layers"])
    for name, inputs in INPUTS.items():
        w = layers[f"{name}_proj"]
        scale = np.asarray(w.scale).reshape(w.scale.shape[0], *(1,) * inputs, *w.scale.shape[1:])
        layers[f"{name}_proj"] = np.asarray(w.values, np.float32) * scale
    return params | {"layers": layers}


def test_weights_are_rounded_to_the_nearest_step_of_their_output(folder):
    c = open_checkpoint(str(folder))
    plain, found = load_params(c), dense(quantised(load_params(c)))
    for name, inputs in INPUTS.items():
        w, near = np.asarray(plain["layers"][f"{name}_proj"]), found["layers"][f"{name}_proj"]
        step = np.abs(w).max(axis=tuple(range(1, 1 + inputs)), keepdims=True) / 127
        assert (np.abs(w - near) <= 0.5001 * step).all()
        assert not np.array_equal(w, near)
    np.testing.assert_array_equal(plain["embed"], found["embed"])


@pytest.mark.parametrize("devices", [1, 8])
def test_an_engine_of_int8_weights_gives_the_tokens_of_what_they_stand_for(folder, devices):
    c = open_checkpoint(str(folder))
    requests = [Request(tuple(range(3, 3 + n)), 20) for n in (1, 9, 30)]

    def tokens(engine: Engine) -> list[tuple[int, ...]]:
        return [answer.tokens for _, answer in sorted(engine.answers(requests))]

    def engine(params: Params) -> Engine:
        return Engine(c.cfg, params, load_tokenizer(c), ends=(), rows=3)

    narrow = quantised(load_params(c))
    assert narrow["layers"]["q_proj"].values.dtype == np.int8
    if devices == 1:
        found = tokens(engine(narrow))
    else:
        model = load_model(c, "float32", quantize="int8")
        assert len(model.params["layers"]["q_proj"].values.sharding.device_set) == jax.device_count() == 8
        made = model.engine(rows=3)
        made.ends = frozenset()
        found = tokens(made)
    assert found == tokens(engine(dense(narrow)))

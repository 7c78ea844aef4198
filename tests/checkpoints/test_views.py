"""Grown views that compute: noise by its statistics, scales and fits against transformers' logits of the result."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from solar_jax import upscale
from solar_jax.checkpoints.convert import Target
from solar_jax.checkpoints.load import load_params
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.views import grown
from solar_jax.config import GrowthConfig
from solar_jax.growth.apply import grow
from solar_jax.growth.operators import OPERATOR_KEYS, make_layer_map
from solar_jax.model import llama
from solar_jax.parallel import rules
from tests.growth.test_apply import GROWTHS, assert_same_bits
from tests.parallel.test_mesh import mesh_of

TOKENS = np.arange(40).reshape(2, 20)


def written(source, out, growth: GrowthConfig):
    upscale.upscale(str(source), growth, Target(out))
    return out


def transformers_logits(folder) -> np.ndarray:
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(folder)(torch.tensor(TOKENS)).logits.numpy()


def test_noise_has_the_sources_deviation_and_leaves_norms_and_outputs_alone(tmp_path, tiny):
    out = written(tiny, tmp_path / "out", GrowthConfig("zeroed", m=2, inner="normal"))
    base, found = (safetensors.torch.load_file(x / "model.safetensors") for x in (tiny, out))
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj"):
        noise, source = found[f"model.layers.4.{name}.weight"], base[f"model.layers.2.{name}.weight"]
        assert abs(float(noise.std() / source.std()) - 1) < 0.1
        assert abs(float(torch.corrcoef(torch.stack((noise.flatten(), source.flatten())))[0, 1])) < 0.1
        assert not torch.equal(noise, found[f"model.layers.6.{name}.weight"])  # the block's second copy
    norm = "input_layernorm.weight"
    assert torch.equal(found[f"model.layers.4.{norm}"], base[f"model.layers.2.{norm}"])
    np.testing.assert_allclose(transformers_logits(out), transformers_logits(tiny), rtol=0, atol=1e-5)


SCALED = [
    GrowthConfig("gated", of="dus", m=2, beta=0.25),
    GrowthConfig("split", a=1, b=5, alpha=0.75),
    GrowthConfig("split_sqrt", a=1, b=5),
    GrowthConfig("linear_lesa", every=2),
]


@pytest.mark.parametrize("growth", SCALED, ids=lambda g: g.operator)
def test_transformers_computes_our_logits_of_scaled_and_fitted_layers(tmp_path, tiny, growth):
    c, layer_map = open_checkpoint(str(tiny)), make_layer_map(6, growth)
    out = written(tiny, tmp_path / "out", growth)
    mine = llama.logits(open_checkpoint(str(out)).cfg, grow(load_params(c), layer_map), jnp.array(TOKENS))
    np.testing.assert_allclose(mine, transformers_logits(out), atol=1e-4)


@pytest.mark.parametrize(
    "growth", [*GROWTHS, GrowthConfig("zeroed", m=2, inner="normal")], ids=lambda g: f"{g.operator}-{g.inner}"
)
def test_every_operator_loads_onto_a_mesh_with_the_bits_of_one_device(tiny, growth):
    c = open_checkpoint(str(tiny))
    deeper, mesh = grown(c, make_layer_map(6, growth)), mesh_of(2, 2, 2)
    found = load_params(deeper, rules.parameter_shardings(deeper.cfg, mesh))
    assert_same_bits(found, load_params(deeper))
    assert found["layers"]["q_proj"].sharding.num_devices == 8


def test_the_operators_flags_reach_the_config():
    from solar_jax.cli import command

    keys = {"m": 6, "of": "dus", "beta": 0.25, "alpha": 0.5, "blocks": "2:20", "inner": "mean"}
    assert command.growth_config("gated", None, keys) == GrowthConfig("gated", **keys)
    assert set(keys) <= set(OPERATOR_KEYS)

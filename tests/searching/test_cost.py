"""Predicted cost of a search, against a count by hand."""

import dataclasses

import pytest

from solar_jax.cli.config_files import load_config
from solar_jax.errors import UserError
from solar_jax.hardware.slices import find_slice
from solar_jax.model.shapes import parameter_count
from solar_jax.planning.memory import GIB
from solar_jax.planning.search import of_slice
from solar_jax.searching.cost import search_cost

MISTRAL = load_config("dus_48l").model.architecture
HOW = {"rows": 8, "length": 256, "forwards": 80, "width": 2}


def test_one_layer_takes_no_less_than_its_matmuls_and_its_weights():
    devices = of_slice(find_slice("v5p-128"))
    cost = search_cost(MISTRAL, devices, **HOW | {"rows": 4096})
    weights = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336  # a layer's, in matmuls
    ideal = 2 * weights * 4096 * 256 / (devices.count * devices.chip.peak)  # pyrefly: ignore[missing-attribute]
    assert ideal < cost.layer < 2 * ideal
    small = search_cost(MISTRAL, devices, **HOW)
    tensor = small.mesh.shape["tensor"]
    assert small.layer >= 2 * weights / tensor / devices.chip.bandwidth  # pyrefly: ignore[missing-attribute]
    # The budget: 80 forwards of 32 layers and an output projection each.
    head = cost.head / cost.layer
    assert cost.seconds / cost.layer == pytest.approx(80 * (32 + head) + 32, rel=0.05)


def test_a_model_that_does_not_fit_is_refused_and_shards_make_it_fit():
    devices = of_slice(find_slice("v5e-1"))
    with pytest.raises(UserError, match=r"needs at least 3\d\.\d GiB a device, but each of the 1 .* has 15\.8 GiB"):
        search_cost(MISTRAL, devices, **HOW | {"width": 4} | {"forwards": 1})
    cost = search_cost(MISTRAL, of_slice(find_slice("v5e-8")), **HOW)
    shards = cost.mesh.shape["fsdp"] * cost.mesh.shape["tensor"]
    assert cost.bytes / GIB > 2 * parameter_count(MISTRAL) / shards / GIB
    odd = dataclasses.replace(MISTRAL, hidden_size=4095, num_attention_heads=31, num_key_value_heads=31)
    odd = dataclasses.replace(odd, intermediate_size=14335)
    assert search_cost(odd, of_slice(find_slice("v5p-8")), **HOW).mesh.shape["data"] == 4  # nothing else divides it

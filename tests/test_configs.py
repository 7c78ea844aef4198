"""The recipes under configs/: each size resolves, and those for a slice fit it by the planner."""

import json
import pathlib

import pytest

from solar_jax import plan
from solar_jax.cli.config_files import load_config
from solar_jax.hardware.slices import find_slice
from solar_jax.training.growing import make_phases

ON_SLICES = {"mistral_7b": (32, 48), "tinyllama": (22, 34)}
SIZES = {"v5e_8": "v5e-8", "v5p_128": "v5p-128"}


@pytest.mark.parametrize("name", ON_SLICES)
@pytest.mark.parametrize("size", SIZES)
def test_a_recipe_for_a_slice_fits_it_with_the_hours_that_its_docstring_says(tmp_path, name, size):
    config = load_config(f"{name}:{size}")
    file = tmp_path / "plan.json"
    plan.plan(config, [find_slice(SIZES[size])], file=str(file))
    (row,) = json.loads(file.read_text())["slices"]
    assert row["fits"], row
    said = pathlib.Path(f"configs/{name}.py").read_text()
    assert f"needs     {row['hbm_gib']:.1f} GiB of a chip's" in said
    assert f"predicted {row['hours']:.1f} hours" in said


@pytest.mark.parametrize(("name", "layers"), [("scratch:full", [11, 17, 23]), ("scratch:stdlib", [4, 6, 8])])
def test_a_model_from_scratch_has_the_depths_that_its_file_says(name, layers):
    config = load_config(name)
    phases = make_phases(config.model.num_hidden_layers, config)
    assert [phase.total.layers for phase in phases] == layers

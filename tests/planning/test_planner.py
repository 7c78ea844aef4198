"""The planner's HBM against what the TPU compiler allots, for a few combinations of the benchmark's."""

import importlib.util
import pathlib

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "bench" / "planner.py"


def planner():
    module_spec = importlib.util.spec_from_file_location("planner", SCRIPT)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "slice_name", "remat"),
    [
        ("small", "v5p-8", "mid"),
        ("llama3.2-1b", "v5e-16", "mid"),
        ("solar", "v6e-256", "mid"),
        ("solar-new", "v5p-128", "mid"),
    ],
)
def test_the_planners_hbm_is_within_a_tenth_of_the_compilers(model, slice_name, remat):
    bench = planner()
    (index,) = (i for i, c in enumerate(bench.COMBINATIONS) if (c[0], c[1], c[4]) == (model, slice_name, remat))
    cfg, config, wanted = bench.run_of(bench.COMBINATIONS[index])
    assert bench.planned(cfg, config, wanted)[0] == pytest.approx(bench.allotted(index), rel=0.1)

"""The step of a check: planned, compiled and run."""

import dataclasses

import jax
import pytest

from solar_jax.checking import steps
from solar_jax.checking.steps import compile_for, parse_shape, planned_step, run_here, step_config
from solar_jax.errors import UserError
from solar_jax.hardware.slices import find_slice
from solar_jax.planning import search
from solar_jax.planning.search import of_slice

TINY = "L2,D32,F64,N4,K2,H8,V64"


def test_a_model_is_given_by_its_axis_letters():
    cfg = parse_shape("V64,L2,D32,F48,N4,K2,H8", 128)
    assert (cfg.num_hidden_layers, cfg.hidden_size, cfg.intermediate_size, cfg.vocab_size) == (2, 32, 48, 64)
    assert (cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim) == (4, 2, 8)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("L2,D32", "expected a size above 0 for each of V, D, F, L, N, K, H"),
        (f"{TINY},L3", "expected a size above 0"),
        (TINY.replace("L2", "L0"), "expected a size above 0"),
        (TINY.replace("K2", "K3"), "K must divide N"),
    ],
)
def test_a_bad_shape_is_refused_by_what_it_needs(text, words):
    with pytest.raises(UserError, match=f"--model=.*{words}"):
        parse_shape(text, 128)


def test_a_step_runs_here_and_has_the_planners_memory_beside_it():
    devices = search.present()
    cfg, config = parse_shape(TINY, 64), step_config(devices, 1, 64)
    planned, option, partition = planned_step(cfg, config, devices)
    assert planned.rows == jax.device_count()
    assert planned.planned_seconds is None  # a CPU has no row
    found = run_here(planned, cfg, option, partition)
    assert found.problem == ""
    assert len(found.measured_seconds) == 3
    assert 0.3 < found.compiled_bytes / found.planned_bytes < 3


def test_a_step_that_the_compiler_refuses_is_a_problem(monkeypatch):
    def refuse(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory\nmore")

    wanted = find_slice("v5e-1")
    cfg, devices = parse_shape("L2,D128,F256,N2,K1,H64,V256", 256), of_slice(wanted)
    planned, option, partition = planned_step(cfg, step_config(devices, 2, 256), devices)
    assert planned.attention == "flash"
    assert planned.planned_seconds > 0
    monkeypatch.setattr(steps, "compile_step", refuse)
    found = compile_for(planned, cfg, option, wanted, partition)
    assert found == dataclasses.replace(planned, problem="does not compile: RESOURCE_EXHAUSTED: no memory")

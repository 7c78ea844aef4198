"""FLOPs by hand and by counting, and files that survive a crash."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from solar_jax.cli.plots import plot_losses, running_mean
from solar_jax.cli.progress import duration
from solar_jax.config import ModelConfig
from solar_jax.model import llama
from solar_jax.model.flops import flops_per_token, mfu
from solar_jax.model.shapes import param_shapes
from solar_jax.monitoring.metrics import JsonLines
from tests.parallel.test_rules import SMALL

SOLAR = ModelConfig(32000, 4096, 14336, 48, 32, 8, 128)


def test_flops_of_solar_by_hand():
    # A layer: q and o 4096 x 4096 each, k and v 4096 x 1024 each, gate, up and down 4096 x 14336 each.
    layer = 2 * 16_777_216 + 2 * 4_194_304 + 3 * 58_720_256
    assert layer == 218_103_808
    weights = 48 * layer + 131_072_000  # and the output projection, 4096 x 32000
    # Scores and their product with the values: 2 x 2 x 4096 forward for each of 2048 keys on average, 3 with backward.
    attention = 48 * 3 * 4 * 4096 * 2048
    assert flops_per_token(SOLAR, 4096) == 6 * weights + attention == 68_432_166_912


def test_a_sliding_window_bounds_the_keys():
    windowed = ModelConfig(32000, 4096, 14336, 48, 32, 8, 128, sliding_window=1024)
    difference = flops_per_token(SOLAR, 4096) - flops_per_token(windowed, 4096)
    assert difference == 48 * 3 * 4 * 4096 * (2048 - 1024)
    assert flops_per_token(windowed, 1024) == flops_per_token(SOLAR, 1024)  # within the window nothing changes


def matmul_flops(jaxpr) -> int:
    """2 x multiplications of every dot in a program, those within loops as often as they run."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            total += 2 * inner * math.prod(eqn.outvars[0].aval.shape)
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for sub in jaxprs_in_params(eqn.params):
            total += times * matmul_flops(sub)
    return total


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_those_of_the_programs_matmuls(tied):
    cfg = dataclasses.replace(SMALL, tie_word_embeddings=tied)
    rows, length = 2, 16
    tokens = jnp.zeros((rows, length), jnp.int32)
    program = jax.make_jaxpr(jax.grad(lambda p: llama.logits(cfg, p, tokens).sum()))(param_shapes(cfg))
    # The program computes all 16 scores of a query and masks half of them; a causal count has only that half.
    masked = 3 * cfg.num_hidden_layers * 4 * cfg.num_attention_heads * cfg.head_dim * length / 2
    assert matmul_flops(program.jaxpr) == rows * length * (flops_per_token(cfg, length) + masked)


def test_mfu_is_flops_done_over_what_all_chips_could_do():
    assert mfu(1000.0, 1e9, 1e12, 2) == pytest.approx(0.5)


def test_mfu_is_not_guessed_without_a_known_peak():
    assert mfu(1000.0, 1e9, None, 2) is None


def test_lines_come_back_as_written(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl")
    assert lines.read() == []
    records = [{"step": i, "loss": 0.1 + i / 3, "mfu": None} for i in range(3)]
    for record in records:
        lines.append(record)
    assert lines.read() == records
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("cut", range(1, 23))
def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path, cut):
    file = tmp_path / "m.jsonl"
    whole = json.dumps({"step": 1, "loss": 2.5}) + "\n"
    file.write_text(whole + whole[:cut])
    assert JsonLines(file).read() == [{"step": 1, "loss": 2.5}]


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', '{"step": 2}'], ids=["within", "before the line break"])
def test_a_line_written_after_a_torn_one_is_kept(tmp_path, torn):
    file = tmp_path / "m.jsonl"
    file.write_text('{"step": 1}\n' + torn)
    lines = JsonLines(file)
    before = lines.read()
    lines.append({"step": 3})
    lines.append({"step": 4})
    assert lines.read() == [*before, {"step": 3}, {"step": 4}]


def test_steps_that_will_be_taken_again_are_dropped_and_nothing_else(tmp_path):
    file = tmp_path / "m.jsonl"
    lines = JsonLines(file)
    for step in range(1, 6):
        lines.append({"step": step, "loss": 1 / step})
    with file.open("a") as f:
        f.write('{"step": 6, "lo')
    lines.keep_if(lambda r: r["step"] <= 3)
    lines.append({"step": 4, "loss": 0.0})
    assert lines.read() == [{"step": s, "loss": 1 / s} for s in (1, 2, 3)] + [{"step": 4, "loss": 0.0}]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.2, "0 s"),
        (48, "48 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599, "59 min 59 s"),
        (7500, "2 h 05 min"),
        (86399, "23 h 59 min"),
        (3 * 86400 + 4 * 3600 + 59, "3 d 04 h"),
    ],
)
def test_durations_read_as_a_person_writes_them(seconds, expected):
    assert duration(seconds) == expected


@pytest.mark.parametrize(
    "arms",
    [
        {"healed": {"heldout": [(0, 3.6), (6, 3.0), (12, 2.9)], "train": [(s, 3 + 1 / s) for s in range(1, 13)]}},
        {
            "healed": {"heldout": [(0, 3.6), (12, 2.9)], "train": []},
            "control": {"heldout": [(0, 2.8), (12, 2.6)], "train": [(1, 2.8)]},
        },
    ],
    ids=["healed", "with control"],
)
def test_the_healing_curve_is_a_picture(tmp_path, arms):
    from matplotlib import image

    file = tmp_path / "loss.png"
    plot_losses(file, "dus(m=8): 32 to 48 layers", 2.82, arms, 1024)
    pixels = image.imread(file)  # refuses what is no PNG
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 800
    colours = {tuple(c) for c in pixels.reshape(-1, pixels.shape[-1])[:, :3].round(2)}
    assert len(colours) > 20  # something is drawn


def test_a_training_curve_is_smoothed_by_the_values_before():
    assert running_mean([4.0, 2.0, 6.0, 1.0], 1) == [4.0, 2.0, 6.0, 1.0]
    assert running_mean([4.0, 2.0, 6.0, 1.0], 3) == [4.0, 3.0, 4.0, 3.0]

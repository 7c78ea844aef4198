"""The plan command: what it says and writes, and what it does with and without a compiler."""

import dataclasses
import json
import pathlib
import runpy
import types

import jax
import pytest

from solar_jax import plan
from solar_jax.chaining.stages import resolve_chain
from solar_jax.config import MeshConfig, resolve
from solar_jax.errors import UserError
from solar_jax.hardware.slices import find_slice
from solar_jax.model.flops import flops_per_token
from solar_jax.model.remat import REMAT
from tests.planning.test_memory import GIB, SOLAR
from tests.test_config import dus_48l

CONTRACT = {
    "slice", "chips", "mesh", "remat", "hbm_gib", "step_seconds", "tokens_per_second_per_chip", "mfu", "compiled",
}  # fmt: skip
FULL = resolve(dus_48l())
V5P = [find_slice("v5p-128")]


@pytest.fixture
def compiler(monkeypatch):
    """In the TPU compiler's place one that refuses what needs more than `limit` GiB, and says 1 GiB and 3 s."""
    seen = types.SimpleNamespace(limit=1000.0, tried=[])

    def compile_step(cfg, config, wanted, partition):
        option = dataclasses.replace(plan.search.options(cfg, config, plan.search.of_slice(wanted))[0], config=config)
        seen.tried.append(plan.search.need(cfg, option).total / GIB)
        if seen.tried[-1] > seen.limit:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: E1000: Ran out of memory on HBM.\nSee elsewhere.")
        program = types.SimpleNamespace(
            scheduled_seconds=lambda: 3.0, seconds=lambda: (2.5, 4.0), unknown={"odd_kernel"}
        )
        return types.SimpleNamespace(total=GIB, program=program)

    monkeypatch.setattr(plan, "compile_step", compile_step)
    monkeypatch.setattr(plan, "described_devices", lambda wanted: [])
    return seen


def test_every_slice_gets_a_row_of_the_contract(tmp_path, capsys):
    file = tmp_path / "plan.json"
    rows = plan.plan(FULL, [find_slice("v5p-128"), find_slice("v6e-256")], file=str(file))
    assert json.loads(file.read_text()) == {"slices": rows}
    assert [(r["slice"], r["chips"], r["compiled"], r["fits"]) for r in rows] == [
        ("v5p-128", 64, False, True),
        ("v6e-256", 256, False, True),
    ]
    assert all(set(r) >= CONTRACT for r in rows)
    said = capsys.readouterr().out
    assert "10,731,524,096 parameters" in said
    assert all(said.count(f"\n{remat} ") == 2 for remat in REMAT)  # HBM of every policy, for each slice


def test_rates_hours_and_price_follow_from_the_step(capsys):
    (r,) = plan.plan(FULL, V5P, tokens=1e12, prices={"v5p": 10.0})
    rate = 256 * 4096 / r["step_seconds"]
    assert r["tokens_per_second_per_chip"] == pytest.approx(rate / 64)
    assert r["mfu"] == pytest.approx(rate * flops_per_token(SOLAR, 4096) / (64 * 459e12))
    assert r["mfu_non_causal"] / r["mfu"] == pytest.approx(
        flops_per_token(SOLAR, 4096, causal=False) / flops_per_token(SOLAR, 4096)
    )
    assert r["hours"] == pytest.approx(1e12 / rate / 3600)
    assert r["dollars"] == pytest.approx(r["hours"] * 640)
    assert "G causal" in capsys.readouterr().out


def test_a_tpu7xs_devices_are_counted_as_halves_of_chips():
    (r,) = plan.plan(FULL, [find_slice("tpu7x-128")])
    assert (r["chips"], r["mesh"]["fsdp"] * r["mesh"]["tensor"] * r["mesh"]["context"] * r["mesh"]["data"]) == (64, 128)
    assert 0.3 < r["mfu"] < 1


def test_a_slice_that_is_too_small_is_told_from_one_that_fits(capsys):
    rows = plan.plan(FULL, [find_slice("v5e-8"), find_slice("v5p-64")])
    assert [r["fits"] for r in rows] == [False, True]
    assert rows[0]["hbm_gib"] > 15.75  # the smallest need that there is
    assert "does not fit; smallest:" in capsys.readouterr().out


def test_the_compilers_figures_stand_in_place_of_estimates(compiler, capsys):
    (r,) = plan.plan(FULL, V5P, compiles=True)
    assert (r["compiled"], r["hbm_gib"], r["step_seconds"]) == (True, 1.0, 3.0)
    assert len(compiler.tried) == 1
    said = capsys.readouterr().out
    assert "compiling fsdp 64, remat matmuls for v5p-128" in said
    assert "kernels without a cost, so the step takes longer: odd_kernel" in said
    assert "step 3.000 s (2.500 s if all communication were hidden)" in said


def test_what_the_compiler_refuses_gives_way_to_the_next_best_that_needs_less(compiler):
    compiler.limit = 40.0
    (r,) = plan.plan(FULL, V5P, compiles=True)
    assert compiler.tried == sorted(compiler.tried, reverse=True)
    assert all(need > 40 for need in compiler.tried[:-1])
    assert compiler.tried[-1] <= 40
    assert r["compiled"]


def test_nothing_is_compiled_when_time_is_over(compiler, capsys):
    (r,) = plan.plan(FULL, V5P, compiles=True, time_limit=0.0)
    assert compiler.tried == []
    assert not r["compiled"]
    assert "time limit reached: estimated, not compiled" in capsys.readouterr().out


def test_without_a_compiler_the_plan_says_that_it_estimated(monkeypatch, capsys):
    def missing(wanted):
        raise UserError("the TPU compiler does not start; it needs the package libtpu.")

    monkeypatch.setattr(plan, "described_devices", missing)
    (r,) = plan.plan(FULL, V5P, compiles=True)
    assert not r["compiled"]
    assert "estimated, not compiled: the TPU compiler does not start" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"v9": 1}', "'v9' is not a known chip; chips are v4"),
        ('{"v5p": "4"}', "the price of v5p must be dollars per chip-hour, found '4'"),
        ('{"v5p": -1}', "found -1"),
        ("[1]", "prices.json"),
    ],
)
def test_prices_that_are_none_are_refused(tmp_path: pathlib.Path, content, said):
    file = tmp_path / "prices.json"
    file.write_text(content)
    with pytest.raises(UserError, match=said):
        plan.read_prices(str(file))


def test_what_failures_cost_is_told_for_every_slice(capsys):
    few, many = plan.plan(FULL, [find_slice("v5p-128"), find_slice("v5p-1024")], failures=0.17)
    assert many["failures"]["between"] == pytest.approx(few["failures"]["between"] / 8)
    assert few["failures"]["best_goodput"] >= few["failures"]["goodput"] > many["failures"]["goodput"]
    assert "failures: 0.17 of a chip and year (assumed), restart 10 min 00 s" in capsys.readouterr().out


def test_a_batch_that_is_too_small_for_a_slice_is_told_with_one_that_fits(capsys):
    train = dataclasses.replace(FULL.train, batch_size=8)
    plan.plan(dataclasses.replace(FULL, train=train, mesh=MeshConfig(data=1, fsdp=64, tensor=1, context=1)), V5P)
    assert "raise config.train.batch_size to 64 or take fewer chips" in capsys.readouterr().out


def test_no_step_is_saved_where_none_was_compiled(monkeypatch, tmp_path):
    def missing(wanted):
        raise UserError("the TPU compiler does not start; it needs the package libtpu.")

    monkeypatch.setattr(plan, "described_devices", missing)
    with pytest.raises(UserError, match="--save: no step was compiled for v5p-128, so none is saved"):
        plan.plan(FULL, V5P, compiles=True, save=tmp_path / "program")
    assert not (tmp_path / "program").exists()


def test_tokens_have_to_be_some():
    with pytest.raises(UserError, match=r"--tokens must be above 0, found -1"):
        plan.plan(FULL, V5P, tokens=-1.0)


def test_a_chain_is_planned_stage_by_stage_and_the_cheapest_slice_of_each_adds_up(tmp_path, capsys):
    chain = resolve_chain(runpy.run_path("configs/solar/chain.py")["get_config"]("full"))
    file = tmp_path / "plan.json"
    slices = [find_slice("v5e-8"), find_slice("v5p-128"), find_slice("v6e-256")]
    rows = plan.plan_chain(chain, slices, compiles=False, prices={}, time_limit=1.0, file=str(file))
    assert json.loads(file.read_text()) == {"stages": rows}
    assert list(rows) == ["grow", "sft", "dpo", "sdpo"]
    assert [row["fits"] for row in rows["grow"]] == [False, True, True]
    alone = plan.plan(dataclasses.replace(FULL), slices[1:])
    assert [row["hours"] for row in rows["grow"][1:]] == [row["hours"] for row in alone]
    cheapest = sum(min(row["dollars"] for row in of if row["fits"]) for of in rows.values())
    last = capsys.readouterr().out.split("solar_full")[1]
    assert f"{cheapest:,.0f}" in next(line for line in last.splitlines() if line.startswith("all"))

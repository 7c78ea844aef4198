"""Steps that must not count: how they are told apart, and what training does then."""

import dataclasses
import json
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solar_jax import train
from solar_jax.config import TrainConfig
from solar_jax.errors import UserError
from solar_jax.training import guards, loop
from solar_jax.training.guards import Guard, NotFinite, Spike, storable
from solar_jax.training.step import make_train_step
from tests.conftest import optimizer_of
from tests.parallel.test_mesh import mesh_of
from tests.parallel.test_rules import SMALL
from tests.test_train import make_config
from tests.training.small_run import FAST_COMPILE, config, initial, make_batch


def record(step: int, loss: float, norm: float = 1.0) -> dict:
    return {"step": step, "loss": loss, "grad_norm": norm}


def test_a_spike_is_told_by_the_mean_and_the_deviation_of_the_losses_before():
    losses = [3.0 + 0.1 * (i % 5) for i in range(80)]
    guard = Guard(TrainConfig(spike=4.0), [])
    for i, loss in enumerate(losses):
        assert guard.limit() == math.inf if i < guards.LEAST else guard.limit() < 4
        guard.check(record(i, loss))
    recent = losses[-64:]  # by hand
    limit = statistics.fmean(recent) + 4 * math.sqrt(sum((x - statistics.fmean(recent)) ** 2 for x in recent) / 64)
    assert guard.limit() == pytest.approx(limit)
    guard.check(record(80, limit - 1e-6))
    with pytest.raises(Spike, match=r"the loss of step 81 is 9\.0000"):
        guard.check(record(81, 9.0))
    # A resumed run is judged by the same losses.
    again = Guard(TrainConfig(spike=4.0), [record(i, x) for i, x in enumerate([*losses, limit - 1e-6])])
    assert again.limit() == guard.limit()


def test_a_flat_loss_has_no_spikes_and_0_takes_any_loss():
    guard = Guard(TrainConfig(spike=3.0), [record(i, 2.0) for i in range(30)])
    assert guard.limit() == pytest.approx(2.003)
    Guard(TrainConfig(), [record(i, 2.0) for i in range(30)]).check(record(30, 1e9))


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
def test_what_is_no_number_ends_a_run_once_no_more_steps_may_be_left_out(loss, norm):
    guard = Guard(TrainConfig(max_skipped=2), [storable(record(1, loss, norm))])  # as a resumed run reads it
    guard.check(record(2, loss, norm))
    assert guard.skipped == 2
    with pytest.raises(NotFinite, match="step 3 has loss"):
        guard.check(record(3, loss, norm))
    assert json.loads(json.dumps(storable(record(3, loss, norm)), allow_nan=False))["step"] == 3


@pytest.mark.parametrize("bad", [False, True])
def test_a_step_that_is_left_out_leaves_every_bit_of_the_state(bad):
    run = config(remat="none")
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, max_skipped=1))
    optimizer, mesh = optimizer_of(run), mesh_of(1, 1, 1)
    batch = jax.tree.map(jnp.array, make_batch(0))
    if bad:
        batch["weights"] = batch["weights"].at[0, 0].set(jnp.nan)
    params = jax.tree.map(jnp.array, initial(False))
    state = {"params": params, "opt_state": optimizer.init(params)}
    before = jax.tree.map(np.array, state)
    step = (
        make_train_step(SMALL, run.train, run.data.sequence_length, optimizer, mesh)
        .lower(state, batch)
        .compile(FAST_COMPILE)
    )
    after, measured = step(state, batch)
    same = [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True)]
    assert all(same) if bad else not any(same)
    assert bool(jnp.isfinite(measured["loss"])) != bad


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def disturbed(monkeypatch, losses: dict[int, float]) -> None:
    """Makes the k-th steps that are taken report other losses, as `losses` says; k counts from 1."""
    fetch, taken = loop._fetch, []

    def disturb(measured):
        numbers, end = fetch(measured)
        taken.append(numbers)
        return numbers | ({"loss": losses[len(taken)]} if len(taken) in losses else {}), end

    monkeypatch.setattr(loop, "_fetch", disturb)


def test_a_loss_that_is_no_number_ends_the_run_with_its_documents_and_keeps_the_last_good_checkpoint(
    tiny, text, tmp_path, monkeypatch
):
    run = make_config(tiny, text, evaluation_every=0)
    with monkeypatch.context() as patch:
        disturbed(patch, {5: math.nan})
        with pytest.raises(UserError) as stopped:
            train.run(run, tmp_path / "run")
    for words in ("healed: step 5 has loss nan", str(text), "checkpoint is that of step 3", "max_skipped, now 0"):
        assert words in str(stopped.value)
    assert [r["loss"] is None for r in lines(tmp_path / "run")] == [False, False, False, False, True, False]
    train.run(run, tmp_path / "run")
    train.run(run, tmp_path / "whole")
    assert [r["loss"] for r in lines(tmp_path / "run")] == [r["loss"] for r in lines(tmp_path / "whole")]


def test_steps_that_may_be_left_out_are_counted_and_the_rate_waits_for_them(tiny, text, tmp_path, monkeypatch):
    run = make_config(tiny, text, evaluation_every=0, train_max_skipped=1)
    train.run(run, tmp_path / "whole")
    disturbed(monkeypatch, {3: math.inf})
    train.run(run, tmp_path / "run")
    whole, found = lines(tmp_path / "whole"), lines(tmp_path / "run")
    assert [r["skipped"] for r in whole] == [0] * 6
    assert [r["skipped"] for r in found] == [0, 0, 1, 1, 1, 1]
    rates = [r["learning_rate"] for r in whole]
    assert [r["learning_rate"] for r in found] == [*rates[:3], *rates[2:5]]


def test_a_spike_brings_the_run_back_and_the_rows_up_to_it_are_left_out(tiny, text, tmp_path, monkeypatch, capsys):
    run = make_config(tiny, text, evaluation_every=0, train_spike=3.0, checkpoint_every=2)
    monkeypatch.setattr(guards, "LEAST", 3)
    disturbed(monkeypatch, {5: 50.0})
    train.run(run, tmp_path / "run")
    assert "step 5 is 50.0000" in capsys.readouterr().err
    assert [r["step"] for r in lines(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    host = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert host["tokens"] == 6 * 8 * 32
    # Steps 5 and 6 saw rows 40 to 55: those of step 5, where the spike was, were passed over.
    monkeypatch.undo()
    feed, asked = loop.Feed.__init__, []

    def first_row(self, rows, first, *rest):
        asked.append(first)
        feed(self, rows, first, *rest)

    longer = dataclasses.replace(run, train=dataclasses.replace(run.train, steps=7))
    monkeypatch.setattr(loop.Feed, "__init__", first_row)
    train.run(longer, tmp_path / "run2")
    assert asked == [0]
    (tmp_path / "run" / "summary.json").unlink()
    train.run(longer, tmp_path / "run", ["train.steps"])
    assert asked == [0, 7 * 8]


def test_a_loss_that_spikes_again_and_again_ends_the_run(tiny, text, tmp_path, monkeypatch):
    run = make_config(tiny, text, evaluation_every=0, train_spike=3.0, checkpoint_every=4)
    monkeypatch.setattr(guards, "LEAST", 3)
    # Steps 1 to 4, and the fifth and what was in flight behind it, again and again.
    disturbed(monkeypatch, dict.fromkeys(range(5, 100), 50.0))
    with pytest.raises(UserError, match=r"step 5 is 50.0000.* again after 3 rollbacks to step 4"):
        train.run(run, tmp_path / "run")

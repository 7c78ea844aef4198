"""Records of the training loop, their order, and that being watched changes no number."""

import dataclasses
import functools
import json
import signal
import time
import types

import jax
import jax.numpy as jnp
import optax
import pytest

from solar_jax import train
from solar_jax.config import GrowthConfig, LoggingConfig
from solar_jax.growth.operators import make_layer_map
from solar_jax.hardware import compilation
from solar_jax.model import llama
from solar_jax.monitoring.profiling import listen_for_profiles
from solar_jax.training import loop
from solar_jax.training.objectives import next_token_loss
from solar_jax.training.partition import make_partition
from solar_jax.training.step import make_train_step
from tests.conftest import optimizer_of
from tests.monitoring.test_trackers import events
from tests.parallel.test_mesh import mesh_of
from tests.parallel.test_rules import SMALL
from tests.test_train import make_config
from tests.training.small_run import FAST_COMPILE, config, initial, make_batch


@pytest.mark.parametrize(("name", "layers"), [("new", [2]), ("seam", [1, 2])])
def test_the_norm_that_is_recorded_is_of_what_trains_as_clipping_takes_it(name, layers):
    layer_map = make_layer_map(2, GrowthConfig("slices", slices="0:2,1:2"))
    run, mesh, batch = config(remat="none"), mesh_of(1, 1, 1), jax.tree.map(jnp.array, make_batch(0))
    assert SMALL.num_hidden_layers == layer_map.layers
    partition, optimizer = make_partition(name, layer_map), optimizer_of(run)

    def loss(params):
        logits = llama.logits(SMALL, params, batch["tokens"], batch["positions"], batch["segment_ids"])
        total, targets = next_token_loss(logits, batch["targets"], batch["weights"])
        return total / targets

    grads = jax.jit(jax.grad(loss))(initial(False))
    expected = optax.global_norm(jax.tree.map(lambda g: g[jnp.array(layers)], grads["layers"]))
    assert float(expected) < 0.98 * float(optax.global_norm(grads))  # so that the wrong one is told apart

    state = {"params": initial(False), "opt_state": optimizer.init(partition.trained(initial(False)))}
    step = functools.partial(make_train_step, SMALL, run.train, run.data.sequence_length, optimizer, mesh)
    _, measured = step(partition).lower(state, batch).compile(FAST_COMPILE)(state, batch)
    assert float(measured["grad_norm"]) == pytest.approx(float(expected), rel=1e-5)


STEPS_SECONDS = ("data_seconds", "compute_seconds", "evaluation_seconds", "checkpoint_seconds")


def numbers(folder) -> list[dict]:
    """The part of each line that must repeat bit by bit."""
    timed = {*STEPS_SECONDS, "tokens_per_second", "mfu", "memory_peak_gib"}
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in r.items() if key not in timed} for r in lines]


@pytest.fixture(scope="module")
def plain(tiny, text, tmp_path_factory):
    """A run that nothing watches."""
    config = make_config(tiny, text, logging_watchdog_seconds=0.0)
    folder = tmp_path_factory.mktemp("runs") / "plain"
    train.run(config, folder)
    return config, folder


def test_a_run_that_is_watched_in_every_way_has_the_same_numbers(plain, tmp_path, monkeypatch, capsys):
    config, whole = plain
    logging = LoggingConfig(tensorboard=True, profile_start=2, profile_steps=2, watchdog_seconds=60.0)
    made = loop.Feed.__call__

    def slow(self, k):
        if k == 2:
            time.sleep(2)
        return made(self, k)

    def say(line=""):
        if line.startswith("healed step 4"):
            signal.raise_signal(signal.SIGUSR1)
        print(line)

    monkeypatch.setattr(loop.Feed, "__call__", slow)
    monkeypatch.setattr(loop, "say", say)
    folder = tmp_path / "run"
    with listen_for_profiles():
        summary = train.run(dataclasses.replace(config, logging=logging), folder)
    assert numbers(folder) == numbers(whole)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if r["data_seconds"] > 0.5] == [3]  # batch 2 is that of step 3
    assert "data 1." in next(line for line in capsys.readouterr().out.splitlines() if "healed step 3" in line)
    assert [r["step"] for r in lines if r["checkpoint_seconds"]] == [4]  # after step 3; that after 6 has no next line
    assert [r["step"] for r in lines if r["evaluation_seconds"]] == [3, 5]
    for line in lines:
        assert line["tokens_per_second"] == pytest.approx(8 * 32 / (line["data_seconds"] + line["compute_seconds"]))
    # The window of the config, and that of the signal, which came when the line of step 4 was written.
    assert sorted(p.name for p in (folder / "profiles").iterdir()) == ["healed_000002", "healed_000005"]
    assert len(list((folder / "profiles").rglob("*.xplane.pb"))) == 2
    tags = {(step, tag) for step, tag, _ in events(folder / "tensorboard" / "healed")}
    assert {(s, "loss") for s in range(1, 7)} | {(s, "heldout_loss") for s in (0, 2, 4, 6)} <= tags
    spent = summary["time"]["spent_seconds"]
    assert spent["data"] >= 1.5
    assert spent["compilation"] > 0
    assert 0 < summary["time"]["goodput"] < 1
    assert sum(spent.values()) == pytest.approx(summary["time"]["wall_seconds"], abs=0.5)


def test_a_batch_that_fails_costs_no_finished_step_its_line_and_the_run_goes_on(plain, tmp_path, monkeypatch):
    config, whole = plain
    folder, made = tmp_path / "run", loop.Feed.__call__

    def fails(self, k):
        if k == 4:
            raise OSError("the disk is gone")
        return made(self, k)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Feed, "__call__", fails)
        with pytest.raises(OSError, match="the disk is gone"):
            train.run(config, folder)
    assert numbers(folder) == numbers(whole)[:4]
    # A restart may be watched in another way, and is still the same run.
    again = dataclasses.replace(config, logging=LoggingConfig(tensorboard=True, watchdog_seconds=0.0))
    summary = train.run(again, folder)
    assert numbers(folder) == numbers(whole)
    assert summary["time"]["starts"] == 2
    assert summary["time"]["spent_seconds"]["lost"] >= 0  # step 4, of milliseconds
    assert json.loads((folder / "goodput.json").read_text())["seconds"]["lost"] > 0


def test_the_devices_get_a_step_before_the_last_ones_numbers_are_read(plain, tmp_path, monkeypatch):
    config, whole = plain
    events: list[str] = []
    handed, fetch = loop.Prefetcher.take, loop._fetch

    def take(self):
        events.append("hand over")
        return handed(self)

    def slow_fetch(measured):
        time.sleep(0.3)
        return fetch(measured)

    monkeypatch.setattr(loop.Prefetcher, "take", take)
    monkeypatch.setattr(loop, "_fetch", slow_fetch)
    monkeypatch.setattr(loop, "say", lambda line="": events.append(line.split("/")[0]))
    train.run(config, tmp_path / "run")
    order = [e for e in events if e == "hand over" or e.startswith("healed step ")]
    # Held-out losses after steps 2, 4 and 6 and the checkpoint after 3 need their step done; 1 and 5 need nothing.
    expected = "hand over, hand over, healed step 1, healed step 2, hand over, healed step 3, hand over, healed step 4"
    expected += ", hand over, hand over, healed step 5, healed step 6"
    assert ", ".join(order) == expected
    assert numbers(tmp_path / "run") == numbers(whole)


@pytest.mark.parametrize("given", [True, False], ids=["of the environment", "of the user"])
def test_compiled_programs_are_kept_where_the_environment_or_the_users_cache_says(tmp_path, monkeypatch, given):
    found: dict[str, object] = {}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fake = types.SimpleNamespace(jax_compilation_cache_dir="/given" if given else None, update=found.__setitem__)
    monkeypatch.setattr(compilation.jax, "config", fake)
    compilation.use_cache(True)
    expected = {} if given else {"jax_compilation_cache_dir": str(tmp_path / "solar_jax" / "compiled")}
    assert found == {"jax_enable_compilation_cache": True} | expected
    found.clear()
    compilation.use_cache(False)
    assert found == {"jax_enable_compilation_cache": False}

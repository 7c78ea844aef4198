"""TensorBoard's files and what W&B is told, each step under its own number and arm."""

import importlib.util
import sys
import types
from typing import Any

import pytest

from solar_jax.config import LoggingConfig
from solar_jax.errors import UserError
from solar_jax.monitoring import trackers
from solar_jax.monitoring.trackers import Writers, check_packages


def events(folder) -> list[tuple[int, str, float]]:
    """(step, tag, value) of a folder's event files as TensorBoard shows them: what is purged is gone."""
    from tensorboardX import record_writer
    from tensorboardX.proto.event_pb2 import Event

    found: list[tuple[int, str, float]] = []
    for file in sorted(folder.glob("events.*")):
        data, at = file.read_bytes(), 0
        while at < len(data):  # length, its checksum, the event, its checksum
            size = int.from_bytes(data[at : at + 8], "little")
            body = data[at + 12 : at + 12 + size]
            assert record_writer.masked_crc32c(body) == int.from_bytes(data[at + 12 + size : at + 16 + size], "little")
            event = Event.FromString(body)
            if event.HasField("session_log"):  # a new session: it takes these steps again
                found = [e for e in found if e[0] < event.step]
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            at += 16 + size
    return found


def test_tensorboard_shows_every_step_once_after_a_restart(tmp_path):
    for first in (1, 3):  # killed after step 4, gone on from the checkpoint of step 2
        writer = Writers(LoggingConfig(tensorboard=True), tmp_path, "test", 100.0, {})
        for step in range(first, 5):
            writer.write("healed", step, {"loss": 1 / step, "mfu": None})
        writer.write("control", 1, {"loss": 7.0})
        writer.close()
    assert events(tmp_path / "tensorboard" / "healed") == [(s, "loss", pytest.approx(1 / s)) for s in (1, 2, 3, 4)]
    assert events(tmp_path / "tensorboard" / "control") == [(1, "loss", 7.0)]


def test_nothing_is_written_unless_asked_for_and_by_the_first_process_alone(tmp_path, monkeypatch):
    Writers(LoggingConfig(), tmp_path, "test", 100.0, {}).write("healed", 1, {"loss": 1.0})
    monkeypatch.setattr(trackers.processes, "is_first", lambda: False)
    asked = LoggingConfig(tensorboard=True, wandb_project="solar")
    Writers(asked, tmp_path, "test", 100.0, {}).write("healed", 1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


class FakeWandb(types.ModuleType):
    """A record of what is called of W&B."""

    def __init__(self):
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.metrics: list[tuple[str, str]] = []
        self.finished = 0

    def init(self, **kwargs):
        self.inits.append(kwargs)
        return self

    def define_metric(self, name, step_metric):
        self.metrics.append((name, step_metric))

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1


def test_wandb_gets_one_run_over_restarts_and_each_arms_own_steps(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for _ in range(2):
        writer = Writers(LoggingConfig(wandb_project="solar"), tmp_path, "test", 100.0, {"seed": 1})
        writer.write("healed", 3, {"loss": 2.0, "mfu": None})
        writer.close()
    assert wandb.logged == [{"healed/loss": 2.0, "healed/step": 3}] * 2
    assert ("healed/*", "healed/step") in wandb.metrics
    first, second = wandb.inits
    assert first == second  # the id too
    assert (first["project"], first["resume"], first["config"]) == ("solar", "allow", {"seed": 1})
    assert wandb.finished == 2
    Writers(LoggingConfig(wandb_project="solar"), tmp_path, "test", 200.0, {})  # the folder emptied, begun anew
    assert wandb.inits[2]["id"] != first["id"]


def test_wandb_that_does_not_start_is_told_in_one_sentence(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(wandb, "init", lambda **_: (_ for _ in ()).throw(RuntimeError("no login\nfound")))
    with pytest.raises(UserError, match=r"wandb_project='solar': .* no login found"):
        Writers(LoggingConfig(wandb_project="solar"), tmp_path, "test", 100.0, {})


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        (LoggingConfig(tensorboard=True), ["config.logging.tensorboard", "tensorboardX"]),
        (LoggingConfig(wandb_project="solar"), ["config.logging.wandb_project='solar'", "wandb"]),
    ],
)
def test_a_package_that_is_missing_is_named_before_anything_is_done(monkeypatch, cfg, words):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    check_packages(LoggingConfig())
    with pytest.raises(UserError) as refused:
        check_packages(cfg)
    assert "\n" not in str(refused.value)
    for word in words:
        assert word in str(refused.value)

"""Groups of devices, and runs of which one fails."""

import jax
import pytest

from solar_jax.errors import UserError
from solar_jax.studying.schedule import Meter, device_groups


def test_devices_are_split_into_groups_of_equal_size_and_the_rest_is_not_used():
    devices = jax.devices()
    assert len(devices) == 8
    assert device_groups(devices, 0) == [tuple(devices)]
    assert device_groups(devices, 3) == [tuple(devices[:3]), tuple(devices[3:6])]
    assert device_groups(devices, 8) == [tuple(devices)]
    with pytest.raises(UserError, match=r"config.devices_per_arm must be at most the 8 device\(s\) present, found 9"):
        device_groups(devices, 9)


def test_the_time_left_follows_from_what_is_done(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("solar_jax.studying.schedule.time.monotonic", lambda: now[0])
    meter = Meter(to_do=40.0, began=100.0)
    assert meter.left() == "unknown"
    now[0], meter.done = 130.0, 10.0
    assert meter.left() == "1 min 30 s"

"""Rates: what they count, and that a table's number is only there where there is a row."""

import pytest

from solar_jax.checking import rates
from solar_jax.checking.rates import Rate, gather_rate, matmul_rate, seconds_per_call, stream_rate
from solar_jax.hardware.chips import CHIPS


def test_a_cpu_has_numbers_and_no_row(monkeypatch):
    monkeypatch.setattr(rates, "BUDGET", 1e-3)
    monkeypatch.setitem(rates.SIZES, "cpu", (64, 2**16, 2**14, 2**14))
    found = {one.name: one for one in rates.rates(None)}
    assert all(found[name].found > 0 for name in ("matmul, bfloat16", "matmul, float32", "memory", "all-gather"))
    assert all(one.table is None and one.ratio is None and one.note for one in found.values())
    assert found["device to host"].found is None


def test_what_is_counted_by_hand(monkeypatch):
    monkeypatch.setattr(rates, "seconds_per_call", lambda call, first: 2.0)
    assert matmul_rate(100, "float32") == 1e6
    assert stream_rate(800) == 800  # read and written
    assert gather_rate(3200) == 1600  # the whole array, whoever has how much of it


def test_a_rate_is_beside_its_chips_row(monkeypatch):
    monkeypatch.setattr(rates, "seconds_per_call", lambda call, first: 1.0)
    monkeypatch.setattr(rates.chips, "peak_flops", lambda device: 197e12)
    monkeypatch.setitem(rates.SIZES, "cpu", (64, 2**16, 2**14, 2**14))
    found = {one.name: one for one in rates.rates(CHIPS["v5e"])}
    assert found["matmul, bfloat16"].table == pytest.approx(0.95 * 197e12)
    assert found["matmul, float32"].table == pytest.approx(0.95 * 197e12 / 6)
    assert found["HBM"].table == 8.19e11
    assert found["all-gather"].table == 1.8e11
    assert Rate("", "GB/s", 3.0, 2.0).ratio == 1.5


def test_calls_are_chained_and_the_first_is_not_timed():
    seen = []

    def call(x):
        seen.append(x)
        return x + 1

    assert 0 < seconds_per_call(call, 0) < 1
    assert seen == list(range(len(seen)))
    assert len(seen) >= 2 + rates.ROUNDS

"""Where the time of steps and of runs is booked, by made-up clocks."""

import json

import pytest

from solar_jax.monitoring import goodput
from solar_jax.monitoring.goodput import Ledger, StepClock, StepSeconds, goodput_line, step_note


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """The time that both clocks tell, for a test to move."""
    at = [100.0]
    monkeypatch.setattr(goodput.time, "perf_counter", lambda: at[0])
    monkeypatch.setattr(goodput.time, "time", lambda: at[0])
    return at


@pytest.mark.parametrize(
    ("asked", "ready", "end", "data", "compute"),
    [
        (100.0, 100.0, 102.0, 0.0, 2.0),
        (100.0, 101.5, 104.0, 1.5, 2.5),  # the batch came late, with nothing else to do
        (97.0, 99.0, 102.0, 0.0, 2.0),  # it came while the step before ran
        (97.0, 101.0, 102.0, 1.0, 1.0),  # it was late already when that ended: the wait counts from there
        (101.0, 101.5, 103.0, 0.5, 2.5),  # the host asked late: that is not the data's fault
    ],
)
def test_a_step_waits_for_data_only_while_the_devices_have_nothing_to_do(now, asked, ready, end, data, compute):
    spent = StepClock(1).step(asked, ready, end)
    assert (spent.data, spent.compute) == pytest.approx((data, compute))


def test_steps_follow_one_another_without_gap_or_overlap(now):
    steps = StepClock(3)
    found = [steps.step(end - 3, end - 2.5, end) for end in (102.0, 104.0, 107.0)]
    assert [s.total for s in found] == [2.0, 2.0, 3.0]


def test_what_comes_between_steps_is_told_with_the_next_and_is_no_part_of_it(now):
    steps = StepClock(3)
    steps.step(100.0, 100.0, 101.0)
    now[0] = 101.0
    with steps.outside("evaluation"):
        now[0] += 5
    with steps.outside("checkpoint"):
        now[0] += 7
    spent = steps.step(113.0, 113.0, 115.0)
    assert spent == StepSeconds(0.0, 2.0, {"evaluation": 5.0, "checkpoint": 7.0})
    assert steps.step(115.0, 115.0, 116.0).outside == {"evaluation": 0.0, "checkpoint": 0.0}


def test_what_is_left_is_told_from_the_median_without_the_first_step(now):
    # The first step warms up, and one slow step among many is no trend.
    steps, at = StepClock(10), 100.0
    for seconds, expected in ((100, 9 * 100), (2, 8 * 2), (2, 7 * 2), (50, 6 * 2), (2, 5 * 2)):
        at += seconds
        assert steps.step(at - seconds, at - seconds, at).total == seconds
        assert steps.eta() == expected


@pytest.mark.parametrize(
    ("spent", "note"),
    [
        (StepSeconds(0.0, 2.0, {"evaluation": 0.0, "checkpoint": 0.0}), ""),
        (StepSeconds(0.05, 2.0, {"evaluation": 0.0, "checkpoint": 0.09}), ""),
        (
            StepSeconds(0.5, 2.0, {"evaluation": 3.0, "checkpoint": 9.3}),
            "  data 0.5 s  evaluation 3.0 s  checkpoint 9.3 s",
        )
    ],
)  # fmt: skip
def test_a_line_tells_what_cost_more_than_a_twentieth_of_its_step(spent, note):
    assert step_note(spent) == note


def line(compute: float, data: float = 0.0) -> dict:
    return {"compute_seconds": compute, "data_seconds": data}


def test_goodput_counts_from_the_very_first_start_what_went_into_steps_that_count(now, tmp_path):
    now[0] = 110.0
    first = Ledger(tmp_path, started=100.0)
    first.add("checkpoint", 4.0)
    now[0] = 150.0  # killed, and started again
    again = Ledger(tmp_path, started=150.0)
    again.add("lost", 6.0)  # of steps that are taken again
    again.add("checkpoint", 1.0)
    now[0] = 200.0
    found = again.summary([line(30.0, 2.0), line(20.0)])
    assert found["goodput"] == 0.5  # 50 of 100 seconds
    assert (found["starts"], found["wall_seconds"]) == (2, 100.0)
    assert found["spent_seconds"] == {
        "compute": 50.0, "data": 2.0, "evaluation": 0.0, "checkpoint": 5.0, "compilation": 0.0, "reference": 0.0,
        "lost": 6.0,
        "other": 37.0,
    }  # fmt: skip
    assert goodput_line(found) == (
        "goodput 50.0 % of 1 min 40 s over 2 starts: compute 50 s, data 2 s, checkpoint 5 s, lost 6 s, other 37 s"
    )


def test_a_second_process_keeps_no_ledger_of_its_own(now, tmp_path, monkeypatch):
    monkeypatch.setattr(goodput.processes, "is_first", lambda: False)
    Ledger(tmp_path, 100.0).add("lost", 1.0)
    assert list(tmp_path.iterdir()) == []


def test_the_ledger_of_an_older_version_is_gone_on_with(now, tmp_path):
    (tmp_path / "goodput.json").write_text(json.dumps({"first_start": 50.0, "starts": 3}))
    assert Ledger(tmp_path, 100.0).summary([line(25.0)])["goodput"] == 0.5

"""The check command: its report, its file, and its status."""

import json
import subprocess
import sys
import types

import pytest

from solar_jax import check
from solar_jax.checking.kernels import Case, KernelCheck, compared, plain_by_blocks
from solar_jax.checking.rates import Rate
from solar_jax.hardware.slices import find_slice

TINY = "L2,D32,F64,N4,K2,H8,V64"
CASE = Case("float32", 64, heads=2, kv_heads=1, length=256, rows=1)


@pytest.fixture
def quick(monkeypatch):
    """One kernel and one rate in the place of all; the kernel is right where `right` says so."""
    found = {"right": True}

    def comparisons(platform: str) -> list[KernelCheck]:
        window = 0 if found["right"] else 100
        return [compared("flash", lambda *x: plain_by_blocks(*x, sliding_window=window), CASE)]

    monkeypatch.setattr(check, "comparisons", comparisons)
    monkeypatch.setattr(check, "rates", lambda chip: [Rate("memory", "GB/s", 2e10, None, "the table has no row")])
    return found


def test_a_machine_is_reported_with_its_versions_kernels_rates_and_step(quick, capsys):
    found = check.check_machine(TINY, 64, 1)
    said = found.report()
    for words in ("jaxlib ", "8 x cpu", "no row in the planner's table", "flash   float32", "memory", "training step"):
        assert words in said
    assert found.failure() == ""
    progress = capsys.readouterr().err
    assert progress.index("cases, forward") < progress.index("rates:") < progress.index("training step")


def run_main(monkeypatch, **values) -> int:
    """The status of the command, run in this process."""
    given = dict.fromkeys(("out", "topology", "model", "length", "rows")) | values
    monkeypatch.setattr(check.flags, "FLAGS", types.SimpleNamespace(**given))
    try:
        check.main([])
    except SystemExit as e:
        return e.code
    return 0


def test_a_wrong_kernel_ends_with_status_1_and_one_sentence(quick, monkeypatch, capsys, tmp_path):
    file = tmp_path / "check.json"
    given = {"model": TINY, "length": 64, "rows": 1, "out": str(file)}
    assert run_main(monkeypatch, **given) == 0
    assert json.loads(file.read_text())["failure"] == ""
    quick["right"] = False
    assert run_main(monkeypatch, **given) == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said.startswith(
        "error: attention kernel 'flash' is wrong on float32, 1 x 256, 2/1 heads of 64: it is too far"
    )
    content = json.loads(file.read_text())
    assert content["failure"] == said.removeprefix("error: ")
    assert content["kernels"][0]["errors"]["relative"]["out"] > 0.01
    assert len(content["step"]["measured_seconds"]) == 3


def test_a_number_that_json_lacks_is_written_by_its_name():
    found = check.Checked({"a": "b"}, rates=[Rate("x", "GB/s", float("nan"), float("inf"))])
    assert json.loads(json.dumps(found.content(), allow_nan=False))["rates"][0]["found"] == "nan"


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--rows=0", "--rows must be at least 1, found 0."),
        ("--model=L2,D0", "expected a size above 0 for each of V, D, F, L, N, K, H"),
        ("--topology=v5e-3", "--topology: there is no slice 'v5e-3'; v5e slices come in sizes 1, 4, 8"),
        ("--out=/not/there/x.json", "--out=/not/there/x.json: expected a file in a folder that exists."),
        ("--out=gs://bucket/x", "--out=gs://bucket/x: expected a local file."),
    ],
)
def test_flags_that_cannot_work_are_refused(flag, words):
    done = subprocess.run([sys.executable, "-m", "solar_jax.check", flag], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1


@pytest.mark.slow  # the compiler
def test_a_slice_that_is_not_here_is_compiled_for(monkeypatch):
    monkeypatch.setattr(check, "kernel_compilations", lambda wanted: [])
    found = check.check_topology(find_slice("v5e-1"), "L2,D128,F256,N2,K1,H64,V256", 256, 2)
    assert found.step.attention == "flash"
    assert found.step.problem == ""
    assert found.step.compiled_seconds > 0
    assert 0.3 < found.step.compiled_bytes / found.step.planned_bytes < 3
    assert "nothing was run" in found.report()

"""Text of a check: the tables, and the sentence that it fails with."""

import math

from solar_jax.checking.compiled import KernelCompilation
from solar_jax.checking.kernels import OUTPUTS, Case, Errors, KernelCheck
from solar_jax.checking.rates import Rate
from solar_jax.checking.report import check_report, failure
from solar_jax.checking.steps import StepCheck

CASE = Case("float32", 64)
STEP = StepCheck("2 layers", "one device, remat none", "flash", 8, 256, 3 * 2**30, 0.02)


def comparison(kernel: str = "flash", dq: float = 1e-6) -> KernelCheck:
    errors = Errors(dict.fromkeys(OUTPUTS, 1e-6), dict.fromkeys(OUTPUTS, 1e-6) | {"dq": dq}, 1e-4)
    return KernelCheck(kernel, CASE, errors, errors.wrong)


def test_a_check_without_a_wrong_kernel_fails_with_nothing():
    assert failure([comparison()], [], STEP) == ""


def test_one_sentence_names_the_kernel_the_case_and_the_number():
    assert failure([comparison(), comparison("splash", 0.1)], [], STEP) == (
        "attention kernel 'splash' is wrong on float32, 2 x 2048, 4/4 heads of 64: it is too far from plain attention: "
        "dq differs by 1.0e-01, more than 1e-04."
    )
    said = failure([comparison("flash", math.nan), comparison("splash", 0.1), comparison()], [], None)
    assert "dq differs by nan" in said
    assert said.endswith("; 2 of 3 cases are wrong, of flash, splash.")


def test_a_kernel_that_does_not_compile_fails_unless_the_planner_foresaw_it():
    small = KernelCompilation("flash", CASE, 16 * 2**20, 128 * 2**20, problem="does not compile: layout")
    large = KernelCompilation("flash", CASE, 256 * 2**20, 128 * 2**20, problem="does not fit in VMEM")
    assert failure([], [large], None) == ""
    assert "'flash' is wrong on" in failure([], [large, small], None)
    assert "does not compile: layout" in failure([], [large, small], None)


def test_the_report_puts_what_was_found_beside_the_planners_numbers():
    measured = [
        Rate("HBM", "GB/s", 7.371e11, 8.19e11), Rate("memory", "GB/s", 2e10, None, "the table has no row"),
        Rate("host to device", "GB/s", None, None, "not measured"),
    ]  # fmt: skip
    found = {"compiled_bytes": 1.5 * 2**30, "measured_seconds": (0.05, 0.04, 0.06), "compile_seconds": 9.0}
    said = check_report({"versions": "jax 1"}, [comparison()], [], measured, StepCheck(**vars(STEP) | found))
    lines = said.splitlines()
    assert lines[0] == "versions  jax 1"
    assert any(line.startswith("flash ") and line.endswith(" ok") for line in lines)
    assert any(line.split() == ["HBM", "GB/s", "737.10", "819.00", "0.90"] for line in lines)
    assert any(line.startswith("memory ") and line.endswith("the table has no row") for line in lines)
    assert any(line.split()[-3:] == ["1,536.00", "3,072.00", "0.50"] for line in lines)
    assert any("40.00" in line and "20.00" in line and " 2.00 " in line for line in lines)  # the fastest step


def test_a_device_without_a_row_has_no_predicted_time():
    step = StepCheck(**vars(STEP) | {"planned_seconds": None, "measured_seconds": (0.05,)})
    assert "the planner's table has no row" in check_report({"a": "b"}, [], [], [], step)

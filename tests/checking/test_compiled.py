"""Kernels compiled for chips that are not here, by the TPU compiler."""

import dataclasses

import pytest

from solar_jax.checking.compiled import cases_to_compile, compile_kernel
from solar_jax.checking.kernels import Case
from solar_jax.hardware.slices import described_devices, find_slice

SMALL = Case("float32", 64, heads=2, kv_heads=1, segmented=True, window=200, length=512, rows=1)


@pytest.mark.slow  # the compiler
@pytest.mark.parametrize("name", ["v5e-1", "v6e-1", "v5p-8"])
@pytest.mark.parametrize("kernel", ["flash", "streamed", "splash"])
def test_kernels_compile_for_one_chip_of_each_kind(name, kernel):
    wanted = find_slice(name)
    found = compile_kernel(kernel, SMALL, described_devices(wanted)[0], wanted)
    assert found.problem == ""
    assert found.memory > 0
    assert found.other_cycles > 0


@pytest.mark.slow  # the compiler
def test_a_kernel_that_the_compiler_refuses_is_a_problem_and_not_an_exception():
    wanted = find_slice("v5e-1")
    odd = dataclasses.replace(SMALL, width=63)  # halves of a head have no whole number of elements
    found = compile_kernel("flash", odd, described_devices(wanted)[0], wanted)
    assert found.problem.startswith("does not compile: ")
    assert not found.foreseen


def test_what_the_planner_knows_not_to_fit_is_not_compiled():
    class Device:
        device_kind = "TPU v4"

    found = compile_kernel("flash", cases_to_compile()[0], Device(), find_slice("v4-8"))
    assert found.foreseen
    assert found.problem == "does not fit in VMEM, by the planner; not compiled"

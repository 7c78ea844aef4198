"""The comparison of kernels with plain attention: what it lets pass, and what it does not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solar_jax.checking import kernels
from solar_jax.checking.kernels import Case, both_ways, compared, make_arrays, make_cases, plain_by_blocks
from solar_jax.model.attention import attention_mask, rotated_attention
from solar_jax.parallel.attention import local_kernel

CASE = Case("float32", 64, heads=2, kv_heads=1, segmented=True, window=70, length=256, rows=1)
NARROW = dataclasses.replace(CASE, dtype="bfloat16")


def plain(q, k, v, rope, ids, *, window=70):
    return plain_by_blocks(q, k, v, rope, ids, sliding_window=window)


@pytest.mark.parametrize("case", [CASE, dataclasses.replace(CASE, segmented=False, window=0, rows=2)], ids=str)
def test_plain_attention_by_blocks_is_plain_attention_in_both_directions(monkeypatch, case):
    monkeypatch.setattr(kernels, "BLOCK", 128)  # two blocks

    def whole(q, k, v, rope, ids):
        return rotated_attention(q, k, v, rope, attention_mask(case.length, ids, case.window))

    arrays = make_arrays(case)
    found = both_ways(functools.partial(plain_by_blocks, sliding_window=case.window))(*arrays)
    for a, b in zip(found, both_ways(whole)(*arrays), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("kernel", ["flash", "streamed", "splash"])
@pytest.mark.parametrize("case", [CASE, NARROW], ids=str)
def test_a_right_kernel_passes(kernel, case):
    found = compared(kernel, local_kernel(kernel, case.window, interpret=True), case)
    assert found.problem == ""
    assert found.errors.relative.keys() == {"out", "dq", "dk", "dv"}


def one_pass(q, k, v, rope, ids):
    """Rounds what a product of float32 matrices in one bfloat16 pass rounds."""
    return plain(*(x.astype(jnp.bfloat16).astype(jnp.float32) for x in (q, k, v)), rope, ids)


@jax.custom_vjp
def _without_gradient(x):
    return x


_without_gradient.defvjp(lambda x: (x, None), lambda _, g: (jnp.zeros_like(g),))

# Kernels with a mistake each, and the case in which it is found
BROKEN = {
    "window one longer": (functools.partial(plain, window=71), CASE),
    "documents leak": (lambda q, k, v, rope, ids: plain(q, k, v, rope, None), NARROW),
    "last token halved": (lambda *x: plain(*x).at[:, -1].multiply(0.5), NARROW),
    "one bfloat16 pass": (one_pass, CASE),
    "no gradient of values": (lambda q, k, v, *x: plain(q, k, _without_gradient(v), *x), NARROW),
    "memory that nothing wrote": (lambda *x: plain(*x).at[0, 3, 1, 5].set(jnp.nan), NARROW),
}


@pytest.mark.parametrize("mistake", BROKEN)
def test_a_wrong_kernel_does_not_pass(mistake):
    attend, case = BROKEN[mistake]
    found = compared("broken", attend, case)
    assert "differs by" in found.problem
    assert ("dv" in found.problem) == (mistake == "no gradient of values")
    assert ("nan" in found.problem) == (mistake == "memory that nothing wrote")


def test_what_is_compared_is_right_before_it_is_broken():
    assert compared("plain", plain, CASE).problem == compared("plain", plain, NARROW).problem == ""


def test_a_kernel_that_does_not_compile_is_a_problem_and_not_an_exception():
    def refuses(*_):
        raise NotImplementedError("Mosaic has no such layout\nsee elsewhere")

    found = compared("flash", refuses, CASE)
    assert found.problem == "does not run: NotImplementedError: Mosaic has no such layout"
    assert found.errors is None


def test_cases_cover_dtypes_widths_documents_groups_and_windows():
    cases = make_cases("flash", small=False)
    assert {(c.dtype, c.width) for c in cases} == {(d, w) for d in ("float32", "bfloat16") for w in (64, 128)}
    assert {c.heads // c.kv_heads for c in cases} == {1, 2, 4}
    assert {(c.segmented, bool(c.window)) for c in cases} == {(True, True), (True, False), (False, False)}
    assert {c.dtype for c in make_cases("cudnn", small=False)} == {"bfloat16"}  # which it takes alone


def test_flops_are_those_of_the_planner():
    # 2 products of 2 x 4 heads x 2048 queries x 1024 keys x 128, 2 FLOPs each, 3.5 passes; in float32 six times that
    case = Case("bfloat16", 128)
    assert kernels.planned_flops(case) == 3.5 * 2 * 2 * 2 * 4 * 2048 * 1024 * 128
    assert kernels.planned_flops(dataclasses.replace(case, window=512)) == kernels.planned_flops(case) / 2
    assert kernels.planned_flops(dataclasses.replace(case, dtype="float32")) == 6 * kernels.planned_flops(case)

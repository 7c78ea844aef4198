"""The kernels of whole rows, interpreted on a CPU, against plain attention: same result, same gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from solar_jax.model import flash, flash_blocks
from solar_jax.model.attention import SAVED
from solar_jax.parallel.attention import per_device
from tests.model.plain_attention import (
    TOLERANCE,
    H,
    angles,
    arrays,
    assert_plain,
    gradients,
    plain,
    product_precisions,
    segments,
    simulated,
)  # fmt: skip
from tests.parallel.test_mesh import mesh_of


def kernels(q, k, v, segment_ids, window):
    return flash.flash_attention(q, k, v, angles(q.shape[-1]), segment_ids, sliding_window=window, interpret=True)


@pytest.fixture
def small_blocks(monkeypatch):
    """Two blocks of queries and keys, so that one of four pairs is passed over, and more with documents or a window."""
    monkeypatch.setattr(flash_blocks, "BLOCK", 128)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("window", "segmented", "kv_heads", "width"),
    [(0, False, 2, H), (0, True, 4, H), (70, True, 2, H), (70, False, 1, H), (256, True, 2, H), (0, True, 2, 64),
     (70, True, 2, 160), (0, False, 1, 24)],
)  # fmt: skip
def test_kernels_are_plain_attention_forward_and_backward(window, segmented, kv_heads, width):
    inputs, ids = arrays(kv_heads, width), segments() if segmented else None
    assert_plain(kernels, inputs, ids, window)


@pytest.mark.parametrize(("ids", "window"), [(None, 70), (segments(), 71)], ids=["documents leak", "window one longer"])
def test_the_comparison_refuses_another_mask(ids, window):
    found = kernels(*arrays(), ids, window)
    assert float(jnp.abs(found - plain(*arrays(), segments(), 70)).max()) > 100 * TOLERANCE


@pytest.mark.parametrize("shape", [(1, 2, 1), (1, 2, 2), (2, 1, 2)])
def test_every_device_attends_within_its_rows_and_heads(shape):
    kernel = functools.partial(flash.flash_attention, sliding_window=0, interpret=True)
    attend = per_device(mesh_of(*shape), kernel)
    found = jax.jit(lambda *x: attend(*x, angles(), segments()))(*arrays())
    np.testing.assert_allclose(found, plain(*arrays(), segments(), 0), atol=TOLERANCE)


@pytest.mark.parametrize(("names", "runs"), [((SAVED,), 1), ((), 2)], ids=["saved", "not saved"])
def test_a_policy_that_saves_attention_runs_its_forward_kernel_once(names, runs):
    policy = jax.checkpoint_policies.save_only_these_names(*names)

    def loss(q, k, v):
        return jnp.sum(jax.checkpoint(kernels, policy=policy, static_argnums=4)(q, k, v, segments(), 0))

    text = str(jax.make_jaxpr(jax.grad(loss))(*arrays()))
    assert len(re.findall(r"\bname=flash_attention_fwd", text)) == runs


@pytest.mark.parametrize(("dtype", "found"), [(jnp.float32, "HIGHEST"), (jnp.bfloat16, "default")])
def test_float32_is_multiplied_in_full(dtype, found):
    # On a TPU a kernel's default is one pass in bfloat16, which no interpreter shows.
    assert product_precisions(kernels, dtype) == {found}


@pytest.mark.slow  # every access of memory is a call of Python
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("cores", [1, 2])
def test_no_kernel_reads_what_nothing_wrote_or_races(cores):
    inputs, ids = arrays(), segments()

    def attend(q, k, v, segment_ids, window):
        rope = angles(q.shape[-1])
        return flash.flash_attention(q, k, v, rope, segment_ids, sliding_window=window, interpret=False)

    with simulated(cores):
        out = np.asarray(attend(*inputs, ids, 70))
        found = jax.tree.map(np.asarray, gradients(attend, *inputs, ids, 70))
    np.testing.assert_allclose(out, plain(*inputs, ids, 70), atol=TOLERANCE)
    for name, a, b in zip("qkv", found, gradients(plain, *inputs, ids, 70), strict=True):
        np.testing.assert_allclose(a, b, atol=10 * TOLERANCE, err_msg=f"d{name}")


def scratch_sum(dimension: str, *, initialised: bool):
    """A kernel that sums four rows into one, in a buffer."""

    def kernel(x, out, total):
        if initialised:
            pl.when(pl.program_id(0) == 0)(lambda: total.__setitem__(..., jnp.zeros_like(total)))
        total[...] += x[...]
        out[...] = total[...]

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0, grid=(4,), in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
            out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)), scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=(dimension,)),
    )(jnp.ones((32, 128)))  # fmt: skip


def test_the_simulation_shows_unwritten_memory_and_races():
    # A negative control. On a TPU, and in plain interpret mode, such kernels may well give what was meant.
    with simulated(1):
        assert np.all(np.asarray(scratch_sum("arbitrary", initialised=True)) == 4)
        assert np.all(np.isnan(np.asarray(scratch_sum("arbitrary", initialised=False))))
    with simulated(2), pytest.raises(Exception, match="RACE DETECTED"):  # both cores write the one output
        jax.block_until_ready(scratch_sum("parallel", initialised=True))

"""The kernels of streamed rows, interpreted on a CPU, against plain attention: same result, same gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solar_jax.model import flash, flash_streamed
from solar_jax.model.attention import attention_mask, rotated_attention
from solar_jax.model.flash_streamed import first_keys, streamed_attention, visible_tables
from solar_jax.parallel.attention import per_device
from tests.model.test_flash import (
    TOLERANCE,
    H,
    angles,
    arrays,
    gradients,
    plain,
    product_precisions,
    segments,
    simulated,
)  # fmt: skip
from tests.parallel.test_mesh import mesh_of


def streamed(q, k, v, segment_ids, window, *, interpret=True):
    rope = angles(q.shape[-1])
    return streamed_attention(q, k, v, rope, segment_ids, sliding_window=window, interpret=interpret)


@pytest.fixture
def small_tiles(monkeypatch):
    """Two tiles of 128 tokens in rows of 256, each a block."""
    monkeypatch.setattr(flash_streamed, "TILE", 128)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("window", "segmented", "kv_heads", "width"),
    [(0, False, 2, H), (70, True, 4, H), (256, True, 1, 64), (70, True, 2, 160), (0, False, 1, 24)],
)
def test_streamed_kernels_are_plain_attention_forward_and_backward(window, segmented, kv_heads, width):
    inputs, ids = arrays(kv_heads, width), segments() if segmented else None
    np.testing.assert_allclose(streamed(*inputs, ids, window), plain(*inputs, ids, window), atol=TOLERANCE)
    found, expected = (gradients(f, *inputs, ids, window) for f in (streamed, plain))
    for name, a, b in zip("qkv", found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=10 * TOLERANCE, err_msg=f"d{name}")


@pytest.mark.parametrize(
    ("shape", "window"), [((1, 1, 1, 1), 300), ((1, 1, 1, 2), 0), ((1, 1, 1, 2), 300), ((1, 2, 2, 2), 0)]
)
def test_rows_of_many_blocks_and_tiles_are_attended_whole_also_split_over_devices(monkeypatch, shape, window):
    # Rows of 1,536 = 4 tiles of 3 blocks; chunks of a tile, 0 and 3 on one device of two, 1 and 2 on the other. Pairs
    # of blocks of all kinds: unseen, at the edge of a document or window, on the diagonal, seen in full.
    monkeypatch.setattr(flash_streamed, "TILE", 384)
    monkeypatch.setattr(flash, "BLOCK", 128)
    S, split = 1536, shape[-1] > 1
    rng = np.random.default_rng(0)
    order = np.arange(S).reshape(4, -1)[[0, 3, 1, 2] if split else [0, 1, 2, 3]].reshape(-1)
    inputs = tuple(jnp.array(rng.standard_normal((2, S, n, 32)), jnp.float32) for n in (4, 2, 2))
    turns = rng.uniform(0, 6.28, (2, S, 16))
    rope = jnp.array(np.cos(turns), jnp.float32), jnp.array(np.sin(turns), jnp.float32)
    borders = np.array([[[200], [201]], [[641], [1300]]])  # [2, documents' borders, 1]
    ids = jnp.array((np.arange(S) >= borders).sum(1), jnp.int32)
    kernel = functools.partial(streamed_attention, sliding_window=window, interpret=True)
    attend = per_device(mesh_of(*shape), kernel)

    def found(q, k, v, segment_ids, _):
        q, k, v, *turned = (x[:, order] for x in (q, k, v, *rope))
        return attend(q, k, v, tuple(turned), segment_ids)[:, np.argsort(order)]

    def whole(q, k, v, segment_ids, _):
        return rotated_attention(q, k, v, rope, attention_mask(S, segment_ids, window))

    np.testing.assert_allclose(jax.jit(found)(*inputs, ids, None), whole(*inputs, ids, None), atol=TOLERANCE)
    derived = jax.jit(functools.partial(gradients, found))(*inputs, ids, None)
    for name, a, b in zip("qkv", derived, gradients(whole, *inputs, ids, None), strict=True):
        np.testing.assert_allclose(a, b, atol=10 * TOLERANCE, err_msg=f"d{name}")


def test_first_keys_are_the_starts_of_documents_or_of_the_window():
    ids = jnp.array([[0, 0, 0, 1, 1, 1, 1, 2]])
    assert first_keys(ids, 0).tolist() == [[0, 0, 0, 3, 3, 3, 3, 7]]
    assert first_keys(ids, 2).tolist() == [[0, 0, 1, 3, 3, 4, 5, 7]]


def test_tables_name_the_blocks_and_tiles_that_are_seen_so_that_others_are_skipped():
    # Two blocks of 128 a tile; one device has the row's tiles 0 and 3. Documents begin at 0, 300 and 800.
    ids = jnp.array((np.arange(1024)[None] >= np.array([[300], [800]])).sum(0)[None], jnp.int32)
    first = first_keys(ids, 0)
    own = jnp.concatenate((first[:, :256], first[:, 768:]), 1)
    starts, earliest, whole, low, high = visible_tables(own, jnp.array([0, 3]), 256, 128, 1024)
    assert starts.tolist() == [0, 3]
    assert earliest.tolist() == [[0, 0, 2, 6]]  # query 768 is of the document of 300, in block 2; 896 of that of 800
    assert whole.tolist() == [[0, 0, 7, 7]]  # the last query of block 6 sees keys from 800 on, block 7 in full
    assert [low[0, 0], high[0, 0], low[0, 3], high[0, 3]] == [0, 0, 1, 1]  # tile 0 is seen by tile 0 alone, 3 by 3
    assert [low[0, 1], high[0, 1]] == [1, 1]  # keys 256 to 511: queries 768 to 799 of the same document


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("ids", "window"), [(None, 70), (segments(), 71)], ids=["documents leak", "window one longer"])
def test_the_comparison_refuses_another_mask(ids, window):
    found = streamed(*arrays(), ids, window)
    assert float(jnp.abs(found - plain(*arrays(), segments(), 70)).max()) > 100 * TOLERANCE


@pytest.mark.parametrize(("dtype", "found"), [(jnp.float32, "HIGHEST"), (jnp.bfloat16, "default")])
def test_streamed_kernels_multiply_float32_in_full(dtype, found):
    assert product_precisions(streamed, dtype) == {found}


@pytest.mark.slow  # every access of memory is a call of Python
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("cores", [1, 2])
def test_no_streamed_kernel_reads_what_nothing_wrote_or_races(cores):
    inputs, ids = arrays(), segments()
    attend = functools.partial(streamed, interpret=False)
    with simulated(cores):
        out = np.asarray(attend(*inputs, ids, 70))
        found = jax.tree.map(np.asarray, gradients(attend, *inputs, ids, 70))
    np.testing.assert_allclose(out, plain(*inputs, ids, 70), atol=TOLERANCE)
    for name, a, b in zip("qkv", found, gradients(plain, *inputs, ids, 70), strict=True):
        np.testing.assert_allclose(a, b, atol=10 * TOLERANCE, err_msg=f"d{name}")

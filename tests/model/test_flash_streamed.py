"""The kernels of streamed rows, interpreted on a CPU, against plain attention: same result, same gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solar_jax.model import flash_blocks, flash_streamed
from solar_jax.model.flash_streamed import streamed_attention, visible_tables
from tests.model.plain_attention import (
    TOLERANCE,
    H,
    angles,
    arrays,
    assert_plain,
    assert_plain_on_devices,
    gradients,
    plain,
    product_precisions,
    segments,
    simulated,
)  # fmt: skip


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
    assert_plain(streamed, inputs, ids, window)


@pytest.mark.parametrize(
    ("shape", "window"), [((1, 1, 1, 1), 300), ((1, 1, 1, 2), 0), ((1, 1, 1, 2), 300), ((1, 2, 2, 2), 0)]
)
def test_rows_of_many_blocks_and_tiles_are_attended_whole_also_split_over_devices(monkeypatch, shape, window):
    # Four tiles of 3 blocks, each a chunk. Pairs of blocks of all kinds: unseen, at the edge of a document or window,
    # on the diagonal, seen in full.
    monkeypatch.setattr(flash_streamed, "TILE", 384)
    monkeypatch.setattr(flash_blocks, "BLOCK", 128)
    kernel = functools.partial(streamed_attention, sliding_window=window, interpret=True)
    borders = np.array([[200, 201], [641, 1300]])
    assert_plain_on_devices(kernel, shape, window, length=1536, width=32, borders=borders)


def test_tables_name_the_blocks_and_tiles_that_are_seen_so_that_others_are_skipped():
    # Two blocks of 128 a tile; one device has the row's tiles 0 and 3. Documents begin at 0, 300 and 800.
    ids = jnp.array((np.arange(1024)[None] >= np.array([[300], [800]])).sum(0)[None], jnp.int32)
    first = flash_blocks.first_keys(ids, 0)
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

"""Splash kernels, interpreted on a CPU, against plain attention: same result, same gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solar_jax.model.attention import attention_mask, rotated_attention
from solar_jax.model.splash import splash_attention
from solar_jax.parallel.attention import per_device
from tests.model.test_flash import TOLERANCE, angles, arrays, gradients, plain, product_precisions, segments
from tests.parallel.test_mesh import mesh_of


def splash(q, k, v, segment_ids, window):
    return splash_attention(q, k, v, angles(q.shape[-1]), segment_ids, sliding_window=window, interpret=True)


@pytest.mark.parametrize(
    ("window", "segmented", "kv_heads", "width"),
    [(0, False, 2, 128), (70, True, 4, 128), (0, True, 1, 128), (0, True, 2, 64), (70, False, 2, 160)],
)
def test_splash_is_plain_attention_forward_and_backward(window, segmented, kv_heads, width):
    inputs, ids = arrays(kv_heads, width), segments() if segmented else None
    np.testing.assert_allclose(splash(*inputs, ids, window), plain(*inputs, ids, window), atol=TOLERANCE)
    found, expected = (gradients(f, *inputs, ids, window) for f in (splash, plain))
    for name, a, b in zip("qkv", found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=10 * TOLERANCE, err_msg=f"d{name}")


@pytest.mark.parametrize("window", [0, 200])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (1, 2, 2, 2)])
def test_rows_split_over_devices_are_attended_whole(shape, window):
    # Chunks of 128 tokens: 0 and 3 on one device, 1 and 2 on the other. Borders and window's edge lie within chunks.
    rng, order = np.random.default_rng(0), np.arange(512).reshape(4, -1)[[0, 3, 1, 2]].reshape(-1)
    inputs = tuple(jnp.array(rng.standard_normal((2, 512, n, 128)), jnp.float32) for n in (4, 2, 2))
    turns = rng.uniform(0, 6.28, (2, 512, 64))
    rope = jnp.array(np.cos(turns), jnp.float32), jnp.array(np.sin(turns), jnp.float32)
    ids = jnp.array(np.arange(512)[None] >= np.array([[200], [301]]), jnp.int32)
    kernel = functools.partial(splash_attention, sliding_window=window, interpret=True)
    attend = per_device(mesh_of(*shape), kernel)

    def split(q, k, v, segment_ids, _):
        q, k, v, *turned = (x[:, order] for x in (q, k, v, *rope))
        return attend(q, k, v, tuple(turned), segment_ids)[:, np.argsort(order)]

    def whole(q, k, v, segment_ids, _):
        return rotated_attention(q, k, v, rope, attention_mask(512, segment_ids, window))

    np.testing.assert_allclose(jax.jit(split)(*inputs, ids, None), whole(*inputs, ids, None), atol=TOLERANCE)
    found = jax.jit(functools.partial(gradients, split))(*inputs, ids, None)
    for name, a, b in zip("qkv", found, gradients(whole, *inputs, ids, None), strict=True):
        np.testing.assert_allclose(a, b, atol=10 * TOLERANCE, err_msg=f"d{name}")


@pytest.mark.parametrize(("dtype", "found"), [(jnp.float32, "HIGHEST"), (jnp.bfloat16, "default")])
def test_splash_multiplies_float32_in_full(dtype, found):
    assert product_precisions(splash, dtype) == {found}

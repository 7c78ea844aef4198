"""Splash kernels, interpreted on a CPU, against plain attention: same result, same gradients."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from solar_jax.model.splash import splash_attention
from tests.model.plain_attention import (
    angles,
    arrays,
    assert_plain,
    assert_plain_on_devices,
    product_precisions,
    segments,
)


def splash(q, k, v, segment_ids, window):
    return splash_attention(q, k, v, angles(q.shape[-1]), segment_ids, sliding_window=window, interpret=True)


@pytest.mark.parametrize(
    ("window", "segmented", "kv_heads", "width"),
    [(0, False, 2, 128), (70, True, 4, 128), (0, True, 1, 128), (0, True, 2, 64), (70, False, 2, 160)],
)
def test_splash_is_plain_attention_forward_and_backward(window, segmented, kv_heads, width):
    inputs, ids = arrays(kv_heads, width), segments() if segmented else None
    assert_plain(splash, inputs, ids, window)


@pytest.mark.parametrize("window", [0, 200])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (1, 2, 2, 2)])
def test_rows_split_over_devices_are_attended_whole(shape, window):
    # Chunks of 128 tokens. Borders and window's edge lie within them.
    kernel = functools.partial(splash_attention, sliding_window=window, interpret=True)
    assert_plain_on_devices(kernel, shape, window, length=512, width=128, borders=np.array([[200], [301]]))


@pytest.mark.parametrize(("dtype", "found"), [(jnp.float32, "HIGHEST"), (jnp.bfloat16, "default")])
def test_splash_multiplies_float32_in_full(dtype, found):
    assert product_precisions(splash, dtype) == {found}

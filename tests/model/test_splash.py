"""Splash kernels, interpreted on a CPU, against plain attention: same result, same gradients."""

import numpy as np
import pytest

from solar_jax.model.splash import splash_attention
from tests.model.test_flash import TOLERANCE, angles, arrays, gradients, plain, segments


def splash(q, k, v, segment_ids, window):
    return splash_attention(q, k, v, angles(), segment_ids, sliding_window=window, interpret=True)


@pytest.mark.parametrize(("window", "segmented", "kv_heads"), [(0, False, 2), (70, True, 4), (0, True, 1)])
def test_splash_is_plain_attention_forward_and_backward(window, segmented, kv_heads):
    inputs, ids = arrays(kv_heads), segments() if segmented else None
    np.testing.assert_allclose(splash(*inputs, ids, window), plain(*inputs, ids, window), atol=TOLERANCE)
    found, expected = (gradients(f, *inputs, ids, window) for f in (splash, plain))
    for name, a, b in zip("qkv", found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=10 * TOLERANCE, err_msg=f"d{name}")

"""The second path to a tensor: rounding against torch, growth against numbers worked out by hand."""

import ml_dtypes
import numpy as np
import pytest
import torch

from solar_jax.checkpoints.checkpoint import numpy_dtype
from solar_jax.checkpoints.verify import recompute
from solar_jax.checkpoints.verify.recompute import recomputed, rounded_to
from solar_jax.growth.operators import LayerMap

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_narrow_rounds_every_pattern_of_bits_as_torch_does(dtype):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 1 << 32, 1 << 18, np.uint32)
    ties = (np.arange(1 << 16, dtype=np.uint32) << 16) | 0x8000
    x = np.concatenate([x, ties, ties + 1, ties - 1]).view(np.float32)
    found = rounded_to(x, numpy_dtype(dtype))
    expected = torch.from_numpy(x).to(getattr(torch, dtype))
    numbers = ~np.isnan(x)
    width = f"u{found.itemsize}"
    bits = expected.view({2: torch.int16, 4: torch.int32}[found.itemsize]).numpy().view(width)
    np.testing.assert_array_equal(found.view(width)[numbers], bits[numbers])
    assert np.isnan(recompute.widen(found)[~numbers]).all()
    np.testing.assert_array_equal(recompute.widen(found), expected.float().numpy())
    # NaNs too are those of the library that the writer casts with.
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(found.view(width), x.astype(numpy_dtype(dtype)).view(width))


def test_a_mean_and_a_scale_are_rounded_each_to_the_sources_dtype():
    a, b = np.array([1.0, 256.0, -3.0], BFLOAT16), np.array([2.0, 258.0, -3.0], BFLOAT16)
    # 257 lies between the bfloat16 numbers 256 and 258, and goes to the one with the even last bit.
    assert recomputed([a, b], 1.0).tolist() == [1.5, 256.0, -3.0]
    assert recomputed([a.astype(np.float32), b.astype(np.float32)], 1.0).tolist() == [1.5, 257.0, -3.0]
    assert recomputed([a, b], 0.5).tolist() == [0.75, 128.0, -1.5]
    zeros = recomputed([a], 0.0)
    assert zeros.tolist() == [0.0, 0.0, 0.0]
    assert np.signbit(zeros).tolist() == [False, False, True]


def test_a_tensor_comes_from_its_layers_source_and_partner():
    layer_map = LayerMap("by hand", 3, (0, 2, 2), partner=(0, 1, 2))
    names = [recompute.source_names(layer_map, "layers/up_proj", i) for i in range(3)]
    assert names == [[f"model.layers.{j}.mlp.up_proj.weight" for j in js] for js in ([0], [2, 1], [2])]
    assert recompute.source_names(layer_map, "final_norm", None) == ["model.norm.weight"]

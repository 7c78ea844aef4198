"""Values that growth derives from the base: fits against a solver on the elements, noise by statistics and rows."""

import ml_dtypes
import numpy as np

from solar_jax.growth.derived import deviation, fitted, mixed, moments, noise


def test_a_fit_over_blocks_finds_the_coefficients_that_made_the_layers():
    rng = np.random.default_rng(0)
    layers = [rng.standard_normal((4, 6)), rng.standard_normal((4, 6))]
    for _ in range(5):  # W_{i+1} such that W_i = 0.75 W_{i-1} - 0.5 W_{i+1} for every inner i
        layers.append((0.75 * layers[-2] - layers[-1]) / 0.5)
    halves = [moments(lambda i, rows=rows: layers[i][rows], 7) for rows in (slice(0, 3), slice(3, 4))]
    assert fitted(np.sum(halves, axis=0)) == (0.75, -0.5)


def test_parallel_neighbours_have_the_fit_of_least_norm():
    # All layers equal: a + b = 1, and the least norm is a half each; a solver without it would blow up.
    same = np.arange(6.0)
    np.testing.assert_allclose(fitted(moments(lambda i: same, 4)), (0.5, 0.5), rtol=1e-6)


def test_a_mixture_is_computed_in_float32_and_rounded_once():
    x, y = np.array([1.0, 256.0], ml_dtypes.bfloat16), np.array([2.0, 258.0], ml_dtypes.bfloat16)
    assert mixed(x, y, "mean", lambda: (9.0, 9.0)).tolist() == [1.5, 256.0]
    assert mixed(x, y, "fit", lambda: (2.0, -1.0)).tolist() == [0.0, 254.0]
    assert mixed(x, y, "fit", lambda: (2.0, -1.0)).dtype == x.dtype


def test_the_deviation_over_blocks_is_that_of_the_whole():
    x = np.random.default_rng(0).normal(0.3, 0.02, (30, 7)).astype(np.float32)
    assert deviation([x[:11], x[11:]]) == np.float32(np.std(x.astype(np.float64)))
    assert deviation([np.zeros(3)]) == 0


def test_rows_of_noise_are_the_same_in_any_block_and_differ_between_tensors():
    whole = noise("layers.3.q", range(40), 50, 0.02)
    np.testing.assert_array_equal(noise("layers.3.q", range(7, 19), 50, 0.02), whole[7:19])
    other = noise("layers.4.q", range(40), 50, 0.02)
    assert abs(np.corrcoef(whole.ravel(), other.ravel())[0, 1]) < 0.1
    assert abs(np.corrcoef(whole[:-1].ravel(), whole[1:].ravel())[0, 1]) < 0.1
    assert abs(whole.std() / 0.02 - 1) < 0.05  # 2,000 draws: a standard error of 1.6 %
    assert abs(whole.mean()) < 4 * 0.02 / 2000**0.5

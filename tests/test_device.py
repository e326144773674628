"""Tests of data/jax_augment.py: both implementations of the blur, on any device."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from simsiam_jax.data import jax_augment
from simsiam_jax.data.recipe import BLUR_RADIUS


@pytest.mark.parametrize('blur', [jax_augment.blur_by_taps, jax_augment.blur_by_products, None])
@pytest.mark.parametrize('sigma', [0.1, 0.8, 2.0])
def test_blur_matches_scipy(blur, sigma: float) -> None:
    image = np.random.default_rng(0).random((20, 33), np.float32)
    if blur:
        kernel = np.exp(-0.5 * np.square(np.arange(-BLUR_RADIUS, BLUR_RADIUS + 1) / sigma))
        (blurred,) = blur([jnp.asarray(image)], jnp.asarray(kernel / kernel.sum(), jnp.float32))
    else:
        (blurred,) = jax_augment.blur([jnp.asarray(image)], jnp.float32(sigma))
    expected = ndimage.gaussian_filter(image, sigma, mode='mirror', radius=BLUR_RADIUS)
    np.testing.assert_allclose(blurred, expected, rtol=1e-5)

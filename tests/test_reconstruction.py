"""PSNR and SSIM of reconstructions."""

import numpy as np
import pytest

from addp_jax.metrics import reconstruction

SCIKIT_IMAGE = (0.950324684208994, 0.4307136304246891)  # 0.26.0's structural_similarity of `pairs()`, Gaussian window
AGREEMENT = 1e-4  # relative; float32 against float64


def pairs():
    """Blocky images [2,30,42,3] and the same with a little and with much noise."""
    rng = np.random.RandomState(0)
    image = rng.uniform(size=(2, 5, 7, 3)).repeat(6, 1).repeat(6, 2)
    noisy = np.clip(image + rng.normal(0, [[[[0.05]]], [[[0.3]]]], image.shape), 0, 1)
    return image.astype(np.float32), noisy.astype(np.float32)


def test_ssim_agrees_with_scikit_image():
    np.testing.assert_allclose(reconstruction.ssim(*pairs()), SCIKIT_IMAGE, rtol=AGREEMENT)


@pytest.mark.medium
@pytest.mark.parametrize("size", (4, 11, 16))
def test_an_image_is_equal_to_itself_at_any_size(size):
    image = np.random.default_rng(0).uniform(size=(2, size, size, 3)).astype(np.float32)
    np.testing.assert_allclose(reconstruction.ssim(image, image), 1, rtol=AGREEMENT)
    np.testing.assert_allclose(reconstruction.psnr(image, image), 100, rtol=AGREEMENT)


def test_ssim_of_flat_images():
    """Without structure only the luminance term is left: (2ab + C1) / (a^2 + b^2 + C1)."""
    one, other = np.full((1, 16, 16, 3), 0.2, np.float32), np.full((1, 16, 16, 3), 0.6, np.float32)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    np.testing.assert_allclose(reconstruction.ssim(one, other), expected, rtol=1e-3)


def test_psnr_of_a_known_error():
    image = np.full((2, 4, 4, 3), 0.5, np.float32)
    other = image + np.float32([0.1, 2.0])[:, None, None, None]  # the second is clipped to 1
    np.testing.assert_allclose(reconstruction.psnr(image, other), [20, -10 * np.log10(0.25)], rtol=AGREEMENT)

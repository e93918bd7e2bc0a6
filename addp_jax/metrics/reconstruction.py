"""How close a reconstruction is to its image, one number per pair: PSNR and SSIM."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

MSE_FLOOR = 1e-10  # caps the PSNR at 100 dB
WINDOW, SIGMA = 11, 1.5  # pixels, of SSIM's Gaussian window
C1, C2 = 0.01**2, 0.03**2  # SSIM's constants for a range of 1


def psnr(image, reconstruction):
    """Peak signal-to-noise ratio in dB of each (clipped) reconstruction [B,H,W,C] in [0,1]: [B], at most 100."""
    mse = ((jnp.clip(reconstruction, 0, 1) - image) ** 2).mean((1, 2, 3))
    return -10 * jnp.log10(jnp.maximum(mse, MSE_FLOOR))


def ssim(image, reconstruction):
    """Structural similarity (Wang et al. 2004) of each (clipped) reconstruction [B,H,W,C] in [0,1]: [B], 1 = equal.

    Each channel by itself, an 11-pixel Gaussian window that stays inside the image, mean over places and channels;
    smaller images have a window as large as they are.
    """
    one, other = image, jnp.clip(reconstruction, 0, 1)
    mean_one, mean_other = window_mean(one), window_mean(other)
    var_one = window_mean(one**2) - mean_one**2
    var_other = window_mean(other**2) - mean_other**2
    covariance = window_mean(one * other) - mean_one * mean_other
    luminance = (2 * mean_one * mean_other + C1) / (mean_one**2 + mean_other**2 + C1)
    structure = (2 * covariance + C2) / (var_one + var_other + C2)
    return (luminance * structure).mean((1, 2, 3))


def window_mean(image):
    """Gaussian-weighted means of the windows of [B,H,W,C] that lie inside it."""
    for axis in (1, 2):
        size = min(WINDOW, image.shape[axis])
        weights = np.exp(-((np.arange(size) - (size - 1) / 2) ** 2) / (2 * SIGMA**2))
        windows = np.arange(image.shape[axis] - size + 1)[:, None] + np.arange(size)
        matrix = np.zeros((len(windows), image.shape[axis]), np.float32)
        np.put_along_axis(matrix, windows, weights / weights.sum(), axis=1)
        moved = jnp.moveaxis(image, axis, -1)
        image = jnp.moveaxis(jnp.matmul(moved, matrix.T, precision=jax.lax.Precision.HIGHEST), -1, axis)
    return image

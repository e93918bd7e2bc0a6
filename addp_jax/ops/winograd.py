"""3x3 convolutions with half the products, for CPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

# Winograd's F(4,3): four neighbouring outputs of a three-tap filter out of six inputs, with six products instead of
# twelve. Each row of INPUTS and OUTPUTS is a sum of the six; FILTER makes six taps of three.
INPUTS = ((4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0), (0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1))
FILTER = np.float32([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / np.float32(24)
OUTPUTS = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))
WINOGRAD_ROWS, WINOGRAD_CHANNELS = 32, 64  # of smaller images and kernels it is not faster


def fast_convolve(image, kernel, window_strides, padding, **kwargs):
    """`lax.conv_general_dilated`, with half the products where a CPU runs a large 3x3 convolution in float32.

    Only of a stride of 1, zeros around the image, no dilation, no groups and the default precision; whatever else is
    asked for is done as asked. The result is off by 2e-5 of its standard deviation; none of 2048 encoded tokens
    flipped, where bfloat16 flips one in thirty.
    """

    def direct(image, kernel):
        return jax.lax.conv_general_dilated(image, kernel, window_strides, padding, **kwargs)

    large = image.shape[1] >= WINOGRAD_ROWS and min(kernel.shape[2:]) >= WINOGRAD_CHANNELS
    floats = image.dtype == kernel.dtype == jnp.float32
    fits = kernel.shape[:2] == (3, 3) and image.shape[1] % 4 == 0 and large and floats
    if not (fits and _ordinary(image, kernel, window_strides, padding, **kwargs)):
        return direct(image, kernel)
    return jax.lax.platform_dependent(image, kernel, cpu=winograd, default=direct)


def _ordinary(image, kernel, window_strides, padding, *, dimension_numbers=None, lhs_dilation=None, rhs_dilation=None, **others):
    """Whether these arguments of `lax.conv_general_dilated` ask for what `winograd` computes from a 3x3 kernel."""
    around = padding if isinstance(padding, str) else tuple(map(tuple, padding))
    ones = all(tuple(steps or (1, 1)) == (1, 1) for steps in (window_strides, lhs_dilation, rhs_dilation))
    names = jax.lax.conv_dimension_numbers(image.shape, kernel.shape, dimension_numbers)
    nhwc = names == jax.lax.conv_dimension_numbers(image.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
    defaults = all(value is None or (name.endswith("group_count") and value == 1) for name, value in others.items())
    return ones and around in ("SAME", ((1, 1), (1, 1))) and nhwc and defaults


def winograd(image, kernel):
    """3x3 convolution of [B,H,W,C], H a multiple of 4, zeros around it: rows by F(4,3), columns as usual."""
    batch, height, width, _ = image.shape
    padded = jnp.pad(image, ((0, 0), (1, 1), (0, 0), (0, 0)))
    rows = [padded[:, first : first + height - 3 : 4] for first in range(6)]

    def combine(weights, arrays):
        return sum(weight * array for weight, array in zip(weights, arrays) if weight)

    filters = jnp.einsum("py,yxcf->pxcf", FILTER, kernel, precision=jax.lax.Precision.HIGHEST)
    products = [
        jax.lax.conv_general_dilated(
            combine(weights, rows), taps[None], (1, 1), [(0, 0), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        for weights, taps in zip(INPUTS, filters)
    ]
    out = jnp.stack([combine(weights, products) for weights in OUTPUTS], axis=2)
    return out.reshape(batch, height, width, -1)

"""Feature maps of other sizes, as products with small matrices: bilinear (half-pixel centres), adaptive means, and 3x3
convolutions of maps that would have to be enlarged first."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def linear_weights(old: int, new: int):
    """float64 [new,old]: what each of `old` points gives to each of `new` ones; ends are repeated outwards."""
    centre = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    return np.maximum(0, 1 - np.abs(centre[:, None] - np.arange(old)[None]))


def mean_weights(old: int, new: int):
    """float64 [new,old]: means over the points floor(i old/new) to ceil((i+1) old/new); neighbours may share points."""
    bins, points = np.arange(new)[:, None], np.arange(old)[None]
    inside = (points >= bins * old // new) & (points < -(-(bins + 1) * old // new))
    return inside / inside.sum(1, keepdims=True)


def weighted(features, rows, columns):
    """`features` [B,h,w,C], `rows` [H,h], `columns` [W,w] -> [B,H,W,C] in the dtype of `features`."""
    rows, columns = (jnp.asarray(weights, features.dtype) for weights in (rows, columns))
    features = jnp.einsum("ih,bhwc->biwc", rows, features, precision="highest")
    return jnp.einsum("jw,biwc->bijc", columns, features, precision="highest")


def bilinear(features: jax.Array, size: tuple[int, int]) -> jax.Array:
    """`features` [B,h,w,C], `size` (H, W) -> [B,H,W,C]. PyTorch's `interpolate` with align_corners=False."""
    if features.shape[1:3] == tuple(size):
        return features
    return weighted(features, *(linear_weights(*sides) for sides in zip(features.shape[1:3], size)))


def adaptive_mean(features: jax.Array, side: int) -> jax.Array:
    """`features` [B,h,w,C] -> [B,side,side,C]. PyTorch's `AdaptiveAvgPool2d`."""
    return weighted(features, *(mean_weights(old, side) for old in features.shape[1:3]))


def conv3(features: jax.Array, kernel: jax.Array) -> jax.Array:
    """`features` [B,h,w,D], `kernel` [3,3,D,C] -> [B,h,w,C], zeros around the map."""
    return jax.lax.conv_general_dilated(features, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def enlarged_conv3(features: jax.Array, kernel: jax.Array, size: tuple[int, int]) -> jax.Array:
    """`conv3(bilinear(features, size), kernel)`, [B,h,w,D] and [3,3,D,C] -> [B,H,W,C], but for rounding.

    The nine products with the kernel's points and the interpolation commute. So the products are made on the small map,
    with h*w/(H*W) of the arithmetic. Then their rows, and after that their columns, are interpolated, shifted and added
    up by one matrix each, in which zeros stand for what lies beyond the enlarged map.
    """
    rows, columns = (shifted(linear_weights(*sides)) for sides in zip(features.shape[1:3], size))
    points = jnp.einsum("bhwd,yxdc->bhwyxc", features, kernel)
    points = jnp.einsum("iyh,bhwyxc->biwxc", jnp.asarray(rows, features.dtype), points)
    return jnp.einsum("jxw,biwxc->bijc", jnp.asarray(columns, features.dtype), points)


def shifted(weights):
    """[new,old] -> [new,3,old]: the rows before, at and behind each; zeros beyond the ends."""
    padded = np.pad(weights, ((1, 1), (0, 0)))
    return np.stack([padded[first : first + len(weights)] for first in range(3)], axis=1)

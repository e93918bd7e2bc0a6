"""Images as bytes and as numbers in [0,1]: the only two places where one becomes the other on a device."""

from __future__ import annotations

import jax
import jax.numpy as jnp

PADDING = (124, 116, 104)  # RGB beyond a picture: ImageNet's mean, about 0 once normalised


def to_unit(image: jax.Array) -> jax.Array:
    """uint8 [...] -> float32 in [0,1]."""
    return image.astype(jnp.float32) / 255


def to_uint8(image: jax.Array) -> jax.Array:
    """[0,1] -> 0..255, truncated as the release does (0.999 -> 254)."""
    return jnp.clip(image * 255, 0, 255).astype(jnp.uint8)

"""The tokenizer's discriminator: StyleGAN's residual discriminator with blur pooling, as in MaskGIT.

Used only while a tokenizer is trained; nothing downstream needs its weights.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from addp_jax import schema

LAYOUT = (
    (r".*(conv\w*|shortcut)/kernel", ("replicated",) * 4),
    (r".*dense_\w+/kernel", ("replicated", "replicated")),
    (r".*bias", ("replicated",)),
)
SMALLEST = 4  # pixels along one side where the pyramid ends


@schema.config
class Config:
    """The width doubles with every halving of the resolution, up to `max_channels`."""

    channels: int = schema.field(64, least=1, tiny=8)  # at full resolution; MaskGIT: 64 for 256 pixels, 256 for 64 pixels
    max_channels: int = schema.field(512, least=1, tiny=8)

    def widths(self, image_size: int) -> tuple[int, ...]:
        """Channels at `image_size`, half of it, ... down to 4 pixels.

        Raises ValueError unless `image_size` is 4 times a power of two.
        """
        levels = image_size.bit_length() - SMALLEST.bit_length()
        if levels < 0 or image_size != SMALLEST << levels:
            raise ValueError(f"the discriminator halves images down to {SMALLEST} pixels; {image_size} does not allow it")
        return tuple(min(self.channels << level, self.max_channels) for level in range(levels + 1))


def conv(features: int, size: int, name: str, dtype, bias: bool = True) -> nn.Conv:
    init = nn.initializers.xavier_uniform()
    return nn.Conv(features, (size, size), use_bias=bias, kernel_init=init, dtype=dtype, name=name)


def dense(features: int, name: str, dtype) -> nn.Dense:
    return nn.Dense(features, kernel_init=nn.initializers.xavier_uniform(), dtype=dtype, name=name)


def activate(features):
    return nn.leaky_relu(features, 0.2)


def blur_half(features, axis: int):
    """Filter with [1,3,3,1]/8 along `axis` (zeros outside) and keep every second value; the length must be even."""
    padding = [(1, 1) if dimension == axis else (0, 0) for dimension in range(features.ndim)]
    shape = features.shape
    padded = jnp.pad(features, padding)
    pairs = padded.reshape(*shape[:axis], shape[axis] // 2 + 1, 2, *shape[axis + 1 :])
    even, odd = jnp.moveaxis(pairs, axis + 1, 0)
    count = shape[axis] // 2
    here = even + 3 * odd
    there = 3 * even + odd
    return (jax.lax.slice_in_dim(here, 0, count, axis=axis) + jax.lax.slice_in_dim(there, 1, count + 1, axis=axis)) / 8


def blur_pool(features):
    """Halve the resolution without aliasing: [B,H,W,C] -> [B,H/2,W/2,C] (Zhang, arXiv:1904.11486).

    Shifted sums and not a depthwise convolution: the gradient penalty differentiates this twice.
    """
    return blur_half(blur_half(features, 1), 2)


class Block(nn.Module):
    """Residual block that halves the resolution."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, inputs):
        hidden = activate(conv(inputs.shape[-1], 3, "conv1", self.dtype)(inputs))
        hidden = activate(conv(self.features, 3, "conv2", self.dtype)(blur_pool(hidden)))
        shortcut = conv(self.features, 1, "shortcut", self.dtype, bias=False)(blur_pool(inputs))
        return (shortcut + hidden) / math.sqrt(2)


class Discriminator(nn.Module):
    """Tells real images from reconstructions. No normalisation and no minibatch statistics: images do not interact."""

    config: Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, image):
        """`image` [B,H,H,3], about [0,1] -> logits float32 [B], large for real.

        Raises ValueError unless H is 4 times a power of two.
        """
        widths = self.config.widths(image.shape[1])
        hidden = activate(conv(widths[0], 3, "conv_in", self.dtype)(image))
        for level, width in enumerate(widths[1:]):
            hidden = Block(width, self.dtype, name=f"block_{level}")(hidden)
        hidden = activate(conv(widths[-1], 3, "conv_out", self.dtype)(hidden))
        hidden = activate(dense(widths[-1], "dense_hidden", self.dtype)(hidden.reshape(len(hidden), -1)))
        return dense(1, "dense_out", self.dtype)(hidden)[:, 0].astype(jnp.float32)


def init(net: Discriminator, rng, image_size: int):
    """Parameters of `net` for images of `image_size` pixels; pure."""
    return net.init(rng, jnp.zeros((1, image_size, image_size, 3)))["params"]

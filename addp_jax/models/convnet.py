"""A small plain convolutional classifier; its pooled features also serve distances between sets of images."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange, reduce

from addp_jax import schema

GROUP_NORM_EPS = 1e-6
LAYOUT = (
    (r".*conv_\w+/kernel", ("replicated",) * 4),
    (r".*dense_out/kernel", ("replicated", "replicated")),
    (r".*(bias|scale)", ("replicated",)),
)


@schema.config
class Config:
    """Each entry of `multipliers` is a resolution level; between them the image shrinks by 2, odd rows dropped."""

    image_size: int = schema.field(64, least=1, tiny=16)  # pixels
    patch_size: int = schema.field(2, least=1)  # pixels that the first convolution reads as one
    channels: int = schema.field(16, least=1, tiny=8)  # of the first level
    multipliers: tuple[int, ...] = schema.field((1, 2, 4, 4), least=1, tiny=(1, 2))  # of the channels, per level
    num_groups: int = schema.field(8, least=1, tiny=4)  # of every GroupNorm
    num_classes: int = schema.field(8, least=1)  # C

    def __post_init__(self):
        shrinks = self.patch_size * 2 ** (len(self.multipliers) - 1)
        if self.image_size % self.patch_size or self.image_size < shrinks:
            raise ValueError(
                f"image_size: {self.image_size} must be a multiple of patch_size = {self.patch_size} and at least {shrinks}, "
                f"by which patch_size and {len(self.multipliers)} multipliers shrink it",
            )
        for multiplier in self.multipliers:
            if self.channels * multiplier % self.num_groups:
                raise ValueError(f"num_groups: {self.num_groups} does not divide {self.channels} x {multiplier} channels")


class Trunk(nn.Module):
    """Image [B,H,W,3] in [0,1] -> features [B,D]: two 3x3 convolutions per level, then the mean over the last grid."""

    config: Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, image):
        config, p = self.config, self.config.patch_size
        # Pixels folded into channels and a reshaped maximum: strided convolutions and pooling windows are slow on CPUs.
        hidden = rearrange((2 * image - 1).astype(self.dtype), "b (h p) (w q) c -> b h w (p q c)", p=p, q=p)
        for level, multiplier in enumerate(config.multipliers):
            if level:
                even = hidden.shape[1] // 2 * 2
                hidden = reduce(hidden[:, :even, :even], "b (h p) (w q) c -> b h w c", "max", p=2, q=2)
            for index in range(2):
                hidden = self._layer(hidden, config.channels * multiplier, f"{level}_{index}")
        return hidden.astype(jnp.float32).mean((1, 2))

    def _layer(self, hidden, channels: int, name: str):
        he = nn.initializers.he_normal()
        hidden = nn.Conv(channels, (3, 3), use_bias=False, kernel_init=he, dtype=self.dtype, name=f"conv_{name}")(hidden)
        norm = nn.GroupNorm(
            self.config.num_groups, epsilon=GROUP_NORM_EPS, use_fast_variance=False, dtype=self.dtype, name=f"norm_{name}"
        )
        return nn.relu(norm(hidden))


class ConvNet(nn.Module):
    """Classifier of images."""

    config: Config
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.trunk = Trunk(self.config, self.dtype)
        self.dense_out = nn.Dense(self.config.num_classes)

    def __call__(self, image):
        """`image` [B,H,W,3] in [0,1] -> logits float32 [B,C]."""
        return self.dense_out(self.features(image))

    def features(self, image):
        """`image` [B,H,W,3] in [0,1] -> what the classes are read off, float32 [B,D]; D = channels x last multiplier."""
        return self.trunk(image)


def init(net: ConvNet, rng):
    """Parameters of `net`; pure."""
    size = net.config.image_size
    return net.init(rng, jnp.zeros((1, size, size, 3)))["params"]

"""The tokenizer: MaskGIT's convolutional VQGAN. Images in [0,1] <-> a grid of codebook entries."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from addp_jax import codecs, partition, schema
from addp_jax.ops import winograd

GROUP_NORM_EPS = 1e-6
LAYOUT = (
    (r".*codebook", ("vocab", "replicated")),
    (r".*(conv\w*|shortcut|upsample_\d+)/kernel", ("replicated",) * 4),
    (r".*(bias|scale)", ("replicated",)),
)


@schema.config
class Config(codecs.Config):
    """Each entry of `multipliers` is a resolution level; between levels the image shrinks by 2. MaskGIT's sizes."""

    channels: int = schema.field(128, least=1, tiny=8)  # at full resolution
    multipliers: tuple[int, ...] = schema.field((1, 1, 2, 2, 4), least=1, tiny=(1, 2, 2))  # of the channels, per level
    num_res_blocks: int = schema.field(2, least=0, tiny=1)  # per level
    code_width: int = schema.field(256, least=1, tiny=8)  # Z
    num_groups: int = schema.field(32, least=1, tiny=4)  # of every GroupNorm
    codebook_scale: float = schema.field(1.0, above=0, matters=schema.TRAINING)  # variance of the initial codes, times K; a larger one leaves fewer codes in use
    name: str = "vqgan"

    def __post_init__(self):
        if self.image_size % self.patch_size:
            pixels = f"{self.patch_size}, the pixels per token of {len(self.multipliers)} multipliers"
            raise ValueError(f"image_size: {self.image_size} is not a multiple of {pixels}")
        for multiplier in self.multipliers:
            if self.channels * multiplier % self.num_groups:
                raise ValueError(f"num_groups: {self.num_groups} does not divide {self.channels} x {multiplier} channels")

    @property
    def patch_size(self) -> int:
        return 2 ** (len(self.multipliers) - 1)


def conv(features: int, size: int, bias: bool, name: str, dtype) -> nn.Conv:
    return nn.Conv(features, (size, size), use_bias=bias, dtype=dtype, name=name, conv_general_dilated=winograd.fast_convolve)


class GroupNorm(nn.Module):
    """Group normalisation that sums each channel over space first, then channels into groups.

    The same result as flax's, whose reduction over (space, channels of a group) is several times slower on CPUs.
    """

    groups: int

    @nn.compact
    def __call__(self, features):
        """[B,H,W,C] -> float32 [B,H,W,C]."""
        batch, height, width, channels = features.shape
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        flat = features.astype(jnp.float32).reshape(batch, height * width, channels)

        def group_mean(per_channel):
            means = per_channel.reshape(batch, self.groups, -1).mean(-1) / (height * width)
            return jnp.repeat(means, channels // self.groups, axis=1)[:, None]

        centred = flat - group_mean(flat.sum(1))
        factor = jax.lax.rsqrt(group_mean((centred**2).sum(1)) + GROUP_NORM_EPS) * scale[None, None]
        return (centred * factor + bias[None, None]).reshape(features.shape)


class NormSwish(nn.Module):
    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, features):
        return nn.swish(GroupNorm(self.groups, name="norm")(features)).astype(self.dtype)


class ResBlock(nn.Module):
    """Two 3x3 convolutions. Where the width changes, the shortcut acts on the block's *output*.

    So it is in MaskGIT's code and in all weights trained with it: the input does not reach the sum there.
    """

    features: int
    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, inputs):
        hidden = NormSwish(self.groups, self.dtype, name="norm1")(inputs)
        hidden = conv(self.features, 3, False, "conv1", self.dtype)(hidden)
        hidden = NormSwish(self.groups, self.dtype, name="norm2")(hidden)
        hidden = conv(self.features, 3, False, "conv2", self.dtype)(hidden)
        if inputs.shape[-1] != self.features:
            inputs = conv(self.features, 1, False, "shortcut", self.dtype)(hidden)
        return inputs + hidden


# Which of a 3x3 kernel's three rows (or columns) meet the first and which the second of the two small pixels under
# it, for an output pixel in an even and in an odd place.
TAPS = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float32)


class Upsample(nn.Module):
    """Each pixel becomes 2x2, then a 3x3 convolution; its parameters are that convolution's.

    The kernel sees only 2x2 different pixels, so the four outputs of a pixel are four 2x2 convolutions of the small
    image: 2.25 times less work than convolving the large one.
    """

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, inputs):
        """[B,H,W,C] -> [B,2H,2W,features]."""
        batch, height, width, channels = inputs.shape
        kernel = self.param("kernel", nn.linear.default_kernel_init, (3, 3, channels, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        folded = jnp.einsum("asy,btx,yxcf->stcabf", TAPS, TAPS, kernel, precision=jax.lax.Precision.HIGHEST)
        folded = folded.reshape(2, 2, channels, -1).astype(self.dtype)
        out = jax.lax.conv_general_dilated(
            inputs.astype(self.dtype), folded, (1, 1), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
        ).reshape(batch, height + 1, width + 1, 2, 2, self.features)
        even, odd = (
            jnp.stack([out[:, row : row + height, column : column + width, row, column] for column in (0, 1)], axis=3)
            for row in (0, 1)
        )
        out = jnp.stack([even, odd], axis=2).reshape(batch, 2 * height, 2 * width, self.features)
        return out + bias[None, None, None].astype(self.dtype)


class Encoder(nn.Module):
    """Image [B,H,W,3] -> features [B,h,w,Z]; 2x2 average pooling between levels."""

    config: Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, image):
        config = self.config
        hidden = conv(config.channels, 3, False, "conv_in", self.dtype)(image)
        for level, multiplier in enumerate(config.multipliers):
            if level:
                hidden = nn.avg_pool(hidden, (2, 2), (2, 2))
            for index in range(config.num_res_blocks):
                name = f"down_{level}_{index}"
                hidden = ResBlock(config.channels * multiplier, config.num_groups, self.dtype, name=name)(hidden)
        for index in range(2):
            hidden = ResBlock(hidden.shape[-1], config.num_groups, self.dtype, name=f"mid_{index}")(hidden)
        hidden = NormSwish(config.num_groups, self.dtype, name="norm_out")(hidden)
        return conv(config.code_width, 1, True, "conv_out", self.dtype)(hidden)


class Decoder(nn.Module):
    """Latents [B,h,w,Z] -> image [B,H,W,3]; nearest upsampling and a convolution between levels."""

    config: Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, latents):
        config = self.config
        top = len(config.multipliers) - 1
        hidden = conv(config.channels * config.multipliers[top], 3, True, "conv_in", self.dtype)(latents)
        for index in range(2):
            hidden = ResBlock(hidden.shape[-1], config.num_groups, self.dtype, name=f"mid_{index}")(hidden)
        for level in range(top, -1, -1):
            features = config.channels * config.multipliers[level]
            for index in range(config.num_res_blocks):
                hidden = ResBlock(features, config.num_groups, self.dtype, name=f"up_{level}_{index}")(hidden)
            if level:
                hidden = Upsample(features, self.dtype, name=f"upsample_{level}")(hidden)
        hidden = NormSwish(config.num_groups, self.dtype, name="norm_out")(hidden)
        return conv(3, 3, True, "conv_out", self.dtype)(hidden)


class Tokenizer(nn.Module):
    """Vector-quantised autoencoder."""

    config: Config
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        config = self.config
        self.encoder = Encoder(config, self.dtype)
        self.decoder = Decoder(config, self.dtype)
        init = nn.initializers.variance_scaling(config.codebook_scale, "fan_in", "uniform")
        self.codebook = self.param("codebook", init, (config.num_codes, config.code_width))

    def __call__(self, image):
        """Reconstruction [B,H,W,3], unclipped; touches every parameter (for `init`)."""
        token_ids = self.encode(image)
        return self.decode(self.lookup(token_ids))

    def features(self, image):
        """`image` [B,H,W,3] in [0,1] -> features before quantisation, float32 [B,L,Z] in raster order."""
        return rearrange(self.encoder(image).astype(jnp.float32), "b h w z -> b (h w) z")

    def encode(self, image):
        """`image` [B,H,W,3] in [0,1] -> nearest codes, int32 [B,L] in raster order."""
        return jnp.argmin(self.distances(self.features(image)), axis=-1).astype(jnp.int32)

    def distances(self, features):
        """Squared distance of `features` [B,L,Z] to every code, float32 [B,L,K] at full precision (ids flip otherwise)."""
        codebook = self.codebook.astype(jnp.float32)
        cross = jnp.einsum("blz,kz->blk", features, codebook, precision=jax.lax.Precision.HIGHEST)
        return (features**2).sum(-1, keepdims=True) + (codebook**2).sum(-1)[None, None] - 2 * cross

    def lookup(self, token_ids):
        """`token_ids` int32 [B,L] -> codes [B,L,Z]."""
        return jnp.asarray(self.codebook)[token_ids]

    def decode(self, latents):
        """`latents` [B,L,Z] in raster order -> image float32 [B,H,W,3], about [0,1] but not clipped."""
        grid = rearrange(latents.astype(self.dtype), "b (h w) z -> b h w z", h=self.config.grid)
        return self.decoder(grid).astype(jnp.float32)


def codec(net: Tokenizer, params) -> codecs.Codec:
    """`net` with its parameters."""

    def bound(method):
        return lambda batch: partition.one_by_one(lambda part: net.apply({"params": params}, part, method=method), batch)

    return codecs.Codec(bound(net.encode), bound(net.decode), params["codebook"])


def init(net: Tokenizer, rng):
    """Parameters of `net`; pure."""
    size = net.config.image_size
    return net.init(rng, jnp.zeros((1, size, size, 3)))["params"]



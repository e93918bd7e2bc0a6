"""Mask R-CNN on the simple feature pyramid, as ViTDet has it: the heads, and all networks together.

The heads see arrays of fixed sizes only. What lies between them (anchors, proposals, pooling, losses) is no network.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from addp_jax import schema
from addp_jax.models import layers, vit, vitdet

ASPECT_RATIOS = 3  # anchors of a cell
BOX_POOL, MASK_POOL = 7, 14  # side of a region's features
MSRA = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
LAYOUT = (
    (r".*/conv_\d/kernel", ("replicated", "replicated", "replicated", "channels")),
    (r".*/fc/kernel", ("width", "replicated")),
    (r".*/(logits|deltas)/kernel", ("replicated", "replicated")),
    *vitdet.LAYOUT,
)


@schema.config
class Config:
    """A detector of boxes and masks."""

    encoder: vitdet.Config = vitdet.Config()
    channels: int = schema.field(256, least=1, tiny=8)  # of the pyramid and of the heads' convolutions
    box_width: int = schema.field(1024, least=1, tiny=16)  # of the box head's hidden layer
    num_classes: int = schema.field(80, least=1)  # C


def normal(std: float):
    return nn.initializers.normal(std)


def conv3(channels: int, name: str, dtype, use_bias: bool, kernel_init=MSRA) -> nn.Conv:
    return nn.Conv(channels, (3, 3), use_bias=use_bias, kernel_init=kernel_init, dtype=dtype, name=name)


def output(features: int, name: str, std: float) -> nn.Dense:
    """In float32: scores in bfloat16 would be equal too often to be put in order."""
    return nn.Dense(features, kernel_init=normal(std), dtype=jnp.float32, name=name)


class RpnHead(nn.Module):
    """How much each anchor of a level looks like an object, and the box that it should be."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, features):
        """`features` [B,h,w,channels] of one level -> logits float32 [B,A], deltas float32 [B,A,4].

        A = h * w * 3: rows, then columns, then aspect ratios.
        """
        hidden, channels = features, features.shape[-1]
        for index in range(2):
            hidden = nn.relu(conv3(channels, f"conv_{index}", self.dtype, True, normal(0.01))(hidden))
        logits = output(ASPECT_RATIOS, "logits", 0.01)(hidden)
        deltas = output(4 * ASPECT_RATIOS, "deltas", 0.01)(hidden)
        return logits.reshape(len(logits), -1), deltas.reshape(len(deltas), -1, 4)


class Convs(nn.Module):
    """Four convolutions, each with a LayerNorm over channels and a ReLU."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, features):
        for index in range(4):
            features = conv3(features.shape[-1], f"conv_{index}", self.dtype, False)(features)
            features = nn.relu(layers.layer_norm(f"norm_{index}", dtype=self.dtype)(features))
        return features


class BoxHead(nn.Module):
    """Class and box of a region."""

    width: int
    num_classes: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, features):
        """`features` [R,7,7,channels] -> float32 logits [R,C+1], background last, and deltas of each class [R,C,4]."""
        hidden = Convs(self.dtype, name="convs")(features)
        uniform = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
        hidden = layers.dense(self.width, "fc", self.dtype, uniform)(hidden.reshape(len(hidden), -1))
        hidden = nn.relu(hidden)
        deltas = output(4 * self.num_classes, "deltas", 0.001)(hidden)
        return output(self.num_classes + 1, "logits", 0.01)(hidden), deltas.reshape(len(deltas), -1, 4)


def up_conv_normal(key, shape, dtype=jnp.float32):
    """As `MSRA`, whose fan of a transposed convolution counts the inputs."""
    return jax.random.normal(key, shape, dtype) * (2 / (4 * shape[-2])) ** 0.5


class MaskHead(nn.Module):
    """Mask of a region for each class."""

    num_classes: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, features):
        """`features` [R,14,14,channels] -> logits float32 [R,28,28,C]; see `of_class`."""
        hidden = Convs(self.dtype, name="convs")(features)
        up = vitdet.UpConv(hidden.shape[-1], self.dtype, up_conv_normal, nn.initializers.zeros, name="up")
        return output(self.num_classes, "logits", 0.001)(nn.relu(up(hidden)))


def of_class(values, classes):
    """`values` [R,...,C], `classes` int32 [R] -> [R,...]: those of each region's class; a class below 0 counts as 0."""
    index = jnp.maximum(classes, 0).reshape(-1, *[1] * (values.ndim - 1))
    return jnp.take_along_axis(values, jnp.broadcast_to(index, (*values.shape[:-1], 1)), axis=-1)[..., 0]


class Detector(nn.Module):
    """All networks of a detector; its methods are called in the order in which they stand here."""

    config: Config
    dtype: jnp.dtype = jnp.float32
    num_codes: int = 0  # see `vit.Embedding`

    def setup(self):
        config = self.config
        self.encoder = vitdet.Encoder(config.encoder, self.dtype, self.num_codes)
        self.pyramid = vitdet.Pyramid(config.channels, self.dtype)
        self.rpn = RpnHead(self.dtype)
        self.box = BoxHead(config.box_width, config.num_classes, self.dtype)
        self.mask = MaskHead(config.num_classes, self.dtype)

    def features(self, image, size=None, train: bool = False):
        """`image` [B,H,W,3] in [0,1], `size` int32 [B,2] -> tuple of the pyramid's levels; see `vitdet.Encoder`."""
        return self.pyramid(self.encoder(image, size, train))

    def propose(self, levels):
        """-> tuple of (logits float32 [B,A], deltas float32 [B,A,4]), one for each level."""
        return tuple(self.rpn(level) for level in levels)

    def boxes(self, regions):
        """See `BoxHead`."""
        return self.box(regions)

    def masks(self, regions):
        """See `MaskHead`."""
        return self.mask(regions)


def init(net: Detector, rng):
    """Parameters of `net`; pure."""
    channels = net.config.channels

    def all_networks(net, image):
        net.propose(net.features(image))
        net.boxes(jnp.zeros((1, BOX_POOL, BOX_POOL, channels)))
        net.masks(jnp.zeros((1, MASK_POOL, MASK_POOL, channels)))

    return net.init(rng, vit.blank(net.config.encoder, net.num_codes), method=all_networks)["params"]

"""UperNet on a vision transformer, as mmsegmentation has it: a pyramid of the encoder's taps, the head, and a second
head that training alone needs."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from addp_jax import partition, schema
from addp_jax.models import batch_norm, beit, detector, vit, vitdet
from addp_jax.models.dropout import Dropout
from addp_jax.ops import resize

POOLS = (1, 2, 3, 6)  # sides of the grids of the pyramid of means
LAYOUT = (
    (r".*/((neck|head)/\w+|auxiliary)/kernel", ("replicated", "replicated", "replicated", "channels")),
    (r".*classifier/logits/kernel", ("replicated", "replicated")),
    *batch_norm.LAYOUT,
    *beit.LAYOUT,
)


@schema.config
class Config:
    """A segmenter. mmsegmentation's heads are as wide as the encoder."""

    encoder: beit.Config = beit.Config()
    channels: int = schema.field(768, least=1, tiny=8)  # of the head
    auxiliary_channels: int = schema.field(256, least=1, tiny=8)  # of the second head
    num_classes: int = schema.field(150, least=1)  # C
    dropout: float = schema.field(0.1, least=0, below=1, matters=schema.TRAINING)  # of whole channels
    # Deviation of the logits' weights at the start. Few channels want more: through these weights the gradient passes.
    logits_std: float = schema.field(0.01, above=0, matters=schema.TRAINING)


class ConvNorm(nn.Module):
    """Convolution without a bias, BatchNorm, ReLU."""

    channels: int
    size: int  # 1 or 3: side of the kernel
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, features, train: bool, smaller=()):
        """`features` [B,h,w,D] -> [B,h,w,channels].

        smaller: maps [B,.,.,.] to be enlarged to h x w and to stand behind the channels of `features`; for size 3.
        """
        depths = [level.shape[-1] for level in (features, *smaller)]
        kernel = self.param("kernel", detector.MSRA, (self.size, self.size, sum(depths), self.channels))
        kernel = partition.replicate(kernel.astype(self.dtype))  # else the smaller maps are gathered, not the kernel
        first, *others = jnp.split(kernel, [sum(depths[:i]) for i in range(1, len(depths))], axis=2)
        if self.size == 1:
            hidden = features @ first[0, 0]
        else:
            hidden = resize.conv3(features, first)
        for level, part in zip(smaller, others):
            hidden += resize.enlarged_conv3(level, part, features.shape[1:3])
        hidden = nn.relu(batch_norm.BatchNorm(self.dtype, name="norm")(hidden, train))
        return partition.constrain(hidden, "batch", None, None, "embed")


class Neck(nn.Module):
    """Feature maps of four sizes out of four taps of one size."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, taps, train: bool):
        """`taps`: four [B,h,w,D] -> four [B,.,.,D]: 4, 2, 1 and 1/2 times h and w."""
        up = lambda name: vitdet.UpConv(taps[0].shape[-1], self.dtype, name=name)
        double = batch_norm.BatchNorm(self.dtype, name="up4_norm")(up("up4_0")(taps[0]), train)
        quadruple = up("up4_1")(jax.nn.gelu(double, approximate=False))
        return quadruple, up("up2")(taps[1]), taps[2], vitdet.half(taps[3])


class UperHead(nn.Module):
    """Features at the first level's size from all levels: pooled means below, then from level to level upwards."""

    channels: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, levels, train: bool):
        """`levels`: four [B,.,.,D], the largest first -> [B,H,W,channels] of the size of the first."""
        conv = lambda name, size: ConvNorm(self.channels, size, self.dtype, name=name)
        *large, last = levels
        pools = [conv(f"pool_{side}", 1)(resize.adaptive_mean(last, side), train) for side in POOLS]
        below = conv("bottleneck", 3)(last, train, pools)
        merged = [below]
        for index in range(len(large) - 1, -1, -1):
            lateral = conv(f"lateral_{index}", 1)(large[index], train)
            below = lateral + resize.bilinear(below, lateral.shape[1:3])
            merged.insert(0, conv(f"smooth_{index}", 3)(below, train))
        return conv("fusion", 3)(merged[0], train, merged[1:])


class Classifier(nn.Module):
    """Logits of each cell; in training whole channels are dropped first."""

    num_classes: int
    dropout: float
    std: float  # of the weights at the start

    @nn.compact
    def __call__(self, features, train: bool):
        """[B,h,w,channels] -> float32 [B,h,w,C]."""
        channels = jnp.ones((len(features), 1, 1, features.shape[-1]), features.dtype)
        features = features * Dropout(self.dropout)(channels, train)
        return detector.output(self.num_classes, "logits", self.std)(features)


class Segmenter(nn.Module):
    """All networks of a segmenter."""

    config: Config
    dtype: jnp.dtype = jnp.float32
    num_codes: int = 0  # see `vit.Embedding`

    def setup(self):
        config = self.config
        self.encoder = beit.Encoder(config.encoder, self.dtype, self.num_codes)
        self.neck = Neck(self.dtype)
        self.head = UperHead(config.channels, self.dtype)
        self.auxiliary = ConvNorm(config.auxiliary_channels, 3, self.dtype)
        self.classifier = Classifier(config.num_classes, config.dropout, config.logits_std)
        self.auxiliary_classifier = Classifier(config.num_classes, config.dropout, config.logits_std)

    def __call__(self, image, size=None, train: bool = False):
        """`image` [B,S,S,3] in [0,1], `size` int32 [B,2] or None, see `beit.Encoder` -> see `from_taps`."""
        return self.from_taps(self.encoder(image, size, train), train)

    def from_taps(self, taps, train: bool = False):
        """Four [B,h,w,D] -> logits float32 [B,4h,4w,C] and those of the second head, float32 [B,h,w,C]."""
        levels = self.neck(taps, train)
        logits = self.classifier(self.head(levels, train), train)
        return logits, self.auxiliary_classifier(self.auxiliary(levels[2], train), train)

    def logits(self, image, size=None):
        """`image` [B,S,S,3] in [0,1] -> logits float32 [B,S/4,S/4,C] for patches of 16, by the running statistics."""
        return self.classifier(self.head(self.neck(self.encoder(image, size), False), False), False)


def init(net: Segmenter, rng):
    """Parameters of `net`, the running statistics among them; pure."""
    return net.init(rng, vit.blank(net.config.encoder, net.num_codes))["params"]


def training_logits(net: Segmenter, params, image, size, rng):
    """`((logits, logits of the second head), statistics)`: see `Segmenter`, and the new values of the running ones.

    rng: of dropout and dropped paths. The statistics are a part of the tree of `params`.
    """
    rngs = {"dropout": rng}
    logits, measured = net.apply({"params": params}, image, size, True, rngs=rngs, mutable=[batch_norm.COLLECTION])
    return logits, measured[batch_norm.COLLECTION]

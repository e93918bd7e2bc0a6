"""Inception-v3 as FID uses it: the TensorFlow graph of 2015-12-05 with its 1008 classes.

It differs from the Inception-v3 of the model zoos in three ways, all of which the weights expect: average pooling
leaves the padding out of its count, the last block pools by maximum, and images are resized to 299 pixels by
TensorFlow 1's bilinear rule (no half-pixel offset, no antialiasing), as torch-fidelity and ADM's evaluator do.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

IMAGE_SIZE = 299  # pixels, after the resize
NUM_CLASSES = 1008
BATCH_NORM_EPS = 1e-3
SPATIAL_CHANNELS = 7  # of the 17x17 map that sFID looks at (ADM's evaluator)


class Inception(nn.Module):
    """The network without its training-only parts; batch norms are folded into the convolutions."""

    @nn.compact
    def __call__(self, image):
        """`image` [B,H,W,3] in 0..255 -> float32 features by name.

        pool [B,2048]: for FID, KID, precision and recall. logits [B,1008]: without their bias, for IS (as
        torch-fidelity and ADM's evaluator). spatial [B,2023]: 7 channels of a 17x17 map, rows first, for sFID.
        """
        hidden = (resize(image.astype(jnp.float32), IMAGE_SIZE) - 128) / 128
        hidden = conv(32, 3, "Conv2d_1a_3x3", stride=2, padding="VALID")(hidden)
        hidden = conv(32, 3, "Conv2d_2a_3x3", padding="VALID")(hidden)
        hidden = conv(64, 3, "Conv2d_2b_3x3")(hidden)
        hidden = conv(80, 1, "Conv2d_3b_1x1")(shrink(hidden))
        hidden = shrink(conv(192, 3, "Conv2d_4a_3x3", padding="VALID")(hidden))
        for name, pooled in (("5b", 32), ("5c", 64), ("5d", 64)):
            hidden = Grid35(pooled, name=f"Mixed_{name}")(hidden)
        hidden = Shrink35(name="Mixed_6a")(hidden)
        for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            hidden, first = Grid17(width, name=f"Mixed_{name}")(hidden)
            if name == "6d":
                spatial = first[..., :SPATIAL_CHANNELS].reshape(len(first), -1)
        hidden = Shrink17(name="Mixed_7a")(hidden)
        hidden = Grid8(average, name="Mixed_7b")(hidden)
        hidden = Grid8(maximum, name="Mixed_7c")(hidden)
        pool = hidden.mean((1, 2))
        logits = nn.Dense(NUM_CLASSES, use_bias=False, precision="highest", name="fc")(pool)
        return {"pool": pool, "logits": logits, "spatial": spatial}


class Grid35(nn.Module):
    """Four branches on the 35x35 grid."""

    pooled: int  # channels of the pooling branch

    @nn.compact
    def __call__(self, hidden):
        narrow = conv(48, 1, "branch5x5_1")(hidden)
        deep = conv(96, 3, "branch3x3dbl_2")(conv(64, 1, "branch3x3dbl_1")(hidden))
        branches = [
            conv(64, 1, "branch1x1")(hidden),
            conv(64, 5, "branch5x5_2")(narrow),
            conv(96, 3, "branch3x3dbl_3")(deep),
            conv(self.pooled, 1, "branch_pool")(average(hidden)),
        ]
        return jnp.concatenate(branches, axis=-1)


class Shrink35(nn.Module):
    """35x35 -> 17x17."""

    @nn.compact
    def __call__(self, hidden):
        deep = conv(96, 3, "branch3x3dbl_2")(conv(64, 1, "branch3x3dbl_1")(hidden))
        branches = [
            conv(384, 3, "branch3x3", stride=2, padding="VALID")(hidden),
            conv(96, 3, "branch3x3dbl_3", stride=2, padding="VALID")(deep),
            shrink(hidden),
        ]
        return jnp.concatenate(branches, axis=-1)


class Grid17(nn.Module):
    """Four branches on the 17x17 grid; also gives the first one by itself."""

    width: int  # channels inside the branches of 7x1 and 1x7 convolutions

    @nn.compact
    def __call__(self, hidden):
        first = conv(192, 1, "branch1x1")(hidden)
        short = conv(self.width, 1, "branch7x7_1")(hidden)
        short = conv(self.width, (1, 7), "branch7x7_2")(short)
        long = conv(self.width, 1, "branch7x7dbl_1")(hidden)
        for index, shape in ((2, (7, 1)), (3, (1, 7)), (4, (7, 1))):
            long = conv(self.width, shape, f"branch7x7dbl_{index}")(long)
        branches = [
            first,
            conv(192, (7, 1), "branch7x7_3")(short),
            conv(192, (1, 7), "branch7x7dbl_5")(long),
            conv(192, 1, "branch_pool")(average(hidden)),
        ]
        return jnp.concatenate(branches, axis=-1), first


class Shrink17(nn.Module):
    """17x17 -> 8x8."""

    @nn.compact
    def __call__(self, hidden):
        deep = conv(192, 1, "branch7x7x3_1")(hidden)
        deep = conv(192, (7, 1), "branch7x7x3_3")(conv(192, (1, 7), "branch7x7x3_2")(deep))
        branches = [
            conv(320, 3, "branch3x3_2", stride=2, padding="VALID")(conv(192, 1, "branch3x3_1")(hidden)),
            conv(192, 3, "branch7x7x3_4", stride=2, padding="VALID")(deep),
            shrink(hidden),
        ]
        return jnp.concatenate(branches, axis=-1)


class Grid8(nn.Module):
    """Four branches on the 8x8 grid, two of them forked."""

    pool: callable  # of the pooling branch

    @nn.compact
    def __call__(self, hidden):
        short = conv(384, 1, "branch3x3_1")(hidden)
        long = conv(384, 3, "branch3x3dbl_2")(conv(448, 1, "branch3x3dbl_1")(hidden))
        branches = [
            conv(320, 1, "branch1x1")(hidden),
            conv(384, (1, 3), "branch3x3_2a")(short),
            conv(384, (3, 1), "branch3x3_2b")(short),
            conv(384, (1, 3), "branch3x3dbl_3a")(long),
            conv(384, (3, 1), "branch3x3dbl_3b")(long),
            conv(192, 1, "branch_pool")(self.pool(hidden)),
        ]
        return jnp.concatenate(branches, axis=-1)


def conv(features: int, shape, name: str, stride: int = 1, padding: str = "SAME"):
    """Convolution (float32 throughout) and ReLU."""
    shape = (shape, shape) if isinstance(shape, int) else shape
    layer = nn.Conv(features, shape, (stride, stride), padding, precision="highest", name=name)
    return lambda hidden: nn.relu(layer(hidden))


def shrink(hidden):
    return nn.max_pool(hidden, (3, 3), (2, 2))


def average(hidden):
    return nn.avg_pool(hidden, (3, 3), padding="SAME", count_include_pad=False)


def maximum(hidden):
    return nn.max_pool(hidden, (3, 3), padding="SAME")


def resize(image, size: int):
    """[B,H,W,C] -> [B,size,size,C]: TensorFlow 1's bilinear rule, pixel i of the result looks at i * H / size."""
    for axis in (1, 2):
        count = image.shape[axis]
        place = np.arange(size, dtype=np.float32) * np.float32(count / size)
        low = place.astype(np.int32)
        share = (place - low).reshape([-1 if dimension == axis else 1 for dimension in range(4)])
        below, above = (jnp.take(image, index, axis) for index in (low, np.minimum(low + 1, count - 1)))
        image = below + (above - below) * share
    return image


def init(rng):
    """Parameters of `Inception`; pure."""
    return Inception().init(rng, jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3)))["params"]

"""A perceptual distance between images: how far apart VGG16's features are.

How it differs from the distance MaskGIT's tokenizer was trained with: MaskGIT takes an ImageNet ResNet-50 on images
resized to 224 pixels and the mean squared difference of its last feature map alone. Here the features of all five
stages of VGG16 are compared at the image's own size, as unit vectors along the channels (LPIPS, arXiv:1801.03924,
without its learned channel weights). The two have different scales: MaskGIT's loss weight does not carry over.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

# Of each stage: its width, and the index N of its convolutions in torchvision's `features.N`.
STAGES = ((64, (0, 2)), (128, (5, 7)), (256, (10, 12, 14)), (512, (17, 19, 21)), (512, (24, 26, 28)))
MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB in [0,1]
STD = (0.229, 0.224, 0.225)
UNIT_EPS = 1e-10  # LPIPS' own
SMALLEST_IMAGE = 16  # pixels: four poolings


class Vgg16(nn.Module):
    """The convolutions of VGG16."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, image):
        """`image` [B,H,W,3] in [0,1], H and W at least 16 -> features after the last ReLU of each of the 5 stages."""
        mean, std = (jnp.asarray(values, jnp.float32)[None, None, None] for values in (MEAN, STD))
        hidden, stages = (image - mean) / std, []
        for width, indices in STAGES:
            if stages:
                hidden = nn.max_pool(hidden, (2, 2), (2, 2))
            for index in indices:
                hidden = nn.relu(nn.Conv(width, (3, 3), dtype=self.dtype, name=f"conv{index}")(hidden))
            stages.append(hidden)
        return stages


def distance(params, image, other, dtype=jnp.float32):
    """Perceptual distance of two batches [B,H,W,3] in [0,1] -> float32 [B], 0 (equal) to 2.

    Mean over the stages and places of the squared difference of the channel vectors, each scaled to length one.
    """
    stages = [gap.sum(-1).mean((1, 2)) for gap in squared_gaps(params, image, other, dtype)]
    return sum(stages) / len(stages)


def lpips(params, channel_weights, image, other):
    """LPIPS (arXiv:1801.03924, version 0.1, VGG16) of two batches [B,H,W,3] in [0,1] -> float32 [B].

    channel_weights: of `torch_nets.lpips_weights`. The sum over the stages of the mean over the places.
    """
    gaps = squared_gaps(params, image, other, jnp.float32)
    return sum((gap @ weights).mean((1, 2)) for gap, weights in zip(gaps, channel_weights, strict=True))


def squared_gaps(params, image, other, dtype):
    """Of each stage, the squared differences [B,h,w,C] of the channel vectors, each scaled to length one."""
    net = Vgg16(dtype)

    def unit(features):
        features = features.astype(jnp.float32)
        return features / jnp.sqrt((features**2).sum(-1, keepdims=True) + UNIT_EPS)

    pairs = zip(net.apply({"params": params}, image), net.apply({"params": params}, other))
    return [(unit(one) - unit(two)) ** 2 for one, two in pairs]

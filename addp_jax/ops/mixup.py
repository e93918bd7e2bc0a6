"""Mixup (arXiv:1710.09412) and CutMix (arXiv:1905.04899) of a batch with itself in reverse order, on the device.

One draw decides for the whole batch, as in timm's batch mode, which the release uses.

Departs from the release: its batch is what one GPU has, ours the global one, so that results do not depend on the
number of devices.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

SWITCH = 0.5  # chance of CutMix where both are on


def mix(rng, image, label, *, mixup: float, cutmix: float, smoothing: float, num_classes: int):
    """`image` float [B,H,W,3], `label` int [B] -> mixed images, targets float32 [B,C].

    mixup, cutmix: alpha of the Beta distribution of the kept share; 0 = off. smoothing: of the labels.
    """
    if not mixup and not cutmix:
        return image, targets(label, 1.0, smoothing, num_classes)
    switch_key, share_key, box_key = jax.random.split(rng, 3)
    cut = jax.random.uniform(switch_key) < SWITCH if mixup and cutmix else jnp.bool_(bool(cutmix))
    alpha = jnp.where(cut, cutmix, mixup)
    share = jax.random.beta(share_key, alpha, alpha)
    inside = box(box_key, share, *image.shape[1:3])
    kept = jnp.where(cut, jnp.where(inside, 0.0, 1.0), share)  # share of the first image at each pixel [H,W]
    share = jnp.where(cut, 1 - inside.mean(), share)
    return blend(image, kept), targets(label, share, smoothing, num_classes)


def blend(image, kept):
    """Each image [B,H,W,3] keeps `kept` [H,W] of itself; the rest is its partner, the batch in reverse order."""
    kept = kept[None, :, :, None].astype(image.dtype)
    return image * kept + image[::-1] * (1 - kept)


def box(rng, share, height: int, width: int):
    """bool [H,W], True inside a box of the image's proportions whose area is 1 - `share` of it.

    Its centre is uniform over the image, and what lies outside is cut off.
    """
    ratio = jnp.sqrt(1 - share)
    inside = []
    for key, size in zip(jax.random.split(rng), (height, width)):
        half = (size * ratio).astype(jnp.int32) // 2
        centre, places = jax.random.randint(key, (), 0, size), jnp.arange(size)
        inside.append((places >= centre - half) & (places < centre + half))
    return inside[0][:, None] & inside[1][None]


def targets(label, share, smoothing: float, num_classes: int):
    """Smoothed one-hot targets float32 [B,C]: `share` of an image's own label, the rest its partner's."""
    one_hot = jax.nn.one_hot(label, num_classes) * (1 - smoothing) + smoothing / num_classes
    return one_hot * share + one_hot[::-1] * (1 - share)

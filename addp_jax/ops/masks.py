"""Masks of objects: from an object's own box to a proposal's, and from a box into the image."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from addp_jax.ops import roi_align


def targets(masks: jax.Array, objects: jax.Array, boxes: jax.Array, *, size: int = 28) -> jax.Array:
    """Mask targets bool [R, size, size] in boxes [R, 4].

    masks: uint8 [R, n, n/8], packed bits of each object's mask in its own box `objects` [R, 4], sampled at n x n.
    They are resampled by ROIAlign and cut at 0.5, as detectron2 does with bitmasks.
    """
    return soft_targets(masks, objects, boxes, size=size) >= 0.5


def soft_targets(masks: jax.Array, objects: jax.Array, boxes: jax.Array, *, size: int = 28) -> jax.Array:
    """`targets` before the cut: float32 [R, size, size] in [0,1]."""
    bits = jnp.unpackbits(masks, axis=-1)
    side = jnp.maximum(objects[:, 2:] - objects[:, :2], 1e-6)  # padding has no area; its target is not used
    scale = bits.shape[-1] / jnp.concatenate([side, side], -1)
    corner = jnp.concatenate([objects[:, :2], objects[:, :2]], -1)
    return roi_align.align(bits, (boxes - corner) * scale, size)


def paste(masks: np.ndarray, boxes: np.ndarray, height: int, width: int, threshold: float = 0.5) -> np.ndarray:
    """Masks float [N, n, n] in boxes [N, 4] -> bool [N, height, width] of the image, True from `threshold` on.

    Bilinear between the mask's cells, sampled at the image's pixel centres, 0 beyond. On the host, one mask after the
    other, within its box only.
    """
    pasted = np.zeros((len(masks), height, width), bool)
    for image, mask, (x0, y0, x1, y1) in zip(pasted, masks, np.asarray(boxes, np.float32)):
        rows, row_weights = _interpolation(y0, y1, mask.shape[0], height)
        columns, column_weights = _interpolation(x0, x1, mask.shape[1], width)
        image[rows, columns] = row_weights @ np.asarray(mask, np.float32) @ column_weights.T >= threshold
    return pasted


def _interpolation(low, high, cells: int, pixels: int) -> tuple[slice, np.ndarray]:
    """The pixels of an axis that a mask of `cells` over [low, high) reaches, and weights [those pixels, cells]."""
    border = (high - low) / (2 * cells)  # the outer half of the first and last cell fades out beyond the box
    first = int(np.clip(np.floor(low - border), 0, pixels))
    last = int(np.clip(np.ceil(high + border), first, pixels))
    place = (np.arange(first, last, dtype=np.float32) + np.float32(0.5) - low) / (high - low) * cells - np.float32(0.5)
    distance = np.abs(place[:, None] - np.arange(cells, dtype=np.float32))
    return slice(first, last), np.maximum(1 - distance, 0)


def in_original(found, probs: np.ndarray, scale: np.ndarray, size: np.ndarray):
    """The detections of one image, in the image: boxes [N,4], scores [N], classes [N], masks bool [N,H,W].

    Args:
      found: `proposals.Detections` of the image, on the host.
      probs: [K,n,n], their masks.
      scale, size: see `to_original`.
    """
    boxes, inside = to_original(found.boxes, scale, size)
    keep = found.valid & inside
    boxes = boxes[keep]
    return boxes, found.scores[keep], found.classes[keep], paste(probs[keep], boxes, *size)


def to_original(boxes: np.ndarray, scale: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [N, 4] of the network's picture in the original image, cut to it, and bool [N]: which are not empty.

    scale: [2] network's picture / original, height and width. size: [2] height and width of the original.
    """
    scale, size = (np.asarray(pair, np.float32)[[1, 0, 1, 0]] for pair in (scale, size))
    moved = np.clip(np.asarray(boxes, np.float32) / scale, 0, size)
    return moved, (moved[:, 2] > moved[:, 0]) & (moved[:, 3] > moved[:, 1])

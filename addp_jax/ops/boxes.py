"""Boxes of detection: areas, overlaps, deltas between boxes, anchors. As in detectron2's ViTDet Mask R-CNN.

A box is float32 (x0, y0, x1, y1) in pixels; its ends are exclusive, so its width is x1 - x0. All arithmetic is float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Weights = tuple[float, float, float, float]
RPN_WEIGHTS: Weights = (1.0, 1.0, 1.0, 1.0)  # factors of the deltas (dx, dy, dw, dh)
ROI_WEIGHTS: Weights = (10.0, 10.0, 5.0, 5.0)
LARGEST_LOG = math.log(1000 / 16)  # of a decoded side over its source's, so that exp stays finite
ASPECT_RATIOS = (0.5, 1.0, 2.0)  # height / width


def area(boxes: jax.Array) -> jax.Array:
    """Boxes [..., 4] -> area in pixels [...]."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def nonempty(boxes: jax.Array) -> jax.Array:
    """Boxes [..., 4] -> bool [...], True where both sides are above 0."""
    return (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])


def clip(boxes: jax.Array, size: jax.Array) -> jax.Array:
    """Boxes [..., 4], cut to an image of `size` [2], its height and width without padding."""
    height, width = size[0].astype(jnp.float32), size[1].astype(jnp.float32)
    x0, y0, x1, y1 = (boxes[..., axis] for axis in range(4))
    x0, x1 = (jnp.clip(x, 0, width) for x in (x0, x1))
    y0, y1 = (jnp.clip(y, 0, height) for y in (y0, y1))
    return jnp.stack([x0, y0, x1, y1], -1)


def iou(first: jax.Array, second: jax.Array) -> jax.Array:
    """Boxes [N, 4] and [K, 4] -> intersection over union [N, K]; 0 where they do not overlap."""
    low = jnp.maximum(first[:, None, :2], second[None, :, :2])
    high = jnp.minimum(first[:, None, 2:], second[None, :, 2:])
    sides = jnp.maximum(high - low, 0)
    intersection = sides[..., 0] * sides[..., 1]
    union = area(first)[:, None] + area(second)[None] - intersection
    overlap = intersection > 0
    return jnp.where(overlap, intersection / jnp.where(overlap, union, 1), 0)


def _centres(boxes: jax.Array) -> tuple[jax.Array, ...]:
    """Boxes [..., 4] -> x and y of the centre, width, height, each [...]."""
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    return boxes[..., 0] + 0.5 * width, boxes[..., 1] + 0.5 * height, width, height


def encode(source: jax.Array, target: jax.Array, weights: Weights) -> jax.Array:
    """Deltas [..., 4] that turn boxes `source` [..., 4] (anchors, proposals) into `target` [..., 4].

    Boxes without area give deltas that are not finite; the caller masks them.
    """
    x, y, width, height = _centres(source)
    target_x, target_y, target_width, target_height = _centres(target)
    deltas = (
        (target_x - x) / width,
        (target_y - y) / height,
        jnp.log(target_width / width),
        jnp.log(target_height / height),
    )
    return jnp.stack([weight * delta for weight, delta in zip(weights, deltas)], -1)


def decode(source: jax.Array, deltas: jax.Array, weights: Weights) -> jax.Array:
    """Boxes [..., 4]: `source` [..., 4] moved and scaled by `deltas` [..., 4], which are computed in float32.

    A side grows by at most 1000/16. Leading axes broadcast: class-specific deltas [R, C, 4] take source [R, 1, 4].
    """
    x, y, width, height = _centres(source)
    dx, dy, dw, dh = (deltas[..., axis].astype(jnp.float32) / weight for axis, weight in enumerate(weights))
    x, y = dx * width + x, dy * height + y
    width = jnp.exp(jnp.minimum(dw, LARGEST_LOG)) * width
    height = jnp.exp(jnp.minimum(dh, LARGEST_LOG)) * height
    return jnp.stack([x - 0.5 * width, y - 0.5 * height, x + 0.5 * width, y + 0.5 * height], -1)


def cell_anchors(size: float, ratios: Sequence[float] = ASPECT_RATIOS) -> np.ndarray:
    """Anchors [ratios, 4] around the origin, each of area size^2. `size`: pixels; `ratios`: height / width."""
    width = np.sqrt(size**2 / np.asarray(ratios, np.float64))
    half = np.stack([width, np.asarray(ratios) * width], -1) / 2
    return np.concatenate([-half, half], -1).astype(np.float32)


def anchors(
    grids: Sequence[tuple[int, int]],
    strides: Sequence[int] = (4, 8, 16, 32, 64),
    sizes: Sequence[float] = (32, 64, 128, 256, 512),
    ratios: Sequence[float] = ASPECT_RATIOS,
) -> list[np.ndarray]:
    """Anchors of each level, float32 [h * w * ratios, 4]: rows, then columns, then ratios.

    grids: (h, w) of each level. sizes: square root of an anchor's area at each level. Cell (i, j) is centred on
    (stride * j, stride * i). Anchors beyond the image are kept.
    """
    levels = []
    for (rows, columns), stride, size in zip(grids, strides, sizes, strict=True):
        y, x = np.meshgrid(np.arange(rows) * stride, np.arange(columns) * stride, indexing="ij")
        shifts = np.stack([x, y, x, y], -1).astype(np.float32)
        levels.append((shifts[:, :, None] + cell_anchors(size, ratios)).reshape(-1, 4))
    return levels

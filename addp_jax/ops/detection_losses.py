"""The losses of Mask R-CNN, of one image; and the regions that the heads look at. As in detectron2.

All in float32 and of fixed shapes; padded objects and empty slots change nothing. Boxes get no gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from addp_jax.ops import boxes as boxes_lib
from addp_jax.ops import masks as masks_lib
from addp_jax.ops import matching, proposals


class Regions(NamedTuple):
    """The sampled regions of an image, positives first.

    `boxes` [R,4]; `valid` and `positive` bool [R]; `object` int32 [R], which object a region matches; `classes` int32
    [R], C = background.
    """

    boxes: jax.Array
    valid: jax.Array
    positive: jax.Array
    object: jax.Array
    classes: jax.Array


class Sums(NamedTuple):
    """Sums of losses over regions, and how many regions they are of; float32 scalars."""

    total: jax.Array
    count: jax.Array


def rpn(anchors, logits, deltas, objects, valid, priority, *, num: int) -> tuple[jax.Array, jax.Array]:
    """Objectness and box loss of `num` sampled anchors, each divided by `num` however many are found.

    Args:
      anchors, logits, deltas: [A,4], [A], [A,4] of all levels.
      objects, valid: [M,4], bool [M].
      priority: int32 [A], see `matching.sample`; at most half of the sample is positive.
    """
    match = matching.match_anchors(anchors, objects, valid)
    sample = matching.sample(match.label, priority, num=num, positive_fraction=0.5)
    logits = logits[sample.index].astype(jnp.float32)
    objectness = optax.sigmoid_binary_cross_entropy(logits, sample.positive.astype(jnp.float32))
    anchors = jnp.asarray(anchors)[sample.index]
    targets = jnp.where(sample.positive[:, None], objects[match.index[sample.index]], anchors)
    distance = jnp.abs(deltas[sample.index] - boxes_lib.encode(anchors, targets, boxes_lib.RPN_WEIGHTS))
    objectness = jnp.where(sample.valid, objectness, 0).sum()
    return objectness / num, jnp.where(sample.positive[:, None], distance, 0).sum() / num


def sample_regions(
    found: proposals.Proposals, objects, classes, priority, *, num: int, positive_fraction: float, background: int
) -> Regions:
    """`num` regions out of the proposals and the objects themselves.

    Args:
      objects, classes: [M,4], int32 [M], -1 = padding.
      priority: int32 [K+M], see `matching.sample`.
      background: the class C of regions that match no object.
    """
    is_object = classes >= 0
    boxes, valid = proposals.add_objects(found.boxes, found.valid, objects, is_object)
    match = matching.match_proposals(boxes, valid, objects, is_object)
    sample = matching.sample(match.label, priority, num=num, positive_fraction=positive_fraction)
    index = match.index[sample.index]
    boxes = jnp.where(sample.valid[:, None], boxes[sample.index], 0)
    return Regions(boxes, sample.valid, sample.positive, index, jnp.where(sample.positive, classes[index], background))


def boxes(regions: Regions, objects, logits, deltas) -> tuple[Sums, Sums]:
    """Losses of the classes, `logits` [R,C+1], and of the boxes, `deltas` [R,C,4]; both count all regions."""
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), regions.classes)
    count = regions.valid.sum().astype(jnp.float32)
    own = jnp.minimum(regions.classes, deltas.shape[1] - 1)
    deltas = jnp.take_along_axis(deltas, own[:, None, None], axis=1)[:, 0]
    positive = regions.positive[:, None]
    source = jnp.where(positive, regions.boxes, jnp.array([0.0, 0.0, 1.0, 1.0])[None])  # of some area: finite
    target = jnp.where(positive, objects[regions.object], source)
    distance = jnp.abs(deltas - boxes_lib.encode(source, target, boxes_lib.ROI_WEIGHTS))
    return Sums(jnp.where(regions.valid, entropy, 0).sum(), count), Sums(jnp.where(positive, distance, 0).sum(), count)


def masks(regions: Regions, objects, bits, logits) -> Sums:
    """Loss of the masks of positive regions, mean over the mask's cells.

    Args:
      bits: uint8 [M,n,n/8], packed masks of the objects in their own boxes.
      logits: [R,s,s], of each region's class.
    """
    size = logits.shape[-1]
    target = masks_lib.targets(bits[regions.object], objects[regions.object], regions.boxes, size=size)
    entropy = optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), target.astype(jnp.float32)).mean((1, 2))
    positive = regions.positive
    return Sums(jnp.where(positive, entropy, 0).sum(), positive.sum().astype(jnp.float32))


def mean(sums: Sums, per_image: bool) -> jax.Array:
    """Of a batch, [B] each: the mean of every image's mean, or that over all regions. No region: 0."""
    if per_image:
        return (sums.total / jnp.maximum(sums.count, 1)).mean()
    return sums.total.sum() / jnp.maximum(sums.count.sum(), 1)

"""From network outputs to boxes: the RPN's proposals and the final detections of one image, padded to a fixed number.

As in detectron2. No gradient flows through the boxes. For a batch: jax.vmap, on several devices inside
`partition.per_device`: XLA gathers the operand of a top-k from all devices otherwise, and NMS would wait for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from addp_jax.ops import boxes as boxes_lib
from addp_jax.ops import nms


class Proposals(NamedTuple):
    """Best first: `boxes` [K, 4], `logits` [K], `valid` bool [K]. Padding: zeros, logit -inf, False."""

    boxes: jax.Array
    logits: jax.Array
    valid: jax.Array


class Detections(NamedTuple):
    """Best first: `boxes` [K, 4], `scores` [K], `classes` int32 [K], `rows` int32 [K] (the proposal of each).

    `valid`: bool [K]. Padding: zeros, class -1, False.
    """

    boxes: jax.Array
    scores: jax.Array
    classes: jax.Array
    rows: jax.Array
    valid: jax.Array


def propose(
    anchors: Sequence[np.ndarray], logits: Sequence[jax.Array], deltas: Sequence[jax.Array], size: jax.Array,
    *, per_level: int, num: int, threshold: float = 0.7,
) -> Proposals:  # fmt: skip
    """Proposals of one image from the levels' anchors [A, 4], logits [A] and deltas [A, 4] (A differs by level).

    size: int32 [2], the height and width of the image without padding. Each level's `per_level` best are decoded, cut
    to the image, dropped when empty or not finite, and thinned by NMS at `threshold`; the `num` best of all levels
    stay. A level of fewer anchors is padded, which changes nothing.
    """
    levels = [_best(*level, per_level) for level in zip(anchors, logits, deltas, strict=True)]
    boxes, scores = (jnp.stack(part) for part in zip(*levels))  # [levels, per_level, 4], [levels, per_level]
    boxes = boxes_lib.clip(boxes, size)
    valid = boxes_lib.nonempty(boxes) & jnp.isfinite(boxes).all(-1) & jnp.isfinite(scores)
    keep = jax.vmap(lambda *level: nms.keep_best(*level, threshold=threshold))(boxes, valid)
    return Proposals(*_top(num, jnp.where(keep, scores, -jnp.inf).reshape(-1), boxes.reshape(-1, 4)))


def _best(anchors, logits, deltas, num):
    """The `num` best boxes [num, 4] of a level and their logits [num], best first; -inf at padding."""
    count = min(num, logits.shape[0])
    scores, index = jax.lax.top_k(jax.lax.stop_gradient(logits).astype(jnp.float32), count)
    chosen = jax.lax.stop_gradient(deltas[index])
    boxes = boxes_lib.decode(jnp.asarray(anchors)[index], chosen, boxes_lib.RPN_WEIGHTS)
    boxes = jnp.pad(boxes, ((0, num - count), (0, 0)))
    return boxes, jnp.pad(scores, (0, num - count), constant_values=-jnp.inf)


def _top(num, scores, boxes):
    """The `num` best of scores [N] (-inf = none) with their boxes [N, 4], padded: boxes, scores, valid."""
    short = max(0, num - scores.shape[0])
    scores, boxes = jnp.pad(scores, (0, short), constant_values=-jnp.inf), jnp.pad(boxes, ((0, short), (0, 0)))
    scores, index = jax.lax.top_k(scores, num)
    valid = scores > -jnp.inf
    return jnp.where(valid[:, None], boxes[index], 0), scores, valid


def add_objects(boxes, valid, objects, object_valid) -> tuple[jax.Array, jax.Array]:
    """The proposals [K, 4], bool [K] followed by the objects [M, 4], bool [M], as training does."""
    return jnp.concatenate([boxes, objects]), jnp.concatenate([valid, object_valid])


def detect(
    logits: jax.Array, deltas: jax.Array, boxes: jax.Array, valid: jax.Array, size: jax.Array,
    *, num: int = 100, score_above: float = 0.05, threshold: float = 0.5,
) -> Detections:  # fmt: skip
    """Detections of one image from its proposals `boxes` [R, 4], `valid` bool [R].

    logits: [R, C + 1], background last. deltas: [R, C, 4], per class. size: int32 [2] without padding. Softmax; each
    class's boxes are cut to the image and those that score above `score_above` thinned by NMS; the `num` best of all
    classes stay. Every pair of a class is compared, so it holds C x R x R bools; nothing is cut off before NMS.
    """
    scores = jax.nn.softmax(logits.astype(jnp.float32), -1)[:, :-1].T  # [C, R]
    decoded = boxes_lib.decode(boxes[:, None], deltas, boxes_lib.ROI_WEIGHTS)
    decoded = boxes_lib.clip(decoded, size).swapaxes(0, 1)  # [C, R, 4]
    finite = valid & (jnp.isfinite(decoded).all((0, 2)) & jnp.isfinite(scores).all(0))
    scores = jnp.where(finite[None] & (scores > score_above), scores, -jnp.inf)

    def thin(scores, boxes):
        best, rows = jax.lax.top_k(scores, scores.shape[0])
        boxes = boxes[rows]
        keep = nms.keep_best(boxes, best > -jnp.inf, threshold=threshold)
        return jnp.where(keep, best, -jnp.inf), boxes, rows

    scores, decoded, rows = jax.lax.stop_gradient(jax.vmap(thin)(scores, decoded))
    classes = jnp.broadcast_to(jnp.arange(scores.shape[0])[:, None], scores.shape)
    short = max(0, num - scores.size)
    best, index = jax.lax.top_k(jnp.pad(scores.reshape(-1), (0, short), constant_values=-jnp.inf), num)
    found = best > -jnp.inf
    index = jnp.where(found, index, 0)
    return Detections(
        jnp.where(found[:, None], decoded.reshape(-1, 4)[index], 0),
        jnp.where(found, best, 0),
        jnp.where(found, classes.reshape(-1)[index], -1),
        jnp.where(found, rows.reshape(-1)[index], 0),
        found,
    )

"""Which object an anchor or a proposal stands for, and which of them a loss looks at. As in detectron2.

For a batch: jax.vmap, on several devices inside `partition.per_device`, as for proposals. Matching holds the overlaps
[M, A] of an image, 100 MiB with 100 objects at 1024 px; lax.map over images holds one at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from addp_jax.ops import boxes as boxes_lib

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1


class Match(NamedTuple):
    """Of each box: `index` int32 [N] of the object that it overlaps most, `label` int8 [N] (1, 0; -1 = ignored)."""

    index: jax.Array
    label: jax.Array


class Sample(NamedTuple):
    """Slots of a fixed number, positives first: `index` int32 [S] into the boxes, `valid` and `positive` bool [S]."""

    index: jax.Array
    valid: jax.Array
    positive: jax.Array


def match_anchors(anchors, objects, valid, *, negative_below: float = 0.3, positive_from: float = 0.7) -> Match:
    """Anchors [A, 4] and objects [M, 4] of one image; valid: bool [M], False at padding, which takes no part.

    An anchor is negative below the first overlap, positive from the second on, ignored between. The anchors that
    overlap an object most, ties included, are positive at any overlap; they keep the object they overlap most
    themselves. As in the reference, an object that overlaps no anchor ties all anchors, so all become positive.
    """
    overlap = _overlap(objects, anchors, valid)
    match = _by_threshold(overlap, negative_below, positive_from)
    best = overlap.max(1, keepdims=True)
    tied = ((overlap == best) & valid[:, None]).any(0)
    return match._replace(label=jnp.where(tied, jnp.int8(POSITIVE), match.label))


def match_proposals(proposals, proposal_valid, objects, valid, *, positive_from: float = 0.5) -> Match:
    """Proposals [N, 4] and objects [M, 4] of one image; proposal_valid [N], valid [M]: bool, False at padding.

    A proposal is positive from that overlap on, else negative; padding is ignored.
    """
    match = _by_threshold(_overlap(objects, proposals, valid), positive_from, positive_from)
    return match._replace(label=jnp.where(proposal_valid, match.label, jnp.int8(IGNORED)))


def _overlap(objects, boxes, valid):
    """IoU [M, N]; -1 for padded objects, so that they are nobody's best.

    The barrier makes both readers of the matrix see the same bits: ties are decided by equality.
    """
    overlap = jnp.where(valid[:, None], boxes_lib.iou(objects, boxes), -1)
    return jax.lax.optimization_barrier(overlap)


def _by_threshold(overlap, negative_below, positive_from) -> Match:
    best = overlap.max(0)
    label = jnp.where(best < negative_below, NEGATIVE, jnp.where(best >= positive_from, POSITIVE, IGNORED))
    return Match(overlap.argmax(0).astype(jnp.int32), label.astype(jnp.int8))


def random_priority(rng: jax.Array, num: int) -> jax.Array:
    """int32 [num], not negative: the order in which `sample` takes boxes, uniform over all orders.

    Two of the 31-bit numbers may be equal (at 261,888 anchors about 16 pairs); the lower index goes first then.
    """
    return (jax.random.bits(rng, (num,), jnp.uint32) >> 1).astype(jnp.int32)


def first_priority(num: int) -> jax.Array:
    """int32 [num]: `sample` takes the first positives and the first negatives."""
    return jnp.arange(num - 1, -1, -1, dtype=jnp.int32)


def sample(label: jax.Array, priority: jax.Array, *, num: int, positive_fraction: float) -> Sample:
    """`num` slots from boxes of `label` int8 [N] in order of `priority` int32 [N], largest first, none twice.

    At most int(num * positive_fraction) positives come first, negatives fill the rest; slots that stay empty are not
    valid. With `random_priority` each set of positives (and of negatives) of that size is equally likely.
    """
    short = max(0, num - label.shape[0])
    label = jnp.pad(label, (0, short), constant_values=IGNORED)
    priority = jnp.pad(priority, (0, short))
    most = int(num * positive_fraction)
    _, positives = jax.lax.top_k(jnp.where(label == POSITIVE, priority, -1), most)
    _, negatives = jax.lax.top_k(jnp.where(label == NEGATIVE, priority, -1), num)
    num_positive = jnp.minimum((label == POSITIVE).sum(), most)
    num_negative = jnp.minimum((label == NEGATIVE).sum(), num - num_positive)
    slot = jnp.arange(num)
    positive = slot < num_positive
    positives = jnp.pad(positives, (0, num - most))
    index = jnp.where(positive, positives, negatives[jnp.maximum(slot - num_positive, 0)])
    index = jnp.minimum(index, label.shape[0] - short - 1)  # an empty slot points at some box
    return Sample(index.astype(jnp.int32), slot < num_positive + num_negative, positive)

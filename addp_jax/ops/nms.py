"""Non-maximum suppression (NMS): of boxes that overlap, the one of the best score stays. Exact, in static shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from addp_jax.ops import boxes as boxes_lib


def keep_best(boxes: jax.Array, valid: jax.Array, *, threshold: float) -> jax.Array:
    """Boxes [N, 4], best first -> bool [N], True where a box stays. valid: bool [N]; other boxes neither stay nor act.

    A box goes if a better one that stays overlaps it by more than `threshold`. That rule has one solution; applied
    again and again it settles, after k rounds at the latest for the best k boxes, so the loop ends at the exact
    answer. A round reads N x N bools; its number is the longest chain of boxes that decide about each other.
    """
    order = jnp.arange(boxes.shape[0])
    over = (boxes_lib.iou(boxes, boxes) > threshold) & (order[:, None] < order[None])

    def again(state):
        return state[1]

    def settle(state):
        keep, _ = state
        settled = valid & ~(over & keep[:, None]).any(0)
        return settled, (settled != keep).any()

    keep, _ = jax.lax.while_loop(again, settle, (valid, valid.any()))
    return keep

"""ROIAlign: features of boxes, sampled from a pyramid. detectron2's ROIAlignV2 with sampling ratio 0, exactly.

Each output bin is the mean of ceil(bin side) bilinear samples per axis. Samples, clamping and mean treat the axes
apart, so a box's output is `rows @ features @ columns.T` with two small matrices of weights (`axis_weights`).

Cost. Those products over a whole level would read 256 x 256 cells for every box at 1024 px. But the level of a box
follows from its area, so it spans fewer than 28 x 28 cells there, in whatever shape. All levels therefore lie side by
side on one canvas, and a box reads windows of 32 x 32 cells of it: one, or several in a row if it is long. The loop
runs over the windows that exist, so its length adapts and the result is exact for every shape. With C = 256, 512
boxes, 7 x 7 bins and 1024 px, that is 512 windows of 2.2 M multiply-adds = 1.1 G if each box is one window, and at
most 8 times as much; whole levels take 60 G on the first level alone and 80 G for every box on every level. 512 boxes
of 8 to 600 px with log-normal width / height, sigma 0.8, read 604 windows; with sigma 1.6, 726.

The result is linear in the features, and the gradient is the same loop transposed. Boxes get no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from addp_jax.ops import boxes as boxes_lib

WINDOW = 32  # cells; covers the 28 of a square box, a half at both ends and the bilinear neighbour
CHUNK = 128  # windows of an image at a time; 128 x 32 x 32 x 256 bfloat16 = 64 MiB
# A bin's n samples are more than 1 - 1/n cells apart, so at most 3 lie within one cell of a given cell; `axis_weights`
# begins up to one sample before them, and one more makes up for rounding.
SAMPLES = 5
SLACK = 0.01  # cells by which a span is widened against rounding


class Span(NamedTuple):
    """Along one axis of one level, in cells: the box's `start` and `side`, the level's `cells`, all float32 [...]."""

    start: jax.Array
    side: jax.Array
    cells: jax.Array


def levels_of(boxes, *, strides: Sequence[int] = (4, 8, 16, 32), canonical_size: float = 224) -> jax.Array:
    """Boxes [..., 4] -> index into `strides` int32 [...]: floor(4 + log2(sqrt(area) / canonical_size + 1e-8)) as level.

    Level k has stride 2^k; boxes below the first or above the last level go there. The floor of the logarithm is
    taken by comparison, so that it is right at powers of two.
    """
    ratio = jnp.sqrt(boxes_lib.area(boxes)) / canonical_size + 1e-8
    return sum(((ratio >= stride / 16).astype(jnp.int32) for stride in strides[1:]), jnp.zeros(ratio.shape, jnp.int32))


def axis_weights(span: Span, cells: jax.Array, bins: int) -> jax.Array:
    """Weights [..., bins, n] of the `cells` int32 [..., n] of an axis in each bin of a box.

    A sample beyond (-1, level's cells) counts as 0; one between the border and the first or last cell takes that cell.
    An empty box has weight 0.
    """
    start, side, count = (part[..., None, None, None] for part in span)
    bin_side = side / bins
    samples = jnp.ceil(bin_side)
    per_bin = jnp.maximum(samples, 1)
    low = start + lax.broadcasted_iota(jnp.float32, (*start.shape[:-3], bins, 1, 1), start.ndim - 3) * bin_side
    cell = cells[..., None, :, None].astype(jnp.float32)
    # The first sample within one cell of this one, or one before it.
    first = jnp.maximum(jnp.floor((cell - 1 - low) * per_bin / jnp.where(samples > 0, bin_side, 1) - 0.5), 0)
    near = lax.broadcasted_iota(jnp.float32, (*first.shape[:-1], SAMPLES), first.ndim - 1)
    index = first + near
    place = low + (index + 0.5) * bin_side / per_bin
    inside = (index >= 0) & (index < samples) & (place >= -1) & (place <= count)
    tent = 1 - jnp.abs(jnp.clip(place, 0, count - 1) - cell)
    return jnp.where(inside, jnp.maximum(tent, 0), 0).sum(-1) / per_bin[..., 0]


def align(features: jax.Array, boxes: jax.Array, bins: int) -> jax.Array:
    """One map for each box: features [R, H, W], boxes [R, 4] in its cells -> [R, bins, bins] float32.

    For masks, whose map is small; `pool` is for feature pyramids.
    """
    weights = []
    for axis, cells in enumerate(features.shape[1:]):
        span = _span(boxes, axis, jnp.ones(len(boxes)), jnp.full(len(boxes), cells, jnp.float32))
        weights.append(axis_weights(span, jnp.broadcast_to(jnp.arange(cells), (len(boxes), cells)), bins))
    return _product(weights[0], features[..., None].astype(jnp.float32), weights[1])[..., 0]


def _span(boxes, axis, scale, cells) -> Span:
    """Of boxes [..., 4] along `axis` (0 = y, 1 = x) on a level of `cells`, `scale` cells per pixel, both [...]."""
    start = boxes[..., 1 - axis] * scale - 0.5
    return Span(start, boxes[..., 3 - axis] * scale - 0.5 - start, cells)


def _product(rows, features, columns):
    """rows [..., p, h], features [..., h, w, C], columns [..., q, w] -> float32 [..., p, q, C]."""
    einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    dtype = features.dtype
    part = einsum("...ph,...hwc->...pwc", rows.astype(dtype), features).astype(dtype)
    return einsum("...qw,...pwc->...pqc", columns.astype(dtype), part)


def pool(
    features: Sequence[jax.Array], boxes: jax.Array, bins: int,
    *, strides: Sequence[int] = (4, 8, 16, 32), canonical_size: float = 224,
) -> jax.Array:  # fmt: skip
    """Features [B, R, bins, bins, C] of boxes [B, R, 4], in the dtype of the levels.

    features: levels [B, h, w, C], level i of stride `strides[i]`; each box reads the one that `levels_of` names. A box
    without area gives 0. Under vmap the loop runs until the longest image is done; give the batch here instead.
    """
    canvas, corners = _canvas(features)
    boxes = lax.stop_gradient(boxes)
    level = levels_of(boxes, strides=strides, canonical_size=canonical_size)
    shapes = jnp.asarray([level.shape[1:3] for level in features], jnp.float32)
    scale = 1 / jnp.asarray(strides, jnp.float32)[level]
    spans = [_span(boxes, axis, scale, shapes[:, axis][level]) for axis in range(2)]
    regions = _regions(spans, jnp.asarray(corners, jnp.int32)[level])
    return _pool(canvas, regions, bins).astype(canvas.dtype)


def _canvas(features):
    """The levels [B, h, w, C] on one canvas, and the (row, column) of each one's first cell.

    The first level is on the left, the others below one another beside it, so that nearly nothing is empty.
    """
    first, others = features[0], features[1:]
    width = max((level.shape[2] for level in others), default=0)
    height = max(first.shape[1], sum(level.shape[1] for level in others), WINDOW)
    batch, _, left, channels = first.shape
    canvas = jnp.zeros((batch, height, max(left + width, WINDOW), channels), first.dtype)
    row, corners = 0, []
    for index, level in enumerate(features):
        corners.append((row, left) if index else (0, 0))
        canvas = lax.dynamic_update_slice(canvas, level.astype(canvas.dtype), (0, *corners[-1], 0))
        row += level.shape[1] if index else 0
    return canvas, corners


class Regions(NamedTuple):
    """Of each box: its spans by axis (y, x), its level's corner on the canvas, the cells it reads and their windows.

    spans: two of [B, R]; corner, low, high, windows: int32 [B, R, 2]; low and high are the first and last cell.
    """

    spans: tuple[Span, Span]
    corner: jax.Array
    low: jax.Array
    high: jax.Array
    windows: jax.Array


def _regions(spans, corner) -> Regions:
    lows, highs = [], []
    for start, side, cells in spans:
        lows.append(jnp.clip(jnp.floor(start - SLACK), 0, cells - 1))
        highs.append(jnp.clip(jnp.floor(start + side + SLACK) + 1, 0, cells - 1))
    low, high = (jnp.stack(part, -1).astype(jnp.int32) for part in (lows, highs))
    windows = jnp.maximum(high - low, 0) // WINDOW + 1
    visible = (spans[0].side > 0) & (spans[1].side > 0)
    return Regions(tuple(spans), corner, low, high, windows * visible[..., None])


def _windows(regions: Regions, first, shape):
    """CHUNK windows of one image from number `first` on: boxes int32 [n], corners on the canvas [n, 2], the weights'
    parts. Windows are numbered box after box; numbers beyond the last one belong to box R, which does not exist."""
    ends = jnp.cumsum(regions.windows.prod(-1))  # [R]
    number = first + jnp.arange(CHUNK)
    box = jnp.searchsorted(ends, number, side="right", method="compare_all").astype(jnp.int32)
    region = jax.tree.map(lambda leaf: leaf.at[box].get(mode="clip"), regions)
    within = number - (ends.at[box].get(mode="clip") - region.windows.prod(-1))
    across = jnp.maximum(region.windows[:, 1], 1)
    low = region.low + WINDOW * jnp.stack([within // across, within % across], -1)
    limit = jnp.asarray(shape, jnp.int32)[None] - WINDOW
    return box, region, low, jnp.clip(region.corner + low, 0, limit)


def _window_weights(region, low, corner, bins):
    """Weights (rows, columns) [n, bins, WINDOW] of the cells of windows at `corner` that begin at cell `low`."""
    weights = []
    for axis, span in enumerate(region.spans):
        cells = (corner - region.corner)[:, axis, None] + jnp.arange(WINDOW)[None]
        own = (cells >= low[:, axis, None]) & (cells < low[:, axis, None] + WINDOW)  # a cell is in one window only
        weights.append(jnp.where(own[:, None], axis_weights(span, cells, bins), 0))
    return weights


def _trips(regions):
    most = regions.windows.prod(-1).sum(-1).max()  # windows of the fullest image
    return (most + CHUNK - 1) // CHUNK


_READ = lax.GatherDimensionNumbers(offset_dims=(1, 2, 3), collapsed_slice_dims=(), start_index_map=(0, 1))
_ADD = lax.ScatterDimensionNumbers(
    update_window_dims=(1, 2, 3), inserted_window_dims=(), scatter_dims_to_operand_dims=(0, 1)
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _pool(canvas, regions, bins):
    """Canvas [B, H, W, C] -> float32 [B, R, bins, bins, C]."""
    shape, channels = canvas.shape[1:3], canvas.shape[3]

    def image(pooled, canvas, regions, first):
        box, region, low, corner = _windows(regions, first, shape)
        rows, columns = _window_weights(region, low, corner, bins)
        window = lax.gather(canvas, corner, _READ, (WINDOW, WINDOW, channels), mode="promise_in_bounds")
        return pooled.at[box].add(_product(rows, window, columns), mode="drop")

    def trip(number, pooled):
        return jax.vmap(image, (0, 0, 0, None))(pooled, canvas, regions, number * CHUNK)

    batch, num = regions.low.shape[:2]
    return lax.fori_loop(0, _trips(regions), trip, jnp.zeros((batch, num, bins, bins, channels), jnp.float32))


def _pool_forward(canvas, regions, bins):
    return _pool(canvas, regions, bins), (regions, jnp.zeros((0, *canvas.shape), canvas.dtype))


def _pool_backward(bins, residuals, gradient):
    """The transposed loop: each window's gradient is added to the canvas, in float32."""
    regions, like = residuals
    shape, dtype = like.shape[1:], like.dtype

    def image(total, gradient, regions, first):
        box, region, low, corner = _windows(regions, first, shape[1:3])
        turned = [weights.swapaxes(-1, -2) for weights in _window_weights(region, low, corner, bins)]
        # Turned inside a bfloat16 product, they meet a fault of XLA's CPU compiler in jaxlib 0.10.2.
        rows, columns = lax.optimization_barrier(turned)
        own = gradient.at[box].get(mode="fill", fill_value=0).astype(dtype)
        window = _product(rows, own, columns)
        return lax.scatter_add(total, corner, window, _ADD, mode="promise_in_bounds")

    def trip(number, total):
        return jax.vmap(image, (0, 0, 0, None))(total, gradient, regions, number * CHUNK)

    total = lax.fori_loop(0, _trips(regions), trip, jnp.zeros(shape, jnp.float32))
    return total.astype(dtype), jax.tree.map(_no_gradient, regions)


def _no_gradient(leaf):
    return np.zeros(leaf.shape, leaf.dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else jax.dtypes.float0)


_pool.defvjp(_pool_forward, _pool_backward)

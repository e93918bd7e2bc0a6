"""Labels of whole images by a network of one input size: overlapping windows, whose logits are averaged.

mmsegmentation's rules: the image is resized, windows lie `stride` apart and the last is moved back inside, logits are
averaged where windows overlap, resized to the image, and the largest wins. Of several views of an image (scales,
mirrored) the class probabilities are averaged.

Little is compiled, whatever the sizes of the images: the network for one batch of windows, and two small programs for
each size of a canvas, which is a multiple of the window: at most seven with one scale.

Departs from mmsegmentation: an image smaller than a window is padded to it; there the network sees the image alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from addp_jax import schema
from addp_jax.ops import opencv
from addp_jax.ops.images import PADDING

LONGEST = 4  # the long side of a resized image, at most, in windows
TILE = 128, 512  # pixels of an image whose labels are computed at a time

Logits = Callable[[np.ndarray], jax.Array | np.ndarray]  # uint8 [n,S,S,3] -> [n,S,S,C], or smaller: [n,S/4,S/4,C]


@schema.config
class Config:
    """How a whole image is cut into windows."""

    # slide: windows of the network's size. whole: one window, the image padded to a multiple of that; the network must
    # take any size.
    mode: str = schema.field("slide", choices=("slide", "whole"), matters=schema.NOTHING)
    stride: float = schema.field(2 / 3, above=0, most=1, matters=schema.NOTHING)  # between windows, as a part of one
    scales: tuple[float, ...] = schema.field((1.0,), above=0, matters=schema.NOTHING)  # short sides, in windows
    flip: bool = schema.field(False, matters=schema.NOTHING)  # the mirrored image too
    batch: int = schema.field(2, least=1, matters=schema.NOTHING)  # windows at a time

    def __post_init__(self):
        if not self.scales:
            raise ValueError("scales: (); use at least one")


class View(NamedTuple):
    """One resized image and its windows; all pairs are (y, x) in pixels."""

    size: tuple[int, int]  # of the image
    window: tuple[int, int]
    starts: tuple[list[int], list[int]]  # of the windows' rows and columns: each of one with each of the other
    flip: bool = False

    @property
    def corners(self) -> list[tuple[int, int]]:
        return [(y, x) for y in self.starts[0] for x in self.starts[1]]

    @property
    def canvas(self) -> tuple[int, int]:
        """Size, a multiple of the window's, that holds all of them."""
        height, width = (round_up(*pair) for pair in zip(self.size, self.window))
        return height, width


def round_up(length: int, unit: int) -> int:
    return -(-length // unit) * unit


def fitted(size: tuple[int, int], long: int, short: int) -> tuple[int, int]:
    """(height, width) of the largest image of the same shape within a long and a short side; at least 1 pixel each."""
    factor = min(long / max(size), short / min(size))
    return max(int(size[0] * factor + 0.5), 1), max(int(size[1] * factor + 0.5), 1)


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side."""
    last = max(length - window, 0)
    return [min(n * stride, last) for n in range((last + stride - 1) // stride + 1)]


def view(size: tuple[int, int], crop: int, config: Config, flip: bool = False) -> View:
    """The windows of a resized image of `size`, for a network of input side `crop`."""
    if config.mode == "whole":
        return View(size, (round_up(size[0], crop), round_up(size[1], crop)), ([0], [0]), flip)
    stride = max(int(crop * config.stride), 1)
    return View(size, (crop, crop), (starts(size[0], crop, stride), starts(size[1], crop, stride)), flip)


def views(size: tuple[int, int], crop: int, config: Config) -> list[View]:
    """All views of an image of `size`, resized by each of the scales."""
    found = []
    for scale in config.scales:
        resized = fitted(size, int(LONGEST * crop * scale), max(int(crop * scale), 1))
        found += [view(resized, crop, config, flip) for flip in (False, True)[: 1 + config.flip]]
    return found


def calls(size: tuple[int, int], crop: int, config: Config) -> int:
    """How often `segment` runs the network for an image of `size`."""
    return sum(-(-len(one.corners) // config.batch) for one in views(size, crop, config))


def cut(image: np.ndarray, view: View, padding=PADDING) -> np.ndarray:
    """[H,W,3] of the view's size -> its windows [n,S,S,3]."""
    height, width = view.window
    windows = np.empty((len(view.corners), height, width, image.shape[2]), image.dtype)
    windows[:] = padding
    for window, (y, x) in zip(windows, view.corners):
        part = image[y : y + height, x : x + width]
        window[: part.shape[0], : part.shape[1]] = part
    return windows


class Lines(NamedTuple):
    """Bilinear interpolation along one axis: two neighbours of each place, and their weights."""

    low: np.ndarray  # int32 [N]
    high: np.ndarray
    low_weight: np.ndarray  # float32 [N]
    high_weight: np.ndarray


def lines(length: int, result: int) -> Lines:
    """From `length` to `result` pixels, pixels being squares (align_corners=False)."""
    at = np.maximum((np.arange(result) + 0.5) * (length / result) - 0.5, 0)
    low = np.minimum(at.astype(np.int32), length - 1)
    share = (at - low).astype(np.float32)
    return Lines(low, np.minimum(low + 1, length - 1), 1 - share, share)


def _averaging(axis: int, view: View, result: int) -> Lines:
    """From a canvas, where overlapping windows are added, to the average at `result` pixels of the image."""
    length = view.size[axis]
    counts = np.zeros(view.canvas[axis], np.float32)
    for start in view.starts[axis]:
        counts[start : start + view.window[axis]] += 1
    low, high, low_weight, high_weight = lines(length, result)
    if view.flip and axis == 1:
        low, high = length - 1 - low, length - 1 - high
    return Lines(low, high, low_weight / counts[low], high_weight / counts[high])


def _interpolate(array, rows: Lines, columns: Lines):
    """[h,w,C] -> float32 [R,N,C]."""
    total = jnp.float32(0)
    for y, y_weight in ((rows.low, rows.low_weight), (rows.high, rows.high_weight)):
        for x, x_weight in ((columns.low, columns.low_weight), (columns.high, columns.high_weight)):
            values = array[y[:, None], x[None, :]].astype(jnp.float32)
            total += values * (y_weight[:, None] * x_weight[None, :])[:, :, None]
    return total


@functools.partial(jax.jit, static_argnames="window", donate_argnums=0)
def _add(canvas, logits, number, corner, window: tuple[int, int]):
    """Adds window `number` of `logits` [n,h,w,C], resized to the window, to a canvas [H,W,C]."""
    rows, columns = (lines(length, result) for length, result in zip(logits.shape[1:3], window))
    values = _interpolate(logits[number], rows, columns)
    where = corner[0], corner[1], 0
    before = jax.lax.dynamic_slice(canvas, where, values.shape)
    return jax.lax.dynamic_update_slice(canvas, before + values, where)


@jax.jit
def _tile_logits(canvas, rows: Lines, columns: Lines):
    return _interpolate(canvas, rows, columns)


@jax.jit
def _tile_labels(canvases, places):
    """int32 [R,N] of one view's logits, or of several views' probabilities."""
    logits = [_interpolate(canvas, *place) for canvas, place in zip(canvases, places)]
    if len(logits) == 1:
        return logits[0].argmax(-1)
    return sum(jax.nn.softmax(values) for values in logits).argmax(-1)


def fill_canvas(image: np.ndarray, view: View, logits: Logits, batch: int, padding=PADDING) -> jax.Array:
    """float32 [H,W,C], the view's canvas: the sum of all windows' logits. `image`: of the view's size, not mirrored."""
    windows = cut(image[:, ::-1] if view.flip else image, view, padding)
    full = np.concatenate([windows, np.repeat(windows[-1:], round_up(len(windows), batch) - len(windows), 0)])
    canvas = None
    for first in range(0, len(windows), batch):
        values = np.asarray(logits(full[first : first + batch]))  # on the host: of whatever devices they come from
        if canvas is None:
            canvas = jnp.zeros((*view.canvas, values.shape[-1]), jnp.float32)
        for number, corner in enumerate(view.corners[first : first + batch]):
            canvas = _add(canvas, values, np.int32(number), np.array(corner, np.int32), view.window)
    return canvas


def average(image: np.ndarray, logits: Logits, crop: int, config: Config = Config(), padding=PADDING) -> np.ndarray:
    """Averaged logits float32 [H,W,C] of an image [H,W,3] as it is, not resized."""
    size = image.shape[:2]
    one = view(size, crop, config)
    canvas = fill_canvas(image, one, logits, config.batch, padding)
    return np.asarray(_tile_logits(canvas, *(_averaging(axis, one, size[axis]) for axis in (0, 1))))


def segment(image: np.ndarray, logits: Logits, crop: int, config: Config = Config()) -> np.ndarray:
    """The label of every pixel.

    Args:
      image: uint8 [H,W,3] of any size. Its short side becomes `crop` times each of config.scales, its long side four
        times as much at most.
      logits: of windows, uint8 [n,S,S,3] where n = config.batch and S = crop (whole: [n,kS,lS,3]), at their size or
        smaller. What lies beyond the image is PADDING.
      crop: S.
    Returns:
      uint8 [H,W], int32 with more than 256 classes.

    With several views the canvases of all of them are on the device: 4 bytes per class and pixel.
    """
    canvases, averaging = [], []
    size = image.shape[:2]
    for one in views(size, crop, config):
        canvases.append(fill_canvas(opencv.resize_linear(image, one.size), one, logits, config.batch))
        averaging.append(tuple(_averaging(axis, one, size[axis]) for axis in (0, 1)))
    labels = np.empty(size, np.uint8 if canvases[0].shape[-1] <= 256 else np.int32)
    for top in range(0, size[0], TILE[0]):
        for left in range(0, size[1], TILE[1]):
            places = [(_part(rows, top, TILE[0]), _part(columns, left, TILE[1])) for rows, columns in averaging]
            tile = np.asarray(_tile_labels(canvases, places))
            part = labels[top : top + TILE[0], left : left + TILE[1]]
            part[:] = tile[: part.shape[0], : part.shape[1]]
    return labels


def _part(whole: Lines, start: int, count: int) -> Lines:
    """`count` places; beyond the end they read pixel 0."""
    parts = (values[start : start + count] for values in whole)
    return Lines(*(np.pad(values, (0, count - len(values))) for values in parts))

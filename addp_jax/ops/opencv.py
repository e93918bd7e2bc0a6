"""Resizing and HSV colours of uint8 images in numpy, by OpenCV's rules: what mmsegmentation's numbers rest on.

Every function gives OpenCV's bytes. A resize computes the pixels of a window of its result alone, so that cutting
a crop out of a large enlargement costs no more than the crop.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

COEFFICIENT = 1 << 11  # OpenCV's weights are multiples of 1 / COEFFICIENT
HSV_SHIFT = 12  # of the tables of quotients
LANES = 32  # pixels of a row that OpenCV turns from HSV at once, and truncates; what is left over it rounds
HUES = 180  # hue 0..179 stands for 0..358 degrees


class Window(NamedTuple):
    """A part of an image: the first row and column, and how many."""

    top: int
    left: int
    height: int
    width: int


def resize_linear(image: np.ndarray, size: tuple[int, int], window: Window | None = None) -> np.ndarray:
    """Bilinear without antialiasing (INTER_LINEAR): uint8 [H,W,3] -> uint8 [height,width,3].

    size: (height, width) of the whole result; window: the part of it that is computed, None = all.
    """
    window = window or Window(0, 0, *size)
    if image.shape[:2] == tuple(size):
        return image[window.top : window.top + window.height, window.left : window.left + window.width]
    low, high, share = _neighbours(image.shape[1], size[1], window.left, window.width)
    left, right = _weights(np.where(low == high, 0, share))
    top, bottom, share = _neighbours(image.shape[0], size[0], window.top, window.height)
    upper, lower = _weights(share)  # of the same row twice at the border, where OpenCV truncates twice
    first = top.min()
    rows = image[first : bottom.max() + 1]
    wide = rows[:, low].astype(np.int32)  # of every row once, in units of 1 / COEFFICIENT
    wide *= left[:, None]
    wide += rows[:, high] * right[:, None]
    wide >>= 4
    out = (wide[top - first] * upper[:, None, None]) >> 16
    out += (wide[bottom - first] * lower[:, None, None]) >> 16
    out += 2
    out >>= 2
    return out.astype(np.uint8)


def _neighbours(length: int, result: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of `count` places of a side of `result` pixels: the two nearest in `length` pixels, and the second's share."""
    at = ((np.arange(start, start + count) + 0.5) * (length / result) - 0.5).astype(np.float32)
    low = np.floor(at).astype(int)
    return np.clip(low, 0, length - 1), np.clip(low + 1, 0, length - 1), at - low.astype(np.float32)


def _weights(share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int32, of both neighbours, in units of 1 / COEFFICIENT."""
    share = share.astype(np.float32)
    return tuple(np.rint(weight * COEFFICIENT).astype(np.int32) for weight in (1 - share, share))


def resize_nearest(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Nearest (INTER_NEAREST): [H,W] -> [height,width] of the same dtype."""
    rows, columns = (
        np.minimum(np.floor(np.arange(result) * (1 / (result / length))).astype(int), length - 1)
        for length, result in zip(label.shape, size)
    )
    return label[rows[:, None], columns]


def _quotients(numerator: int) -> np.ndarray:
    return np.rint((numerator << HSV_SHIFT) / np.maximum(np.arange(256), 1)).astype(np.int32) * (np.arange(256) > 0)


_SATURATION, _HUE = _quotients(255), _quotients(HUES // 6)


def rgb_to_hsv(image: np.ndarray) -> np.ndarray:
    """uint8 [H,W,3] RGB -> uint8 [H,W,3]: hue 0..179, saturation and value 0..255."""
    red, green, blue = (image[..., channel].astype(np.int32) for channel in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    range_ = value - np.minimum(np.minimum(red, green), blue)
    sector = np.where(value == green, blue - red + 2 * range_, red - green + 4 * range_)
    sector = np.where(value == red, green - blue, sector)
    half = 1 << (HSV_SHIFT - 1)
    hue = (sector * _HUE[range_] + half) >> HSV_SHIFT
    hue += HUES * (hue < 0)
    saturation = (range_ * _SATURATION[value] + half) >> HSV_SHIFT
    return np.stack([hue, saturation, value], -1).astype(np.uint8)


def _one_minus_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """1 - a b of float32, rounded once, as a processor's fused instruction does it."""
    return (1 - a.astype(np.float64) * b).astype(np.float32)


# Of the six sectors of hue: which of (value, lowest, falling, rising) is red, green and blue.
_SECTORS = np.array([[0, 3, 1], [2, 0, 1], [1, 0, 3], [1, 2, 0], [3, 1, 0], [0, 1, 2]])


def hsv_to_rgb(image: np.ndarray) -> np.ndarray:
    """The inverse of `rgb_to_hsv`; hue below 180."""
    hue, saturation, value = (image[..., channel].astype(np.float32) for channel in range(3))
    saturation, value = saturation * np.float32(1 / 255), value * np.float32(1 / 255)
    hue *= np.float32(6 / HUES)
    sector = np.floor(hue)
    part = hue - sector
    falling, rising = (value * _one_minus_product(saturation, share) for share in (part, 1 - part))
    tints = np.stack([value, value * (1 - saturation), falling, rising], -1)
    chosen = np.take_along_axis(tints, _SECTORS[sector.astype(int) % 6], -1) * np.float32(255)
    vectors = image.shape[1] // LANES * LANES
    chosen[:, vectors:] = np.rint(chosen[:, vectors:])
    return chosen.astype(np.uint8)

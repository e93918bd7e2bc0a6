"""Textures, colours and pieces of no class: they hide generated shapes from whoever looks at colours only."""

import colorsys
import math
from collections.abc import Callable

import numpy as np

Paint = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (u, v), which broadcast -> RGB 0..1 [...,3]

LUMA = np.array([0.299, 0.587, 0.114])  # of RGB (ITU-R BT.601)
HUES = 6  # few, so that a region's colour tells that of the whole region and a token predictor learns soon what it can
DARK, BRIGHT = 0.24, 0.75  # luma of what stands out against the other
DEPTH = 0.06  # half the difference in luma between the two tones of a texture
WAVELENGTH = (0.3, 0.8)  # of a texture, fraction of the picture's side


def _zigzag(u, v):
    ramp = np.abs(np.mod(1.5 * u + 0.5, 2) - 1) - 0.5  # -0.5..0.5, three slopes
    return np.maximum(0.8 * np.abs(v - 0.7 * ramp) - 0.14, np.abs(u) - 0.95)


PIECES = (  # (u, v) -> about the signed distance to an outline of radius 1; none of them is a class of `sources.shapes`
    lambda u, v: np.maximum(np.abs(u) - 0.95, np.abs(v) - 0.2),  # bar
    lambda u, v: np.hypot(u, np.abs(v) + 0.9) - 1.3,  # leaf
    lambda u, v: np.maximum(np.abs(np.maximum(u, v) - 0.45) - 0.2, -0.75 - np.minimum(u, v)),  # corner
    _zigzag,
)

PATTERNS = (  # (a, b), phases along and across -> about -1..1
    lambda a, b: np.sin(a),  # stripes
    lambda a, b: np.sin(a + 1.5 * np.sin(0.4 * b)),  # ripples
    lambda a, b: 2 * np.sin(a) * np.sin(b),  # checker
    lambda a, b: np.cos(a) + np.cos(b) - 0.7,  # dots
    lambda a, b: np.sin(a) + np.sin(0.6 * a + 0.9 * b) + np.sin(0.5 * a - 0.8 * b),  # blotches
)


def paint(rng: np.random.Generator, luma: float, unit: float) -> Paint:
    """A random texture of two tones of one of `HUES` colours, of about this luma.

    unit: length of 1 in u and v, fraction of the side.
    """
    pure = np.array(colorsys.hls_to_rgb(rng.integers(HUES) / HUES, 0.5, 0.7))
    first, second = _colour(pure, luma - DEPTH), _colour(pure, luma + DEPTH)
    pattern = PATTERNS[rng.integers(len(PATTERNS))]
    angle, start, across = rng.uniform(0, 2 * math.pi, 3).tolist()
    rate = 2 * math.pi * unit / (WAVELENGTH[0] * (WAVELENGTH[1] / WAVELENGTH[0]) ** rng.random())
    cos, sin = rate * math.cos(angle), rate * math.sin(angle)

    def painted(u, v):
        share = np.clip(0.5 + 1.5 * pattern(cos * u + sin * v + start, cos * v - sin * u + across), 0, 1)
        return first + share[..., None] * (second - first)

    return painted


def _colour(pure: np.ndarray, luma: float) -> np.ndarray:
    """RGB 0..1, float32 [3]: `pure` made darker or lighter, of this luma."""
    own = LUMA @ pure
    mixed = pure * (luma / own) if luma < own else pure + (1 - pure) * ((luma - own) / (1 - own))
    return mixed.astype(np.float32)

"""A generated data set: shapes of eight classes, with boxes and masks.

Example i is drawn from (seed, i) when it is asked for: no files, no download. Outlines are signed distances in a frame
where the shape has about radius 1 (negative inside), which gives antialiased edges and exact masks in a few array
operations.
"""

import colorsys
import dataclasses
import math
from collections.abc import Callable

import numpy as np

from addp_jax.data import clutter, sources

SEEDS, SIZES = {"train": 0, "eval": 1}, {"train": 50_000, "eval": 2_000}  # of the splits

# RGB 0..255. Light colours go on dark backgrounds and the other way round.
LIGHT = (255, 214, 10), (255, 149, 40), (150, 230, 60), (70, 215, 240), (255, 135, 190)  # yellow orange lime cyan pink
DARK = (215, 30, 45), (30, 80, 210), (10, 125, 65), (115, 40, 165), (190, 15, 115)  # red blue green purple magenta
BEHIND, ON_TOP = (2, 6), (0, 3)  # pieces of no class in a textured picture: at least, fewer than
HIDDEN = 0.2  # share of an object's visible part that a piece on top may hide
_TEXTURES = ("plain", "stripes", "dots", "checker")
_TEXTURE_ODDS = (0.55, 0.15, 0.15, 0.15)


def _triangle(u, v):
    v = v - 0.25
    return np.maximum(v, np.sqrt(0.75) * np.abs(u) - 0.5 * v) - 0.58


def _star(u, v):
    sector = 2 * np.pi / 5
    angle = np.abs(np.mod(np.arctan2(u, -v) + sector / 2, sector) - sector / 2)
    radius = np.hypot(u, v)
    tip, notch = np.array([1.0, 0.0]), 0.45 * np.array([np.cos(sector / 2), np.sin(sector / 2)])
    normal = np.array([tip[1] - notch[1], notch[0] - tip[0]]) / -np.hypot(*(tip - notch))
    return radius * (np.cos(angle) * normal[0] + np.sin(angle) * normal[1]) - normal @ tip


def _cross(u, v):
    u, v = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(u - 0.95, v - 0.32), np.maximum(u - 0.32, v - 0.95))


def _heart(u, v):
    v = v + 0.1
    side = (np.abs(u) + np.abs(v - 0.25) - 0.75) * np.sqrt(0.5)
    lobe = np.hypot(np.abs(u) - 0.375, v + 0.125) - 0.375 * np.sqrt(2)
    return np.minimum(side, lobe)


DISTANCES = {  # (u, v) -> signed distance to the outline of a class; v points down
    "circle": lambda u, v: np.hypot(u, v) - 0.95,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.82,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.74) - 0.21,
    "heart": _heart,
    "crescent": lambda u, v: np.maximum(np.hypot(u - 0.15, v) - 0.95, 0.75 - np.hypot(u - 0.6, v)),
}
CLASSES = tuple(DISTANCES)


def _texture(kind: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Share of the second colour, 0..1, soft at the borders."""
    if kind == "stripes":
        wave = np.sin(10 * u)
    elif kind == "checker":
        wave = 2 * np.sin(8 * u) * np.sin(8 * v)
    else:
        wave = 1.6 * (np.cos(11 * u) + np.cos(11 * v)) - 1.2
    return np.clip(0.5 + 2 * wave, 0, 1)


@dataclasses.dataclass(frozen=True)
class _Object:
    """`label` and `outline` agree, but for a piece of no class."""

    label: int
    centre: np.ndarray  # (y, x), fraction of the side
    radius: float  # fraction of the side
    turn: float  # radians
    paint: clutter.Paint  # of u, v in the frame of the outline
    outline: Callable  # (u, v) -> signed distance


def open_split(config, split: str, image_size: int) -> sources.Source:
    size = (config.num_train if split == "train" else config.num_eval) or SIZES[split]
    return Shapes(size, SEEDS[split], image_size, config.max_objects, config.shapes)


class Shapes(sources.Source):
    """`num_examples` pictures of one or more shapes; a random-access source.

    With max_objects = 1 the shape spans 0.45-0.8 of the side and lies roughly in the middle. With more, there are
    1..max_objects of different sizes, the smaller on top of the larger, and they may overlap in part.

    `source[i]` is a dict:

      image    uint8 [S,S,3]
      label    int32, class of the object of largest radius: i mod 8, so classes are balanced
      boxes    float32 [max_objects,4], (y0, x0, y1, x1) in pixels around the visible part, y1 and x1 exclusive; zeros
               where there is no object
      classes  int32 [max_objects], largest object first, -1 = no object
      masks    bool [max_objects,S,S], the visible part of each object
      index    int32

    Args:
      seed: another seed is another data set.
      image_size: side S in pixels.
      shapes: how hard the pictures are.
        plain     one large upright shape of one of four colours near the middle, on plain grey
        full      tilted by some 17 degrees, bright on quiet backgrounds or the other way round, some with a pattern
        textured  anywhere, turned by any angle, of six hues; a texture on a texture, among pieces of no class, of which
                  up to two lie on top and hide at most a fifth each of an object: no colour or pixel tells the class
    """

    classes, labelled, has_objects, has_label_maps = CLASSES, True, True, True

    def __init__(self, num_examples: int, seed: int, image_size: int, max_objects: int = 1, shapes: str = "full"):
        self.num_examples, self.seed = num_examples, seed
        self.image_size, self.max_objects, self.shapes = image_size, max_objects, shapes

    def __len__(self) -> int:
        return self.num_examples

    def fingerprint(self, times: bool = False) -> str:
        return repr(self)

    def __repr__(self) -> str:
        return f"Shapes({self.num_examples}, {self.seed}, {self.image_size}, {self.max_objects}, {self.shapes!r})"

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < self.num_examples:
            raise IndexError(i)
        rng = np.random.default_rng((self.seed, int(i)))
        on_dark = rng.random() < 0.5
        objects = _arrange(rng, int(i) % len(CLASSES), on_dark, self.max_objects, self.shapes)
        canvas = _background(rng, self.image_size, on_dark, self.shapes)
        masks = np.zeros((self.max_objects, self.image_size, self.image_size), bool)
        if self.shapes == "textured":
            for _ in range(rng.integers(*BEHIND)):
                _draw(canvas, masks, None, _piece(rng, rng.random(2)))
        for slot, thing in enumerate(objects):
            _draw(canvas, masks, slot, thing)
        if self.shapes == "textured":
            for _ in range(rng.integers(*ON_TOP)):
                thing = objects[rng.integers(len(objects))]
                _draw(canvas, masks, None, _piece(rng, thing.centre + thing.radius * rng.uniform(-1, 1, 2)))
        return {
            "image": np.rint(np.clip(canvas, 0, 1) * 255).astype(np.uint8),
            "label": np.int32(objects[0].label),
            "boxes": np.stack([_box(mask) for mask in masks]),
            "classes": np.array(_labels(objects, masks), np.int32),
            "masks": masks,
            "index": np.int32(i),
        }


def _arrange(rng: np.random.Generator, label: int, on_dark: bool, max_objects: int, shapes: str) -> list[_Object]:
    count = int(rng.integers(1, max_objects + 1))
    palette = LIGHT if on_dark else DARK
    if shapes == "plain":
        palette = palette[::3]
        radii, spread = rng.uniform(0.7, 0.8, count) / 2, 0.25
    elif max_objects == 1:
        textured = shapes == "textured"
        radii, spread = rng.uniform(*((0.35, 0.75) if textured else (0.45, 0.8)), 1) / 2, 1.0 if textured else 0.5
    else:
        radii, spread = -np.sort(-rng.uniform(0.09, 0.24, count)), 1.0
        radii[0] = max(radii[0], 0.16)
    colours = rng.permutation(len(palette))
    objects = []
    for k, radius in enumerate(radii.tolist()):
        label = label if k == 0 else int(rng.integers(len(CLASSES)))
        centre = _place(rng, radius, spread, objects)
        if shapes == "textured":
            turn = rng.uniform(0, 2 * math.pi)
            paint = clutter.paint(rng, clutter.BRIGHT if on_dark else clutter.DARK, radius)
        else:
            turn = 0.0 if shapes == "plain" else float(rng.normal(0, 0.3))
            texture = "plain" if shapes == "plain" else str(rng.choice(_TEXTURES, p=_TEXTURE_ODDS))
            paint = _two_tone(np.array(palette[colours[k % len(palette)]]) / 255, 0.0 if on_dark else 1.0, texture)
        objects.append(_Object(label, centre, radius, turn, paint, DISTANCES[CLASSES[label]]))
    return objects


def _two_tone(colour: np.ndarray, tone: float, texture: str) -> clutter.Paint:
    """`colour` (RGB 0..1), in part mixed with the grey `tone`."""
    if texture == "plain":
        return lambda u, v: colour
    second = colour + 0.38 * (tone - colour)
    return lambda u, v: colour + _texture(texture, u, v)[:, :, None] * (second - colour)


def _piece(rng: np.random.Generator, centre: np.ndarray) -> _Object:
    radius, luma = rng.uniform(0.1, 0.3), (clutter.DARK, clutter.BRIGHT)[rng.integers(2)]
    outline = clutter.PIECES[rng.integers(len(clutter.PIECES))]
    return _Object(-1, centre, radius, rng.uniform(0, 2 * math.pi), clutter.paint(rng, luma, radius), outline)


def _place(rng: np.random.Generator, radius: float, spread: float, others: list[_Object]) -> np.ndarray:
    """A centre that leaves most of every other object free, if ten tries find one."""
    room = spread * (0.5 - radius)
    for _ in range(10):
        centre = 0.5 + rng.uniform(-room, room, 2)
        if all(np.hypot(*(centre - other.centre)) > 0.75 * (radius + other.radius) for other in others):
            break
    return centre


def _background(rng: np.random.Generator, size: int, dark: bool, shapes: str) -> np.ndarray:
    """Two muted shades of one hue, mixed plainly, by a gradient or by a soft pattern: [S,S,3] in 0..1."""
    if shapes == "textured":
        y, x = np.ogrid[0 : 1 : size * 1j, 0 : 1 : size * 1j]
        luma = clutter.DARK if dark else clutter.BRIGHT
        return clutter.paint(rng, luma, 1.0)(x.astype(np.float32), y.astype(np.float32))
    if shapes == "plain":
        return np.full((size, size, 3), 0.12 if dark else 0.93, np.float32)
    lightness = rng.uniform(0.13, 0.2) if dark else rng.uniform(0.84, 0.92)
    hue, step = rng.random(), 0.07
    first = np.array(colorsys.hls_to_rgb(hue, lightness - step, 0.35), np.float32)
    second = np.array(colorsys.hls_to_rgb(hue, lightness + step, 0.35), np.float32)
    angle, waves = rng.uniform(0, 2 * np.pi), rng.uniform(12, 22)
    kind = rng.choice(("plain", "gradient", "stripes", "checker"), p=(0.3, 0.4, 0.15, 0.15))
    y, x = np.ogrid[-0.5 : 0.5 : size * 1j, -0.5 : 0.5 : size * 1j]
    along = (np.cos(angle) * x + np.sin(angle) * y).astype(np.float32)
    if kind == "plain":
        share = np.full((size, size), 0.5, np.float32)
    elif kind == "gradient":
        share = np.clip(0.5 + along, 0, 1)
    elif kind == "stripes":
        share = 0.5 + 0.3 * np.sin(waves * along)
    else:
        across = (np.cos(angle) * y - np.sin(angle) * x).astype(np.float32)
        share = 0.5 + 0.35 * np.sin(waves * along) * np.sin(waves * across)
    return first + share[:, :, None] * (second - first)


def _draw(canvas: np.ndarray, masks: np.ndarray, slot: int | None, thing: _Object):
    """Paints one object over the canvas [S,S,3] and the masks [N,S,S], in place.

    slot: its place in the masks; None for a piece of no class, which is left out where it would hide too much.
    """
    size = len(canvas)
    low = np.maximum(np.floor((thing.centre - 1.3 * thing.radius) * size).astype(int), 0)
    high = np.ceil((thing.centre + 1.3 * thing.radius) * size).astype(int) + 1
    window = (slice(low[0], high[0]), slice(low[1], high[1]))
    y, x = ((np.arange(low[a], min(high[a], size), dtype=np.float32) + 0.5) / size - thing.centre[a] for a in (0, 1))
    y, x = y[:, None].astype(np.float32) / thing.radius, x[None, :].astype(np.float32) / thing.radius
    cos, sin = np.cos(thing.turn), np.sin(thing.turn)
    u, v = np.float32(cos) * x + np.float32(sin) * y, np.float32(cos) * y - np.float32(sin) * x
    cover = np.clip(0.5 - thing.outline(u, v) * (thing.radius * size), 0, 1)
    covered = cover >= 0.5
    if slot is None and ((masks[(slice(None), *window)] & covered).sum((1, 2)) > HIDDEN * masks.sum((1, 2))).any():
        return
    canvas[window] += cover[:, :, None] * (thing.paint(u, v) - canvas[window])
    masks[(slice(None), *window)] &= ~covered
    if slot is not None:
        masks[(slot, *window)] = covered


def _box(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return np.zeros(4, np.float32)
    return np.array([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1], np.float32)


def _labels(objects: list[_Object], masks: np.ndarray) -> list[int]:
    """Class per slot; -1 also for an object that others hide completely."""
    labels = [thing.label if mask.any() else -1 for thing, mask in zip(objects, masks)]
    return labels + [-1] * (len(masks) - len(labels))

"""Examples of detection: a picture in the top left corner of a square, and its objects' boxes, classes and masks.

The geometry is detectron2's: flip, resize, cut, then new boxes from what is left of the outlines. An outline is a list
of polygons, float [P,2] of (x, y) in pixels of the image, or a bool [H,W] of the whole image.

Departs from detectron2: an outline that leaves the picture is cut at the picture's border, even where padding follows.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as rle

from addp_jax import errors
from addp_jax.data import transforms, walk
from addp_jax.ops.images import PADDING

SMALLEST_SIDE = 1e-5  # pixels; an object whose box has a smaller one is dropped
SMALLEST_AREA = 1e-9  # square pixels; what is left of a polygon is dropped below it

Draw = Callable[[int], np.ndarray]  # R -> bool [R,R]: the object within its box


class Placement(NamedTuple):
    """What happens to an image: flipped, resized, then cut. All pairs are (y, x) in whole pixels."""

    flip: bool
    original: tuple[int, int]  # size of the image
    resized: tuple[int, int]
    offset: tuple[int, int]  # of the cut in the resized image
    size: tuple[int, int]  # of the cut

    @property
    def scale(self) -> np.ndarray:
        """float64 [2]: resized / original, height and width."""
        return np.array(self.resized) / np.array(self.original)


def jittered(original: tuple[int, int], size: int, flip: bool, scale: float, at: float) -> Placement:
    """Large-scale jitter: `scale` x the size that fits into [size,size], then a cut of at most that.

    at: 0..1, where the cut lies, one number for both axes.
    Departs from detectron2: a side that would be rounded to 0 pixels gets 1.
    """
    factor = min(size * scale / original[0], size * scale / original[1])
    resized = np.maximum(np.round(np.multiply(original, factor)), 1).astype(int)
    offset = np.round(np.maximum(resized - size, 0) * at).astype(int)
    return Placement(flip, *(tuple(map(int, pair)) for pair in (original, resized, offset, np.minimum(resized, size))))


def fitted(original: tuple[int, int], size: int) -> Placement:
    """The long side becomes `size`. In detectron2's order of operations, whose rounding decides some sizes."""
    factor = size / min(original)
    sides = [factor * side for side in original]
    sides[original[0] >= original[1]] = size  # the short side exactly
    if max(sides) > size:
        factor = size / max(sides)
        sides = [side * factor for side in sides]
    resized = tuple(max(int(side + 0.5), 1) for side in sides)
    return Placement(False, original, resized, (0, 0), resized)


def place_image(image: np.ndarray, placement: Placement, size: int) -> np.ndarray:
    """uint8 [H,W,3] -> uint8 [size,size,3]: bilinear, antialiased, padded on the right and below."""
    image = np.ascontiguousarray(image[:, ::-1]) if placement.flip else image
    image = transforms.resize(image, *placement.resized, Image.Resampling.BILINEAR)
    (top, left), (height, width) = placement.offset, placement.size
    canvas = np.empty((size, size, 3), np.uint8)
    canvas[:height, :width] = image[top : top + height, left : left + width]
    canvas[height:] = canvas[:height, width:] = PADDING
    return canvas


def place_outline(outline: list | np.ndarray, placement: Placement) -> tuple[np.ndarray, Draw] | None:
    """An object in the cut: its box, float64 (x0, y0, x1, y1), and its mask; None if nothing is left of it."""
    placed = (_place_bitmap if isinstance(outline, np.ndarray) else _place_polygons)(outline, placement)
    if placed is None or (placed[0][2:] - placed[0][:2]).min() <= SMALLEST_SIDE:
        return None
    return placed


def _place_polygons(polygons: list, placement: Placement) -> tuple[np.ndarray, Draw] | None:
    pieces, extents = [], []
    for polygon in polygons:
        points = np.array(polygon, np.float64)
        if placement.flip:
            points[:, 0] = placement.original[1] - points[:, 0]
        points = points * placement.scale[::-1] - placement.offset[::-1]
        piece = clip(points, placement.size)
        if len(piece) >= 3 and abs(_area(piece)) > SMALLEST_AREA:
            pieces.append(piece)
            extents.append(_extent(points, piece, placement.size))
    if not pieces:
        return None
    extents = np.array(extents)
    box = np.concatenate([extents[:, :2].min(0), extents[:, 2:].max(0)])
    return box, functools.partial(draw_polygons, pieces, box)


def clip(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The part [Q,2] of a polygon [P,2] of (x, y) within `size` = (height, width).

    Where a polygon falls apart, its parts stay joined by edges along the border, which enclose nothing.
    """
    for axis, high in ((0, size[1]), (1, size[0])):
        for sign, border in ((1.0, 0.0), (-1.0, float(high))):
            inside = sign * (points[:, axis] - border) >= 0
            if inside.all():
                continue
            if not inside.any():
                return points[:0]
            following = np.roll(points, -1, 0)
            crossing = inside != np.roll(inside, -1)
            with np.errstate(divide="ignore", invalid="ignore"):
                share = (border - points[:, axis]) / (following[:, axis] - points[:, axis])
                met = points + share[:, None] * (following - points)
            met[:, axis] = border
            both = np.stack([points, met], 1).reshape(-1, 2)
            points = both[np.stack([inside, crossing], 1).reshape(-1)]
    return points


def _extent(points: np.ndarray, piece: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(x0, y0, x1, y1) of the clipped `piece`, without corners of the cut that only edges along the border reach."""
    height, width = size
    at_corner = np.isin(piece[:, 0], (0, width)) & np.isin(piece[:, 1], (0, height))
    if at_corner.any():
        reached = piece[[not corner or _covers(points, point) for corner, point in zip(at_corner, piece)]]
        piece = reached if len(reached) else piece
    return np.concatenate([piece.min(0), piece.max(0)])


def _covers(points: np.ndarray, point: np.ndarray) -> bool:
    """Whether `point` lies in the polygon or on its edge."""
    start, end = points - point, np.roll(points, -1, 0) - point
    cross = start[:, 0] * end[:, 1] - start[:, 1] * end[:, 0]
    if ((cross == 0) & ((start * end).max(1) <= 0)).any():
        return True
    upward = end[:, 1] > start[:, 1]
    straddles = (start[:, 1] > 0) != (end[:, 1] > 0)
    return bool((straddles & ((cross > 0) == upward)).sum() % 2)


def _area(points: np.ndarray) -> float:
    x, y = (points - points[0]).T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def draw_polygons(polygons: list[np.ndarray], box: np.ndarray, side: int) -> np.ndarray:
    """bool [side,side]: the polygons within `box` = (x0, y0, x1, y1), of some area, which holds them or nearly so.

    What lies far outside of the box would cost memory by its distance in cells.
    """
    stretch = side / (box[2:] - box[:2])
    flat = [((polygon - box[:2]) * stretch).reshape(-1).tolist() for polygon in polygons]
    return rle.decode(rle.merge(rle.frPyObjects(flat, side, side))).astype(bool)


def _place_bitmap(bitmap: np.ndarray, placement: Placement) -> tuple[np.ndarray, Draw] | None:
    """Pixels are squares here, so that a cut through one leaves a part of it."""
    bitmap = bitmap[:, ::-1] if placement.flip else bitmap
    offset, scale = np.array(placement.offset), placement.scale
    low = np.floor(offset / scale).astype(int)
    high = np.ceil((offset + placement.size) / scale).astype(int)
    window = bitmap[low[0] : high[0], low[1] : high[1]]
    rows, columns = np.flatnonzero(window.any(1)), np.flatnonzero(window.any(0))
    if not len(rows):
        return None
    top_left = (low + [rows[0], columns[0]]) * scale - offset
    bottom_right = (low + [rows[-1] + 1, columns[-1] + 1]) * scale - offset
    corners = np.clip([top_left, bottom_right], 0, placement.size)
    return corners[:, ::-1].reshape(4), functools.partial(_draw_bitmap, bitmap, corners + offset, scale)


def _draw_bitmap(bitmap: np.ndarray, corners: np.ndarray, scale: np.ndarray, side: int) -> np.ndarray:
    """bool [side,side]: `bitmap`, resized by `scale`, at the centres of the cells between two `corners`."""
    centres = corners[0] + (np.arange(side)[:, None] + 0.5) / side * (corners[1] - corners[0])
    rows, columns = np.clip(np.floor(centres / scale).astype(int), 0, np.array(bitmap.shape) - 1).T
    return bitmap[rows[:, None], columns]


@dataclasses.dataclass(frozen=True)
class _Square:
    """What both transforms share.

    Fields:
      size: side S of the result in pixels.
      max_objects: M; of more objects the M with the largest boxes are kept, in their order.
      mask_size: R, a multiple of 8.
    """

    size: int = 1024
    max_objects: int = 100
    mask_size: int = 112

    def placed(self, example: dict, image: np.ndarray, placement: Placement) -> dict:
        """The example of a batch, without objects of which nothing is left.

        image    uint8 [S,S,3], the picture in the top left corner, PADDING beyond it
        size     int32 [2], height and width of the picture
        boxes    float32 [M,4], (x0, y0, x1, y1) in pixels, ends exclusive, within the picture; zeros = no object
        classes  int32 [M], -1 = no object; objects come first
        masks    uint8 [M,R,R/8], `numpy.packbits` of bool [R,R]: the object within its own box
        index    int32
        """
        labels, boxes, draws = [], [], []
        for label, outline in _objects(example):
            placed = place_outline(outline, placement)
            if placed is not None:
                labels.append(label)
                boxes.append(placed[0])
                draws.append(placed[1])
        chosen = self._largest(boxes)
        out = {
            "image": place_image(image, placement, self.size),
            "size": np.array(placement.size, np.int32),
            "boxes": np.zeros((self.max_objects, 4), np.float32),
            "classes": np.full(self.max_objects, -1, np.int32),
            "masks": np.zeros((self.max_objects, self.mask_size, self.mask_size // 8), np.uint8),
            "index": np.int32(example["index"]),
        }
        for slot, number in enumerate(chosen):
            out["boxes"][slot], out["classes"][slot] = boxes[number], labels[number]
            out["masks"][slot] = np.packbits(draws[number](self.mask_size), axis=-1)
        return out

    def _largest(self, boxes: list[np.ndarray]) -> list[int]:
        if len(boxes) <= self.max_objects:
            return list(range(len(boxes)))
        walk.say(f"more than {self.max_objects} objects in an image: the largest are kept; so it is with other images")
        areas = [np.prod(box[2:] - box[:2]) for box in boxes]
        return sorted(np.argsort(areas, kind="stable")[::-1][: self.max_objects].tolist())


def _objects(example: dict) -> list[tuple[int, list | np.ndarray]]:
    """(class, outline) of each object of a source's example: of files, or of generated shapes with their masks."""
    if "classes" not in example:
        return []
    outlines = example["outlines"] if "outlines" in example else example["masks"]
    return [(label, outline) for label, outline in zip(example["classes"], outlines) if label >= 0]


def _decoded(example: dict) -> np.ndarray:
    """The image. Raises Unreadable: it cannot be decoded, or has another size than the annotations say."""
    where = example.get("path") or f"example {example['index']}"
    image = transforms.decode(example["image"], where)
    if "original_size" in example and image.shape[:2] != tuple(example["original_size"]):
        (height, width), (told_height, told_width) = image.shape[:2], example["original_size"]
        raise errors.Unreadable(
            f"{where} has {width}x{height} pixels, but its annotations are for {told_width}x{told_height}; "
            "put the original image there"
        )
    return image


@dataclasses.dataclass(frozen=True)
class TrainDetection(_Square):
    """Random flip and large-scale jitter: example of `sources.coco` or `sources.shapes` -> the arrays of `placed`.

    Fields, besides those shared:
      scale: range of the factor on the size that just fits.
      flip: mirror left and right with probability 1/2.
    """

    scale: tuple[float, float] = (0.1, 2.0)
    flip: bool = True

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        image = _decoded(example)
        flip = self.flip and rng.random() < 0.5
        placement = jittered(image.shape[:2], self.size, flip, rng.uniform(*self.scale), rng.random())
        return self.placed(example, image, placement)


@dataclasses.dataclass(frozen=True)
class EvalDetection(_Square):
    """The whole picture, its long side S: example -> the arrays of `placed`, and

    image_id int32, scale float32 [2] (picture / original, height and width), original_size int32 [2] (height, width).
    """

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        del rng
        image = _decoded(example)
        placement = fitted(image.shape[:2], self.size)
        return self.placed(example, image, placement) | {
            "image_id": np.int32(example["image_id"] if "image_id" in example else example["index"]),
            "scale": placement.scale.astype(np.float32),
            "original_size": np.array(image.shape[:2], np.int32),
        }

"""Examples of segmentation: an image and a label map, the class of every pixel; 255 = of no class, ignored.

The steps of training are mmsegmentation's, in its order: resize, crop, flip, distort the colours, pad. Pixels are
OpenCV's, see `ops.opencv`.
"""

import dataclasses
import io
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from addp_jax import errors
from addp_jax.data import transforms, walk
from addp_jax.ops import opencv, windows
from addp_jax.ops.segmentation import IGNORED

CROP_TRIES = 10  # crops that are tested; the next one is taken as it is
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32, (0.5, 1.5), (0.5, 1.5), 18  # what colours are changed by, at most
ODDS = 0.5  # of each change, and of a flip


@dataclasses.dataclass(frozen=True)
class Labels:
    """What the numbers in label maps mean.

    Fields:
      num_classes: C; what is left after the next two is 0..C-1 or IGNORED.
      ignored: the number of pixels of no class, before the shift.
      shift: 0 means "other" and is ignored, k is class k - 1.
    """

    num_classes: int
    ignored: int = IGNORED
    shift: bool = False

    def __post_init__(self):
        if not 0 < self.num_classes <= IGNORED:
            raise errors.UserError(f"segmentation needs 1 to {IGNORED} classes, not {self.num_classes}")

    def read(self, example: dict) -> np.ndarray:
        """uint8 [H,W] of an example of `sources.label_maps`, or of generated shapes: `of_shapes`.

        Raises Unreadable naming the file: it is no PNG of one channel, or has a number that is no class.
        """
        numbers = decode(example["label_map"], example["label_path"]) if "label_map" in example else of_shapes(example)
        where = example.get("label_path") or f"example {example['index']}"
        counts = np.bincount(numbers.reshape(-1), minlength=256)
        table = np.arange(len(counts)) - self.shift
        table[[self.ignored] + [0] * self.shift] = IGNORED
        wrong = np.flatnonzero((counts > 0) & (table >= self.num_classes) & (table != IGNORED))
        if len(wrong):
            first, last = int(self.shift), self.num_classes - 1 + self.shift
            raise errors.Unreadable(
                f"{where} has the label {wrong[0]} at {counts[wrong[0]]} pixels; {first}..{last} are the classes, "
                f"{self.ignored} is ignored: correct the file, the number of classes, config.data.ignored_label or "
                "config.data.shift_labels"
            )
        label = table.astype(np.uint8)[numbers]
        if (label == IGNORED).all():
            walk.say(f"{where}: all pixels are ignored; nothing is learnt or measured there")
        return label


def decode(content: bytes, where: str) -> np.ndarray:
    """The numbers in a PNG file, uint8 or int32 [H,W]: grey values, or the indices of a palette, whatever its colours.

    Raises Unreadable naming the file `where`: it is no PNG, damaged, or has colours.
    """
    picture = transforms.open_image(io.BytesIO(content), where, upright=False)
    if picture.format != "PNG":
        raise errors.Unreadable(f"{where} is a {picture.format} file; save label maps as PNG, which keeps numbers")
    if picture.mode not in ("1", "L", "P") and not picture.mode.startswith("I"):
        raise errors.Unreadable(
            f"{where} has colours ({picture.mode}); a label map has one channel, the number of each pixel's class"
        )
    numbers = np.asarray(picture)
    if numbers.dtype != np.uint8:
        return numbers.astype(np.int32 if picture.mode != "1" else np.uint8)
    depth, colours = content[24], content[25]  # of PNG's header
    return numbers // (255 // (2**depth - 1)) if colours == 0 else numbers  # grey of fewer bits comes stretched


def of_shapes(example: dict) -> np.ndarray:
    """uint8 [S,S] of an example of `sources.shapes`: 0 is the background, 1 + k an object of class k.

    The masks are of the visible parts: a smaller object covers a larger one.
    """
    masks, numbers = example["masks"], np.zeros(example["masks"].shape[1:], np.uint8)
    for mask, label in zip(masks, example["classes"]):
        if label >= 0:
            numbers[mask] = 1 + label
    return numbers


def shapes_classes(classes: tuple[str, ...], shift: bool) -> tuple[str, ...]:
    """The names of the classes of `of_shapes`, by number; with `shift` the background is ignored."""
    return classes if shift else ("background", *classes)


class Distortion(NamedTuple):
    """Changes of colours; None = left out."""

    brightness: float | None = None  # added, -32..32
    contrast: float | None = None  # factor
    contrast_first: bool = True  # before saturation and hue, or after
    saturation: float | None = None  # factor
    hue: int | None = None  # added, modulo 180

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Distortion":
        made = rng.random(4) < ODDS
        return cls(
            brightness=rng.uniform(-BRIGHTNESS, BRIGHTNESS) if made[0] else None,
            contrast=rng.uniform(*CONTRAST) if made[1] else None,
            contrast_first=bool(rng.random() < ODDS),
            saturation=rng.uniform(*SATURATION) if made[2] else None,
            hue=int(rng.integers(-HUE, HUE)) if made[3] else None,
        )


def distort(image: np.ndarray, by: Distortion) -> np.ndarray:
    """uint8 [H,W,3] RGB -> the same with other colours. Every step truncates to uint8."""
    if by.brightness is not None:
        image = _scaled(image, 1, by.brightness)
    if by.contrast is not None and by.contrast_first:
        image = _scaled(image, by.contrast, 0)
    if by.saturation is not None:
        image = opencv.rgb_to_hsv(image)
        image[..., 1] = _scaled(image[..., 1], by.saturation, 0)
        image = opencv.hsv_to_rgb(image)
    if by.hue is not None:
        image = opencv.rgb_to_hsv(image)
        image[..., 0] = (image[..., 0].astype(np.int16) + by.hue) % opencv.HUES
        image = opencv.hsv_to_rgb(image)
    if by.contrast is not None and not by.contrast_first:
        image = _scaled(image, by.contrast, 0)
    return image


def _scaled(values: np.ndarray, factor: float, added: float) -> np.ndarray:
    table = np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(added)
    return np.clip(table, 0, 255).astype(np.uint8)[values]


def choose_crop(label: np.ndarray, size: int, most: float, offsets: Iterator[tuple[int, int]]) -> tuple[int, int]:
    """The first of `offsets` (y, x) whose crop has more than one class, the largest with a share below `most`.

    Pixels that are ignored do not count. After ten the next one is taken as it is.
    """
    for top, left in itertools.islice(offsets, CROP_TRIES):
        counts = np.bincount(label[top : top + size, left : left + size].reshape(-1), minlength=256)[:IGNORED]
        if np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < most:
            return top, left
    return next(offsets)


@dataclasses.dataclass(frozen=True)
class TrainSegmentation:
    """Example of `sources.label_maps` or `sources.shapes` -> image uint8 [S,S,3], label uint8 [S,S], size and index.

    size, int32 [2], is height and width of the crop; beyond it the image is `windows.PADDING`, the label IGNORED.

    Fields:
      size: S.
      labels: what the label maps mean.
      scale: range of the factor on the size at which the short side is S and the long one 4 S at most.
      most: the largest share of one class in a crop, if ten tries find such a crop.
      flip: mirror left and right, half of the images.
      colours: distort colours.
    """

    size: int
    labels: Labels
    scale: tuple[float, float] = (0.5, 2.0)
    most: float = 0.75
    flip: bool = True
    colours: bool = True

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        image, label = read(example, self.labels)
        scale = rng.uniform(*self.scale)
        long, short = int(windows.LONGEST * self.size * scale), int(self.size * scale)
        resized = windows.fitted(image.shape[:2], max(long, 1), max(short, 1))
        label = opencv.resize_nearest(label, resized)
        room = np.maximum(np.subtract(resized, self.size), 0) + 1
        draws = (tuple(map(int, rng.integers(room))) for _ in itertools.count())
        top, left = choose_crop(label, self.size, self.most, draws)
        height, width = (min(side, self.size) for side in resized)
        image = opencv.resize_linear(image, resized, opencv.Window(top, left, height, width))
        label = label[top : top + height, left : left + width]
        if self.flip and rng.random() < ODDS:
            image, label = image[:, ::-1], label[:, ::-1]
        if self.colours:
            image = distort(image, Distortion.draw(rng))
        out = {
            "image": np.empty((self.size, self.size, 3), np.uint8),
            "label": np.full((self.size, self.size), IGNORED, np.uint8),
            "size": np.array((height, width), np.int32),
            "index": np.int32(example["index"]),
        }
        out["image"][:] = windows.PADDING
        out["image"][:height, :width], out["label"][:height, :width] = image, label
        return out


@dataclasses.dataclass(frozen=True)
class EvalSegmentation:
    """Example -> image uint8 [H,W,3], label uint8 [H,W] and index: of their own size. `windows.segment` resizes."""

    labels: Labels

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        del rng
        image, label = read(example, self.labels)
        return {"image": image, "label": label, "index": np.int32(example["index"])}


def read(example: dict, labels: Labels) -> tuple[np.ndarray, np.ndarray]:
    """(image uint8 [H,W,3], label uint8 [H,W]). Raises Unreadable naming the file: also if the two sizes differ."""
    where = example.get("path") or f"example {example['index']}"
    image, label = transforms.decode(example["image"], where), labels.read(example)
    if image.shape[:2] != label.shape:
        (height, width), (rows, columns) = image.shape[:2], label.shape
        other = example.get("label_path") or where
        raise errors.Unreadable(f"{other} has {columns}x{rows} pixels, but its image {where} has {width}x{height}")
    return image, label

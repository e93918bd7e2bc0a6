"""The user's own images, each on its canvas, and what of the canvas is to be drawn anew: inpainting and outpainting."""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from addp_jax import errors, files, parameters
from addp_jax.data import sources, transforms
from addp_jax.data.sources import image_folder

WHITE = 128  # a mask's pixel at least this bright is drawn anew


class Box(NamedTuple):
    """A rectangle of the canvas, in pixels."""

    top: int
    left: int
    height: int
    width: int


class OwnImages:
    """The images of a folder on canvases [S,S].

    Every image is resized, and cropped in the middle, to fill the part of the canvas that the margins leave; with
    `whole` it is shrunk until it fits there, uncropped. Outside of it the canvas repeats its border and is drawn anew.

    Args:
      folder: config.generate.images.
      size: S, pixels of the canvas.
      masks: a folder with a mask for every image, of the same name up to the ending, or one mask for all; "" = none.
        A mask has the size of its image, or is a square, which is that of the canvas.
      margins: left, top, right, bottom, fractions of the canvas.
      whole: see above.

    `skipped` gathers the files that could not be read, {path: why}.
    Raises UserError: no images, a mask that is missing, black or of another shape, no room between the margins.
    """

    def __init__(self, folder: str, size: int, masks: str = "", margins=(0.0, 0.0, 0.0, 0.0), whole: bool = False):
        self.files = image_folder.open_folder(folder, "config.generate.images")
        self.size, self.masks, self.whole, self.skipped = size, masks, whole, {}
        self.inner = inner_box(margins, size)
        self.placed = functools.partial(placed, room=self.inner, whole=whole)  # (height, width) -> Box
        self.shapes = [self._read(i, transforms.image_size) for i in range(len(self))]  # None: unreadable
        if not any(self.shapes):
            problem = f"none of the {len(self)} files in {folder!r} is an image"
            reasons = parameters.shortened(list(self.skipped.values()), 3)
            raise errors.UserError(f"config.generate.images: {problem}: {reasons}")
        self._mask_paths = self._find_masks()

    def __len__(self) -> int:
        return len(self.files)

    def name(self, i: int) -> str:
        return pathlib.Path(self.files.path(i)).stem

    def _read(self, i: int, read):
        """`read(path)`, or None for a file that cannot be read, which is then in `skipped`."""
        path = self.files.path(i)
        try:
            return None if path in self.skipped else read(path)
        except errors.UserError as error:
            self.skipped[path] = " ".join(str(error).split())

    def summary(self) -> str:
        """One line: how many images there are, and what had to be done to them."""
        boxes = [(shape, self.placed(shape)) for shape in self.shapes if shape]
        outside = "with bands beside it" if self.whole else "cropped in the middle"
        changes = {
            f"resized to {self.size} pixels": sum(shape != box[2:] for shape, box in boxes),
            outside: sum(box != self.inner for _, box in boxes),
            "unreadable": len(self.skipped),
        }
        counts = ", ".join(f"{count} {change}" for change, count in changes.items() if count)
        return f"{self.files.root}: {len(self)} images" + f"; {counts}" * bool(counts)

    def fingerprint(self) -> str:
        """Changes with the images and the masks."""
        digest = hashlib.blake2b(self.files.fingerprint(times=True).encode(), digest_size=8)
        for path in dict.fromkeys(path for path in self._mask_paths if path):
            digest.update(files.read_bytes(path))
        return digest.hexdigest()

    def image(self, i: int):
        """uint8 [S,S,3], or None for a file that cannot be read, which is then in `skipped`."""
        image = self._read(i, lambda path: transforms.decode(self.files[i]["image"], path))
        return None if image is None else fill(image, self.placed(image.shape[:2]), self.inner, self.size)

    def redrawn(self, i: int) -> np.ndarray:
        """bool [S,S]: the pixels to draw anew; those outside the image, and those under its mask."""
        shape = self.shapes[i]
        return redrawn(shape, self.placed(shape), self.inner, self.size, self._mask_paths[i])

    def _find_masks(self):
        if not self.masks:
            return [None] * len(self)
        if pathlib.Path(self.files.root).resolve() in pathlib.Path(self.masks).resolve().parents:
            advice = f"lies among the images; move it out of {self.files.root!r}"
            raise errors.UserError(f"config.generate.masks: {self.masks!r} {advice}")
        if not os.path.isdir(self.masks):
            return [self.masks] * len(self)
        folder, masks, owners = image_folder.open_folder(self.masks, "config.generate.masks"), {}, {}
        for i in range(len(folder)):
            path = masks.setdefault(place(folder, i), folder.path(i))
            if path != folder.path(i):
                advice = f"{path} and {folder.path(i)} are for the same image; remove one"
                raise errors.UserError(f"config.generate.masks: {advice}")
        return [self._mask_of(i, masks, owners) if shape else None for i, shape in enumerate(self.shapes)]

    def _mask_of(self, i: int, masks: dict[str, str], owners: dict[str, str]) -> str:
        """The mask at the image's own place below the folder of masks, or else the one of its name; no other image's.

        owners: the image that each mask was given to before.
        """
        path, key = self.files.path(i), place(self.files, i)
        if key not in masks and self.name(i) not in masks:
            raise errors.UserError(f"config.generate.masks: {self.masks!r} has no mask named {key!r} for {path}")
        key = key if key in masks else self.name(i)
        if owners.setdefault(key, path) != path:
            raise errors.UserError(
                f"config.generate.masks: {masks[key]} could belong to {owners[key]} and to {path}; give each a mask of "
                "its own, named by its place below the folder of images"
            )
        return masks[key]


def place(folder: sources.Files, i: int) -> str:
    """Where a file lies below its folder, without its ending."""
    return os.path.splitext(os.path.relpath(folder.path(i), folder.root))[0]


def inner_box(margins, size: int) -> Box:
    """The part of the canvas that the margins leave. Raises UserError if there is none."""
    left, top, right, bottom = (round(size * margin) for margin in margins)
    box = Box(top, left, size - top - bottom, size - left - right)
    if min(margins) < 0 or min(box[2:]) < 1:
        advice = "use fractions of the canvas from 0, left + right and top + bottom below 1"
        raise errors.UserError(f"config.generate.margins: {tuple(margins)} leaves no room for an image; {advice}")
    return box


def placed(shape, room: Box, whole: bool) -> Box:
    """Where an image of (height, width) lies once resized; beyond the room where it will be cropped."""
    scales = [extent / length for extent, length in zip(room[2:], shape)]
    scale = min(scales) if whole else max(scales)
    height, width = (max(1, round(length * scale)) for length in shape)
    return Box(room.top + (room.height - height) // 2, room.left + (room.width - width) // 2, height, width)


def fitted(picture: Image.Image, box: Box, inner: Box, filter) -> tuple[np.ndarray, Box]:
    """`picture` resized to its box, [H,W,...], and the box.

    Of one that would have more than MAX_STRIP pixels only what lies in `inner` is resized, which may differ from a cut
    of the whole by what Pillow rounds between its two passes.
    """
    kept = overlap(box, inner) if box.height * box.width > transforms.MAX_STRIP else box
    across, down = picture.width / box.width, picture.height / box.height
    left, top = (kept.left - box.left) * across, (kept.top - box.top) * down
    region = left, top, min(left + kept.width * across, picture.width), min(top + kept.height * down, picture.height)
    return np.asarray(picture.resize((kept.width, kept.height), filter, region)), kept


def overlap(*boxes: Box) -> Box:
    top, left = (max(box[k] for box in boxes) for k in (0, 1))
    bottom, right = (min(box[k] + box[k + 2] for box in boxes) for k in (0, 1))
    return Box(top, left, bottom - top, right - left)


def on_canvas(image: np.ndarray, box: Box, inner: Box, size: int) -> np.ndarray:
    """The image in its box, cropped to `inner`; around it its border repeated: [S,S,...]."""
    rows, columns = (
        np.clip(np.clip(np.arange(size), start, start + extent - 1) - placed, 0, length - 1)
        for start, extent, placed, length in zip(inner[:2], inner[2:], box[:2], image.shape)
    )
    return np.ascontiguousarray(image[rows[:, None], columns[None]])


@functools.lru_cache(maxsize=64)  # one mask serves many images
def redrawn(shape, box: Box, inner: Box, size: int, mask_path) -> np.ndarray:
    """bool [S,S]; see `OwnImages.redrawn`. A pixel is drawn anew if any that is shrunk into it is white."""
    top, left, height, width = overlap(box, inner)
    outside = np.ones((size, size), bool)
    outside[top : top + height, left : left + width] = False
    if mask_path is None:
        return outside
    white = read_mask(mask_path)
    if white.shape == shape:
        return outside | (moved(white, box, inner, size) & ~outside)
    if white.shape[0] == white.shape[1]:
        canvas = Box(0, 0, size, size)
        return outside | moved(white, canvas, canvas, size)
    raise errors.UserError(
        f"config.generate.masks: {mask_path} has {white.shape[1]}x{white.shape[0]} pixels, its image "
        f"{shape[1]}x{shape[0]}; give a mask of the same size, or a square one for the canvas"
    )


def moved(white: np.ndarray, box: Box, inner: Box, size: int) -> np.ndarray:
    """The mask `white` bool [H,W] of an image, on the canvas: bool [S,S]."""
    share, kept = fitted(Image.fromarray(white.astype(np.float32)), box, inner, Image.Resampling.BOX)
    return on_canvas(share > 0, kept, inner, size)


def fill(image: np.ndarray, box: Box, inner: Box, size: int) -> np.ndarray:
    """`image` uint8 [H,W,3] on the canvas: uint8 [S,S,3]."""
    resized, box = fitted(Image.fromarray(image), box, inner, Image.Resampling.BICUBIC)
    return on_canvas(resized, box, inner, size)


def fit(image: np.ndarray, white: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """`image` uint8 [H,W,3] and its mask bool [H,W] on a canvas that they fill: (uint8 [S,S,3], bool [S,S])."""
    canvas = Box(0, 0, size, size)
    box = placed(image.shape[:2], canvas, whole=False)
    return fill(image, box, canvas, size), moved(white, box, canvas, size)


def read_mask(path: str) -> np.ndarray:
    """bool [H,W], True = drawn anew: white, and opaque where the mask has transparency.

    Raises UserError naming the file if it is no image or has nothing to draw anew.
    """
    field = "config.generate.masks"
    try:
        with files.open_regular(path) as file:
            white = painted(transforms.grey8(transforms.open_image(file, path)))
    except OSError as error:
        raise errors.UserError(f"{field}: cannot read {path!r}: {files.reason(error)}") from error
    except errors.Unreadable as error:
        raise errors.UserError(f"{field}: {error}") from error
    if not white.any():
        advice = "paint white what is to be drawn anew"
        raise errors.UserError(f"{field}: {path} is black all over, or transparent; {advice}")
    return white


def painted(picture: Image.Image) -> np.ndarray:
    """bool [H,W]: what of an image of 8 bits is white, and opaque where it has transparency."""
    if not picture.has_transparency_data:
        return np.asarray(picture.convert("L")) >= WHITE
    grey, alpha = picture.convert("RGBA").convert("LA").split()
    return np.minimum(np.asarray(grey), np.asarray(alpha)) >= WHITE


def to_tokens(redrawn: np.ndarray, grid: int) -> np.ndarray:
    """bool [S,S] pixels -> bool [L] tokens: a token is drawn anew if any of its pixels is."""
    patch = len(redrawn) // grid
    return redrawn.reshape(grid, patch, grid, patch).any((1, 3)).reshape(-1)


def blend(drawn: np.ndarray, own: np.ndarray, redrawn: np.ndarray, feather: int) -> np.ndarray:
    """`drawn` where `redrawn` [S,S], `own` farther than `feather` pixels away, both in between: uint8 [...,S,S,3]."""
    mask = Image.fromarray(redrawn.astype(np.uint8) * 255)
    widened = mask.filter(ImageFilter.MaxFilter(2 * (feather // 2) + 1))
    weight = np.asarray(widened.filter(ImageFilter.BoxBlur(feather // 2)), np.float32)[..., None] / 255
    return np.rint(weight * drawn + (1 - weight) * own).astype(np.uint8)

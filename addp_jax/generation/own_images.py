"""The user's own images, each on its canvas, and what of the canvas is to be drawn anew: inpainting and outpainting."""

from __future__ import annotations

import collections
import functools
import hashlib
import os
import pathlib
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from addp_jax import errors, files, parameters
from addp_jax.data import transforms
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

    Every image is resized, and cropped in the middle, to fill the part of the canvas that the margins leave; with `whole`
    it is shrunk until it fits there, uncropped. Outside of it the canvas repeats the image's border, and is drawn anew.

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
        self.shapes = [self._shape(i) for i in range(len(self.files))]  # (height, width); None: unreadable
        if not any(self.shapes):
            reasons = parameters.shortened(list(self.skipped.values()), 3)
            raise errors.UserError(f"config.generate.images: none of the {len(self)} files in {folder!r} is an image: {reasons}")
        self._mask_paths = self._find_masks()

    def __len__(self) -> int:
        return len(self.files)

    def name(self, i: int) -> str:
        return pathlib.Path(self.files.path(i)).stem

    def _shape(self, i: int):
        """From the header alone."""
        path = self.files.path(i)
        try:
            return transforms.image_size(path)
        except errors.Unreadable as error:
            self._skip(path, str(error))
            return None

    def _skip(self, path: str, reason: str) -> None:
        self.skipped[path] = " ".join(reason.split())

    def summary(self) -> str:
        """One line: how many images there are, and what had to be done to them."""
        boxes = {i: self.placed(shape) for i, shape in enumerate(self.shapes) if shape}
        changes = {
            f"resized to {self.size} pixels": sum(self.shapes[i] != box[2:] for i, box in boxes.items()),
            "cropped in the middle": sum(box != self.inner for box in boxes.values()) if not self.whole else 0,
            "with bands beside it": sum(box != self.inner for box in boxes.values()) if self.whole else 0,
            "unreadable": len(self.skipped),
        }
        told = [f"{count} {change}" for change, count in changes.items() if count]
        return f"{self.files.root}: {len(self)} images" + ("; " + ", ".join(told) if told else "")

    def placed(self, shape) -> Box:
        """Where an image of (height, width) lies once resized; beyond the canvas where it will be cropped."""
        return placed(shape, self.inner, self.whole)

    def fingerprint(self) -> str:
        """Changes with the images and the masks."""
        digest = hashlib.blake2b(self.files.fingerprint(times=True).encode(), digest_size=8)
        for path in dict.fromkeys(path for path in self._mask_paths if path):
            digest.update(files.read_bytes(path))
        return digest.hexdigest()

    def image(self, i: int):
        """uint8 [S,S,3], or None for a file that cannot be read, which is then in `skipped`."""
        path = self.files.path(i)
        if path in self.skipped:
            return None
        try:
            image = transforms.decode(self.files[i]["image"], path)
        except errors.UserError as error:
            self._skip(path, str(error))
            return None
        resized, box = fitted(Image.fromarray(image), self.placed(image.shape[:2]), self.inner, Image.Resampling.BICUBIC)
        return on_canvas(resized, box, self.inner, self.size)

    def redrawn(self, i: int) -> np.ndarray:
        """bool [S,S]: the pixels to draw anew; those outside the image, and those under its mask."""
        shape = self.shapes[i]
        return redrawn(shape, self.placed(shape), self.inner, self.size, self._mask_paths[i])

    def _find_masks(self):
        if not self.masks:
            return [None] * len(self)
        if pathlib.Path(self.files.root).resolve() in pathlib.Path(self.masks).resolve().parents:
            root = self.files.root
            raise errors.UserError(f"config.generate.masks: {self.masks!r} lies among the images; move it out of {root!r}")
        if not os.path.isdir(self.masks):
            return [self.masks] * len(self)
        masks, found = image_folder.open_folder(self.masks, "config.generate.masks"), {}
        for path in (masks.path(i) for i in range(len(masks))):
            place = os.path.splitext(os.path.relpath(path, masks.root))[0]
            if place in found:
                raise errors.UserError(f"config.generate.masks: {found[place]} and {path} are for the same image; remove one")
            found[place] = path
        return [self._mask_of(i, found) if shape else None for i, shape in enumerate(self.shapes)]

    def _mask_of(self, i: int, found: dict[str, str]) -> str:
        """The mask at the image's own place below the folder of masks, or else the one of its name; no other image's."""
        place = lambda k: os.path.splitext(os.path.relpath(self.files.path(k), self.files.root))[0]
        own, key = self.files.path(i), place if place(i) in found else self.name
        if key(i) not in found:
            raise errors.UserError(f"config.generate.masks: {self.masks!r} has no mask named {place(i)!r} for {own}")
        others = [self.files.path(k) for k in self._namesakes[self.name(i)] if k != i and key(k) == key(i)]
        if others:
            raise errors.UserError(
                f"config.generate.masks: {found[key(i)]} could belong to {own} and to {others[0]}; give each a mask of its own, "
                "named by its place below the folder of images"
            )
        return found[key(i)]

    @functools.cached_property
    def _namesakes(self) -> dict[str, list[int]]:
        """The readable images of each name."""
        found = collections.defaultdict(list)
        for i, shape in enumerate(self.shapes):
            if shape:
                found[self.name(i)].append(i)
        return found


def inner_box(margins, size: int) -> Box:
    """The part of the canvas that the margins leave. Raises UserError if there is none."""
    left, top, right, bottom = (round(size * margin) for margin in margins)
    box = Box(top, left, size - top - bottom, size - left - right)
    if min(margins) < 0 or min(box[2:]) < 1:
        raise errors.UserError(
            f"config.generate.margins: {tuple(margins)} leaves no room for an image; use fractions of the canvas from 0, "
            "left + right and top + bottom below 1"
        )
    return box


def placed(shape, room: Box, whole: bool) -> Box:
    """See `OwnImages.placed`."""
    height, width = shape
    choose = min if whole else max
    scale = choose(room.height / height, room.width / width)
    height, width = max(1, round(height * scale)), max(1, round(width * scale))
    return Box(room.top + (room.height - height) // 2, room.left + (room.width - width) // 2, height, width)


def fitted(picture: Image.Image, box: Box, inner: Box, filter) -> tuple[np.ndarray, Box]:
    """`picture` resized to its box, [H,W,...], and the box. Of one that would have more than MAX_STRIP pixels only what lies
    in `inner` is resized, which may differ from a cut of the whole by what Pillow rounds between its two passes."""
    kept = box
    if box.height * box.width > transforms.MAX_STRIP:
        top, left = max(box.top, inner.top), max(box.left, inner.left)
        bottom, right = (min(start + extent for start, extent in (box[k::2], inner[k::2])) for k in (0, 1))
        kept = Box(top, left, bottom - top, right - left)
    across, down = picture.width / box.width, picture.height / box.height
    left, top = (kept.left - box.left) * across, (kept.top - box.top) * down
    region = left, top, min(left + kept.width * across, picture.width), min(top + kept.height * down, picture.height)
    return np.asarray(picture.resize((kept.width, kept.height), filter, region)), kept


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
    top, left = max(box.top, inner.top), max(box.left, inner.left)
    bottom, right = (min(start + extent for start, extent in (box[k::2], inner[k::2])) for k in (0, 1))
    outside = np.ones((size, size), bool)
    outside[top:bottom, left:right] = False
    if mask_path is None:
        return outside
    white = read_mask(mask_path)
    if white.shape == shape:
        return outside | (moved(white, box, inner, size) & ~outside)
    if white.shape[0] == white.shape[1]:
        return outside | shrunk(white, size, size)
    raise errors.UserError(
        f"config.generate.masks: {mask_path} has {white.shape[1]}x{white.shape[0]} pixels, its image {shape[1]}x{shape[0]}; "
        "give a mask of the same size, or a square one for the canvas"
    )


def moved(white: np.ndarray, box: Box, inner: Box, size: int) -> np.ndarray:
    """The mask `white` bool [H,W] of an image, on the canvas: bool [S,S]."""
    share, kept = fitted(Image.fromarray(white.astype(np.float32)), box, inner, Image.Resampling.BOX)
    return on_canvas(share > 0, kept, inner, size)


def fit(image: np.ndarray, white: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """`image` uint8 [H,W,3] and its mask bool [H,W] on a canvas that they fill: (uint8 [S,S,3], bool [S,S])."""
    inner = Box(0, 0, size, size)
    box = placed(image.shape[:2], inner, whole=False)
    resized, kept = fitted(Image.fromarray(image), box, inner, Image.Resampling.BICUBIC)
    return on_canvas(resized, kept, inner, size), moved(white, box, inner, size)


def read_mask(path: str) -> np.ndarray:
    """bool [H,W], True = drawn anew: white, and opaque where the mask has transparency.

    Raises UserError naming the file if it is no image or has nothing to draw anew.
    """
    try:
        with files.open_regular(path) as file:
            picture = transforms.grey8(transforms.open_image(file, path))
    except OSError as error:
        raise errors.UserError(f"config.generate.masks: cannot read {path!r}: {files.reason(error)}") from error
    except errors.Unreadable as error:
        raise errors.UserError(f"config.generate.masks: {error}") from error
    white = painted(picture)
    if not white.any():
        raise errors.UserError(f"config.generate.masks: {path} is black all over, or transparent; paint white what is to be drawn anew")
    return white


def painted(picture: Image.Image) -> np.ndarray:
    """bool [H,W]: what of an image of 8 bits is white, and opaque where it has transparency."""
    if not picture.has_transparency_data:
        return np.asarray(picture.convert("L")) >= WHITE
    grey, alpha = picture.convert("RGBA").convert("LA").split()
    return np.minimum(np.asarray(grey), np.asarray(alpha)) >= WHITE


def shrunk(white: np.ndarray, height: int, width: int) -> np.ndarray:
    share = Image.fromarray(white.astype(np.float32)).resize((width, height), Image.Resampling.BOX)
    return np.asarray(share) > 0


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

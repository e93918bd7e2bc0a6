"""What a caller may give: images, masks and whole numbers. A mistake is a ValueError that names the argument."""

from __future__ import annotations

import operator

import numpy as np
from PIL import Image, ImageOps

from addp_jax import errors
from addp_jax.data import transforms
from addp_jax.generation import own_images


def whole_number(name: str, value, least: int, most: int | None = None) -> int:
    """`value` as an int in [least, most]."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, (bool, np.bool_)) or number < least or (most is not None and number > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}: {value!r}; give a whole number {bounds}")
    return number


def image(name: str, value) -> np.ndarray:
    """One image, a PIL image or an array, as uint8 [H,W,3]."""
    if isinstance(value, Image.Image):
        return np.asarray(transforms.rgb(ImageOps.exif_transpose(value)))
    array = np.asarray(value)
    if array.dtype.kind == "f":
        raise ValueError(f"{name}: {array.dtype} values; give uint8, of an image in [0,1]: np.uint8(255 * image)")
    if not array.size:
        raise ValueError(f"{name}: an image of shape {list(array.shape)} has no pixels")
    try:
        return transforms.decode(array, name)
    except errors.UserError as error:
        raise ValueError(str(error)) from error


def images(name: str, value) -> list[np.ndarray]:
    """One image, a list of them, or an array [N,H,W,3], as a list of uint8 [H,W,3]."""
    if isinstance(value, Image.Image):
        value = [value]
    elif not isinstance(value, (list, tuple)):
        value = np.asarray(value)
        value = value if value.ndim == 4 else [value]
    if not len(value):
        raise ValueError(f"{name}: there are none")
    return [image(name, entry) for entry in value]


def squares(name: str, value, size: int, crop_pct: float = 1.0) -> np.ndarray:
    """`images`, each resized and cropped in the centre as in an evaluation: uint8 [N,size,size,3]."""
    short = int(size / crop_pct)
    return np.stack([transforms.centre_square(array, short, size) for array in images(name, value)])


def mask(name: str, value, shape: tuple[int, int]) -> np.ndarray:
    """A PIL image, whose white is True, or a bool array, as bool [H,W] of this shape."""
    if isinstance(value, Image.Image):
        value = own_images.painted(transforms.grey8(value))
    array = np.asarray(value)
    if array.dtype != bool:
        raise ValueError(f"{name}: {array.dtype} values; give bool, True where the image is drawn anew, or a PIL image")
    if array.shape != shape:
        raise ValueError(f"{name}: shape {list(array.shape)}; give that of the image, {list(shape)}")
    if not array.any():
        raise ValueError(f"{name}: empty; set to True (or paint white) what is drawn anew")
    return array

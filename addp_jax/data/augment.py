"""Augmentation for fine-tuning, on the host: RandAugment (arXiv:1909.13719) and random erasing (arXiv:1708.04896).

Both behave as timm's `rand-m9-mstd0.5-inc1` and `RandomErasing(mode="pixel")`, which the release uses: the same
operations, ranges and odds on PIL images. The random numbers are numpy's.
"""

import dataclasses
import math

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from addp_jax import schema
from addp_jax.data import transforms

LAYERS = 2  # operations drawn per image, with repetition
PROBABILITY = 0.5  # that a drawn operation is applied
MOST = 10.0  # magnitude
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # ImageNet's, of RGB in [0,1]
FILL = tuple(int(round(255 * mean)) for mean in MEAN)  # what comes in from outside the image
ERASED_AREA = (0.02, 1 / 3)  # fraction of the image
ERASED_RATIO = (0.3, 1 / 0.3)  # height / width
ERASE_TRIES = 10


@schema.config
class Config:
    """Fields of `config.model.augment`."""

    magnitude: float = schema.field(9.0, least=0, most=MOST)  # of RandAugment; 0 = off
    magnitude_std: float = schema.field(0.5, least=0)  # drawn anew for every operation
    erase: float = schema.field(0.25, least=0, most=1)  # share of the images with one erased box


@dataclasses.dataclass(frozen=True)
class AugmentedImage:
    """`crop` (a training transform), then RandAugment, then erasing."""

    crop: transforms.TrainImage
    config: Config

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        example = self.crop(example, rng)
        image = example["image"]
        if self.config.magnitude:
            image = rand_augment(image, self.config.magnitude, self.config.magnitude_std, rng)
        if rng.random() < self.config.erase:
            image = erase(image, rng)
        return example | {"image": image}


def rand_augment(image: np.ndarray, magnitude: float, std: float, rng: np.random.Generator) -> np.ndarray:
    """Two random operations on `image` uint8 [H,W,3], each made with probability 1/2."""
    picture = Image.fromarray(image)
    for index in rng.integers(len(OPERATIONS), size=LAYERS):
        if rng.random() < PROBABILITY:
            level = min(max(rng.normal(magnitude, std), 0.0), MOST) / MOST
            picture = OPERATIONS[index](picture, level, -1 if rng.random() < 0.5 else 1)
    return np.asarray(picture)


def _affine(picture: Image.Image, matrix: tuple) -> Image.Image:
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=FILL)


def _enhance(kind):
    """Moves away from "no change" (factor 1) in either direction, never below 0.1."""
    return lambda picture, level, sign: kind(picture).enhance(max(0.1, 1 + sign * 0.9 * level))


def _rotate(picture, level, sign):
    return picture.rotate(sign * 30 * level, Image.Resampling.BICUBIC, fillcolor=FILL)


def _solarize_add(picture, level, sign):
    add = min(128, int(110 * level))
    return picture.point([min(255, value + add) if value < 128 else value for value in range(256)] * 3)


def _posterize(picture, level, sign):
    """Keeps the upper 4 to 0 bits: at level 1 nothing is left, which today's ImageOps.posterize refuses."""
    kept = 4 - int(4 * level)
    return picture.point([value & (256 - 2 ** (8 - kept)) for value in range(256)] * 3)


# (picture, level 0..1, sign -1 or 1) -> picture.
OPERATIONS = (
    lambda picture, level, sign: ImageOps.autocontrast(picture),
    lambda picture, level, sign: ImageOps.equalize(picture),
    lambda picture, level, sign: ImageOps.invert(picture),
    _rotate,
    _posterize,
    lambda picture, level, sign: ImageOps.solarize(picture, 256 - min(256, int(256 * level))),
    _solarize_add,
    _enhance(ImageEnhance.Color),
    _enhance(ImageEnhance.Contrast),
    _enhance(ImageEnhance.Brightness),
    _enhance(ImageEnhance.Sharpness),
    lambda picture, level, sign: _affine(picture, (1, sign * 0.3 * level, 0, 0, 1, 0)),  # shear
    lambda picture, level, sign: _affine(picture, (1, 0, 0, sign * 0.3 * level, 1, 0)),
    lambda picture, level, sign: _affine(picture, (1, 0, sign * 0.45 * level * picture.width, 0, 1, 0)),  # shift
    lambda picture, level, sign: _affine(picture, (1, 0, 0, 0, 1, sign * 0.45 * level * picture.height)),
)


def erase(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`image` uint8 [H,W,3] with one box of noise; as it is if ten random boxes do not fit.

    Departs from the release: its noise is normal around ImageNet's mean after normalisation; ours is the same
    cut to what uint8 pixels can hold.
    """
    height, width = image.shape[:2]
    low, high = (math.log(ratio) for ratio in ERASED_RATIO)
    for _ in range(ERASE_TRIES):
        area = rng.uniform(*ERASED_AREA) * height * width
        ratio = math.exp(rng.uniform(low, high))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < height and w < width:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            image = image.copy()
            noise = MEAN + STD * rng.standard_normal((h, w, 3))
            image[top : top + h, left : left + w] = np.rint(np.clip(noise, 0, 1) * 255)
            return image
    return image

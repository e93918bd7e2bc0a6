"""Pure functions from (example, rng) to example: decoding, cropping, flipping.

They run in reader threads or worker processes, so each is a frozen dataclass
that pickles. Images stay uint8 [H,W,3] RGB; the device turns them into [0,1].
The resampling agrees bit for bit with torchvision on PIL images.
"""

import dataclasses
import io
import math

import numpy as np
from PIL import Image, ImageOps

from addp_jax import errors

_CROP_TRIES = 10
_ASPECT_RATIOS = (3 / 4, 4 / 3)


def decode(image: bytes | np.ndarray, where: str, upright: bool = True) -> np.ndarray:
    """Reads an encoded image, or checks an array, into uint8 RGB [H,W,3], not to be written to.

    Any PIL mode is accepted: transparency is dropped, 16-bit grey is scaled to
    8 bits, CMYK and palettes are converted. The EXIF orientation is applied.

    Departs from the release: its loader ignores the EXIF orientation, which
    turns phone pictures on their side.

    Args:
      image: the bytes of a file, or an array [H,W], [H,W,1], [H,W,3] or [H,W,4].
      where: the file, for the error message.
      upright: False leaves a file's pixels as they are stored.

    Raises:
      UserError: the bytes are no image, are truncated or unreasonably large, or
        the array is not uint8.
    """
    if isinstance(image, np.ndarray):
        return _rgb_array(image, where)
    try:
        picture = Image.open(io.BytesIO(image))
        picture.load()
        return np.asarray(_rgb(_upright(picture) if upright else picture))
    # A damaged file makes PIL raise nearly anything: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        reason = "not an image file" if isinstance(error, Image.UnidentifiedImageError) else _one_line(error)
        raise errors.UserError(f"cannot decode {where}: {reason}; replace or remove this file") from error


def _rgb_array(image: np.ndarray, where: str) -> np.ndarray:
    if image.ndim == 2:
        image = image[:, :, None]
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3, 4):
        raise errors.UserError(f"{where}: expected a uint8 image [H,W,3], got {image.dtype} {list(image.shape)}")
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image[:, :, :3]


def _upright(picture: Image.Image) -> Image.Image:
    try:
        ImageOps.exif_transpose(picture, in_place=True)
    except Exception:  # an unreadable EXIF block must not cost us a readable picture
        pass
    return picture


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit grey: convert() would clip at 255
        grey = np.asarray(picture).astype(np.float64) / 257
        return Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8)).convert("RGB")
    if picture.mode == "RGB":  # convert() would copy it
        return picture
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # PIL warns about the direct way
    return picture.convert("RGB")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def resize(image: np.ndarray, height: int, width: int, filter=Image.Resampling.BICUBIC) -> np.ndarray:
    """PIL's resize, which antialiases: uint8 [H,W,3] -> uint8 [height,width,3]."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), filter))


def centre_square(image: np.ndarray, short: int, size: int, filter=Image.Resampling.BICUBIC) -> np.ndarray:
    """Resizes the short side to `short` pixels, then cuts the central [size,size,3]."""
    height, width = image.shape[:2]
    if height <= width:
        image = resize(image, short, int(short * width / height), filter)
    else:
        image = resize(image, int(short * height / width), short, filter)
    top = int(round((image.shape[0] - size) / 2.0))
    left = int(round((image.shape[1] - size) / 2.0))
    return image[top : top + size, left : left + size]


def resized_crop(image: np.ndarray, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    """Cuts box = (top, left, height, width) and resizes it to [size,size,3].

    The cut comes first: pixels outside the box never bleed into the result.
    """
    top, left, height, width = box
    return resize(np.ascontiguousarray(image[top : top + height, left : left + width]), size, size)


def random_box(
    height: int, width: int, crop_scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """A random (top, left, height, width) as torchvision's RandomResizedCrop draws it.

    The area is uniform in `crop_scale` (fractions of the image), the aspect
    ratio log-uniform in 3/4..4/3. Ten boxes that do not fit are followed by the
    largest central one of an allowed ratio.
    """
    low, high = (math.log(ratio) for ratio in _ASPECT_RATIOS)
    for _ in range(_CROP_TRIES):
        area = height * width * rng.uniform(*crop_scale)
        ratio = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w = min(width, round(height * _ASPECT_RATIOS[1]))
    h = min(height, round(width / _ASPECT_RATIOS[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def _where(example: dict) -> str:
    return example.get("path") or f"example {example.get('index', '?')}"


@dataclasses.dataclass(frozen=True)
class TrainImage:
    """Random resized crop and horizontal flip; made by `train_image`."""

    size: int
    crop_scale: tuple[float, float]
    flip: bool

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        image = decode(example["image"], _where(example))
        if self.crop_scale[0] < 1:
            box = random_box(*image.shape[:2], self.crop_scale, rng)
            image = resized_crop(image, box, self.size)
        else:
            image = centre_square(image, self.size, self.size)
        if self.flip and rng.random() < 0.5:
            image = image[:, ::-1]
        return {"image": np.ascontiguousarray(image), "label": np.int32(example["label"])}


@dataclasses.dataclass(frozen=True)
class EvalImage:
    """Short-side resize and centre crop; made by `eval_image`."""

    size: int
    crop_pct: float

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        del rng
        image = decode(example["image"], _where(example))
        image = centre_square(image, int(self.size / self.crop_pct), self.size)
        return {"image": np.ascontiguousarray(image), "label": np.int32(example["label"])}


def train_image(size: int, crop_scale: tuple[float, float] = (0.2, 1.0), flip: bool = True) -> TrainImage:
    """The training transform: example -> {"image": uint8 [size,size,3], "label": int32}.

    Args:
      size: side of the result in pixels.
      crop_scale: range of the crop's area as a fraction of the image. From
        (1.0, 1.0) no random crop is made but the central square is taken, which
        leaves an image of the right size as it is.
      flip: mirror left and right with probability 1/2.
    """
    return TrainImage(size, tuple(crop_scale), flip)


def eval_image(size: int, crop_pct: float = 1.0) -> EvalImage:
    """The evaluation transform: example -> {"image": uint8 [size,size,3], "label": int32}.

    Args:
      size: side of the result in pixels.
      crop_pct: fraction (0, 1] of the resized short side that the crop keeps.
    """
    return EvalImage(size, crop_pct)

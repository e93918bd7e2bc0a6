"""Pure functions from (example, rng) to example: decoding, cropping, flipping.

They run in reader threads or worker processes, so each is a frozen dataclass that pickles. Images stay uint8 [H,W,3]
RGB; the device turns them into [0,1]. The resampling agrees bit for bit with torchvision on PIL images.

`open_image` opens every image and mask of a user: of the formats in FORMATS only, which the content tells, whatever the
name; of at most MAX_PIXELS; upright. No other decoder of Pillow is reached, and no program is ever started.
"""

import contextlib
import dataclasses
import io
import math
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps

from addp_jax import errors, files

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 2**26  # of an image; a small file can claim any size
MAX_STRIP = 2**23  # pixels of a resized image of which most would be cut away
ROWS = 64  # of a 16-bit image that are converted at a time
_CROP_TRIES = 10
_ASPECT_RATIOS = (3 / 4, 4 / 3)

Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit warns on stderr first; `open_image` refuses in one line
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # of damaged tags beside readable pixels


@contextlib.contextmanager
def _decoding(where: str) -> Iterator[None]:
    """Raises Unreadable naming `where` for what the block raises: a damaged file makes PIL raise nearly anything."""
    try:
        yield
    except Exception as error:
        raise errors.Unreadable(f"cannot decode {where}: {problem(error)}; replace or remove this file") from error


def open_image(file, where: str, upright: bool = True) -> Image.Image:
    """The decoded image in a binary file object, turned as its EXIF orientation says.

    Raises Unreadable naming `where`: no image of a format in FORMATS, truncated, damaged, or of too many pixels.
    """
    with _decoding(where):
        picture = Image.open(file, formats=FORMATS)
        _check_size(picture)
        picture.load()
    if upright:
        with contextlib.suppress(Exception):  # an unreadable EXIF block must not cost us a readable picture
            ImageOps.exif_transpose(picture, in_place=True)
    return picture


def image_size(path: str) -> tuple[int, int]:
    """(height, width) of the upright image in a file, from its header. Raises Unreadable naming the file."""
    with _decoding(path), files.open_regular(path) as file, Image.open(file, formats=FORMATS) as picture:
        _check_size(picture)
        exif = Image.Image.getexif(picture)  # a PNG's own method would decode the pixels
        turned = exif.get(0x0112, 1) >= 5  # the orientations that lie on their side
        return picture.size if turned else picture.size[::-1]


def _check_size(picture: Image.Image) -> None:
    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(f"{picture.width}x{picture.height} pixels; at most {MAX_PIXELS >> 20} million are read")


def problem(error: Exception) -> str:
    """What is wrong with an image file, in a few words."""
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not an image file ({', '.join(FORMATS)})"
    return files.reason(error)


def decode(image: bytes | np.ndarray, where: str, upright: bool = True) -> np.ndarray:
    """Reads an encoded image, or checks an array, into uint8 RGB [H,W,3], not to be written to.

    Any PIL mode is accepted, see `rgb`. The EXIF orientation is applied.
    Departs from the release: its loader ignores the orientation, which turns phone pictures on their side.

    Args:
      image: the bytes of a file, or an array [H,W], [H,W,1], [H,W,3] or [H,W,4].
      where: the file, for the error message.
      upright: False leaves a file's pixels as they are stored.
    Raises Unreadable: the bytes are no image, are truncated or unreasonably large. UserError: the array is not uint8.
    """
    if isinstance(image, np.ndarray):
        return _rgb_array(image, where)
    picture = open_image(io.BytesIO(image), where, upright)
    with _decoding(where):
        return np.asarray(rgb(picture))


def _rgb_array(image: np.ndarray, where: str) -> np.ndarray:
    if image.ndim == 2:
        image = image[:, :, None]
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3, 4):
        raise errors.UserError(f"{where}: expected a uint8 image [H,W,3], got {image.dtype} {list(image.shape)}")
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image[:, :, :3]


def grey8(picture: Image.Image) -> Image.Image:
    """A picture of 16-bit or float grey as 8 bits, which `convert` would clip at 255; any other as it is."""
    if picture.mode == "F":
        picture = picture.convert("I")
    if not picture.mode.startswith("I"):
        return picture
    grey, out = np.asarray(picture), np.empty(picture.size[::-1], np.uint8)
    for row in range(0, len(grey), ROWS):  # a few rows at a time: their wider copies stay small
        wide = np.clip(grey[row : row + ROWS].astype(np.int64), 0, 65535)
        out[row : row + ROWS] = (wide + 128) // 257  # to nearest
    return Image.fromarray(out)


def rgb(picture: Image.Image) -> Image.Image:
    """A picture of any PIL mode as RGB: transparency dropped, 16-bit grey scaled, CMYK and palettes converted."""
    picture = grey8(picture)
    if picture.mode == "RGB":  # convert() would copy it
        return picture
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # PIL warns about the direct way
    return picture.convert("RGB")


def resize(image: np.ndarray, height: int, width: int, filter=Image.Resampling.BICUBIC) -> np.ndarray:
    """PIL's resize, which antialiases: uint8 [H,W,3] -> uint8 [height,width,3]."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), filter))


def centre_square(image: np.ndarray, short: int, size: int, filter=Image.Resampling.BICUBIC) -> np.ndarray:
    """Resizes the short side to `short` pixels, then cuts the central [size,size,3].

    Of a strip whose resized image would have more than MAX_STRIP pixels, the middle alone is resized; the result may
    differ by rounding.
    """
    height, width = image.shape[:2]
    if max(height, width) * short // max(min(height, width), 1) * short > MAX_STRIP:
        image = _middle(image, MAX_STRIP // short**2)
        height, width = image.shape[:2]
    if height <= width:
        image = resize(image, short, int(short * width / height), filter)
    else:
        image = resize(image, int(short * height / width), short, filter)
    top, left = (int(round((side - size) / 2.0)) for side in image.shape[:2])
    return image[top : top + size, left : left + size]


def _middle(image: np.ndarray, ratio: int) -> np.ndarray:
    """The middle of a strip, its long side at most `ratio` (at least 4) times the short one."""
    longest, cuts = min(image.shape[:2]) * max(ratio, 4), []
    for side in image.shape[:2]:
        length = min(side, longest)
        length -= (side - length) % 2  # the same centre
        cuts.append(slice((side - length) // 2, (side + length) // 2))
    return np.ascontiguousarray(image[tuple(cuts)])


def resized_crop(image: np.ndarray, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    """Cuts box = (top, left, height, width) and resizes it to [size,size,3].

    The cut comes first: pixels outside the box never bleed into the result.
    """
    top, left, height, width = box
    return resize(np.ascontiguousarray(image[top : top + height, left : left + width]), size, size)


def random_box(height: int, width: int, crop_scale: tuple[float, float], rng: np.random.Generator) -> tuple[int, ...]:
    """A random (top, left, height, width) as torchvision's RandomResizedCrop draws it.

    The area is uniform in `crop_scale` (fractions of the image), the aspect ratio log-uniform in 3/4..4/3. Ten boxes
    that do not fit are followed by the largest central one of an allowed ratio.
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


def _with_image(example: dict, image: np.ndarray) -> dict:
    """The example with another image; without its path, which is no array."""
    return {name: value for name, value in example.items() if name != "path"} | {"image": np.ascontiguousarray(image)}


@dataclasses.dataclass(frozen=True)
class TrainImage:
    """Random resized crop and horizontal flip; made by `train_image`."""

    size: int
    crop_scale: tuple[float, float]
    flip: bool

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        image = decode(example["image"], _where(example))
        if self.crop_scale[0] < 1:
            image = resized_crop(image, random_box(*image.shape[:2], self.crop_scale, rng), self.size)
        else:
            image = centre_square(image, self.size, self.size)
        if self.flip and rng.random() < 0.5:
            image = image[:, ::-1]
        return _with_image(example, image)


@dataclasses.dataclass(frozen=True)
class EvalImage:
    """Short-side resize and centre crop; made by `eval_image`."""

    size: int
    crop_pct: float

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        image = decode(example["image"], _where(example))
        return _with_image(example, centre_square(image, int(self.size / self.crop_pct), self.size))


def train_image(size: int, crop_scale: tuple[float, float] = (0.2, 1.0), flip: bool = True) -> TrainImage:
    """The training transform: example -> the same with an image uint8 [size,size,3].

    Args:
      crop_scale: range of the crop's area as a fraction of the image. At (1.0, 1.0) the central square is taken, which
        leaves an image of the right size as it is.
      flip: mirror left and right with probability 1/2.
    """
    return TrainImage(size, tuple(crop_scale), flip)


def eval_image(size: int, crop_pct: float = 1.0) -> EvalImage:
    """The evaluation transform: example -> the same with an image uint8 [size,size,3].

    crop_pct: fraction (0, 1] of the resized short side that the crop keeps.
    """
    return EvalImage(size, crop_pct)

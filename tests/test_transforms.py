"""Decoding, cropping and flipping."""

import hashlib
import io
import os
import pathlib
import pickle
import resource
import tracemalloc
import warnings

import numpy as np
import pytest
from PIL import Image

from addp_jax import errors
from addp_jax.data import transforms

GOLDEN = pathlib.Path(__file__).parent / "golden" / "data.npz"  # made with torchvision


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def assert_golden(name, image):
    golden = np.load(GOLDEN)
    np.testing.assert_array_equal(image[::16], golden[f"{name}_rows"])
    assert hashlib.sha256(image.tobytes()).hexdigest() == golden[f"{name}_sha256"]


def test_eval_image_equals_torchvision_to_the_last_bit():
    example = {"image": np.load(GOLDEN)["src_u8"], "label": 3}
    assert_golden("resize256_crop256_bicubic", transforms.eval_image(256)(example, None)["image"])
    assert_golden("ft_eval224_u8", transforms.eval_image(224, 224 / 256)(example, None)["image"])


def test_resized_crop_equals_torchvision_to_the_last_bit():
    golden = np.load(GOLDEN)
    box = tuple(int(x) for x in golden["crop_ijhw"])
    assert_golden("resized_crop_256", transforms.resized_crop(golden["src_u8"], box, 256))


def test_pixels_outside_the_box_never_enter_the_crop():
    image, other = noise(20, 30), noise(20, 30, 1)
    other[4:12, 5:20] = image[4:12, 5:20]
    box = (4, 5, 8, 15)
    np.testing.assert_array_equal(transforms.resized_crop(image, box, 16), transforms.resized_crop(other, box, 16))


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (33, 33)])
def test_random_boxes_fit_and_keep_area_and_ratio(size):
    rng = np.random.default_rng(0)
    boxes = np.array([transforms.random_box(*size, (0.2, 1.0), rng) for _ in range(300)])
    top, left, height, width = boxes.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= size[0]).all() and (left + width <= size[1]).all()
    area, ratio = height * width / (size[0] * size[1]), width / height
    assert 0.17 < area.min() < 0.4 and 0.8 < area.max() <= 1
    assert 0.68 < ratio.min() < 0.9 and 1.1 < ratio.max() < 1.46
    assert len(set(map(tuple, boxes))) > 200


def test_box_that_never_fits_becomes_the_central_one():
    rng = np.random.default_rng(0)
    assert transforms.random_box(10, 100, (1.0, 1.0), rng) == (0, 43, 10, 13)
    assert transforms.random_box(100, 10, (1.0, 1.0), rng) == (43, 0, 13, 10)


def test_full_crop_of_the_right_size_is_the_identity():
    image = noise(16, 16)
    result = transforms.train_image(16, (1.0, 1.0), flip=False)({"image": image, "label": np.int32(2)}, np.random.default_rng(0))
    np.testing.assert_array_equal(result["image"], image)
    assert result["label"].dtype == np.int32


def test_flip_mirrors_half_of_the_images():
    image, rng = noise(8, 8), np.random.default_rng(0)
    transform = transforms.train_image(8, (1.0, 1.0))
    results = [transform({"image": image, "label": 0}, rng)["image"] for _ in range(200)]
    mirrored = sum(np.array_equal(result, image[:, ::-1]) for result in results)
    kept = sum(np.array_equal(result, image) for result in results)
    assert mirrored + kept == 200 and 70 < mirrored < 130


def test_same_rng_gives_the_same_crop_and_another_rng_another():
    transform = transforms.train_image(16)
    example = {"image": noise(40, 50), "label": 0}
    first, again, other = (transform(example, np.random.default_rng(seed))["image"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (500, 3), (16, 17)])
@pytest.mark.parametrize(
    "transform", [transforms.train_image(16), transforms.eval_image(16), transforms.eval_image(16, 0.875)]
)
def test_every_image_size_gives_the_wanted_size(size, transform):
    result = transform({"image": noise(*size), "label": 0}, np.random.default_rng(0))
    assert result["image"].shape == (16, 16, 3) and result["image"].dtype == np.uint8
    assert set(result) == {"image", "label"}


def test_transforms_pickle():
    for transform in (transforms.train_image(16, (0.5, 1.0)), transforms.eval_image(16)):
        assert pickle.loads(pickle.dumps(transform)) == transform


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "I;16", "F"])
def test_every_mode_becomes_rgb(mode):
    kind = "PNG" if mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else "TIFF"
    if mode == "I;16":
        picture = Image.fromarray(np.full((4, 6), 40000, np.uint16))
    else:
        picture = Image.new("RGB", (6, 4), (200, 200, 200)).convert("L" if mode in ("F", "I", "LA") else "RGB")
        picture = Image.new("LAB", (6, 4)) if mode == "LAB" else picture.convert(mode)
    assert picture.mode == mode
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = transforms.decode(encoded(picture, kind), "a.png")
    assert image.shape == (4, 6, 3) and image.dtype == np.uint8


def test_palette_with_transparency_gives_the_palette_colours():
    picture = Image.new("P", (6, 4), 1)
    picture.putpalette([0, 0, 0, 10, 200, 30])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = transforms.decode(encoded(picture, transparency=b"\x00\x80"), "a.png")
    assert (image == [10, 200, 30]).all()


def test_transparency_is_dropped():
    assert (transforms.decode(encoded(Image.new("RGBA", (2, 2), (9, 8, 7, 0))), "a") == [9, 8, 7]).all()


def test_sixteen_bit_grey_is_scaled_not_clipped():
    grey = np.array([[0, 257, 32768, 65535]], np.uint16)
    image = transforms.decode(encoded(Image.fromarray(grey)), "a.png")
    np.testing.assert_array_equal(image[0, :, 0], [0, 1, 128, 255])


@pytest.mark.parametrize(
    "orientation, upright", [(1, lambda x: x), (3, lambda x: x[::-1, ::-1]), (6, lambda x: np.rot90(x, -1))]
)
def test_exif_orientation_is_respected(orientation, upright):
    image = noise(4, 6)
    exif = Image.Exif()
    exif[0x0112] = orientation
    result = transforms.decode(encoded(Image.fromarray(image), exif=exif), "a.png")
    np.testing.assert_array_equal(result, upright(image))


def test_unreadable_exif_costs_no_picture():
    data = encoded(Image.fromarray(noise(16, 16)), "JPEG", exif=b"Exif\x00\x00garbage")
    assert transforms.decode(data, "a.jpg").shape == (16, 16, 3)


def test_arrays_are_accepted_as_images():
    grey = noise(4, 5)[:, :, 0]
    assert transforms.decode(grey, "a").shape == (4, 5, 3)
    np.testing.assert_array_equal(transforms.decode(grey[:, :, None], "a")[:, :, 2], grey)
    with pytest.raises(errors.UserError, match="folder/7: expected a uint8 image"):
        transforms.decode(np.zeros((4, 4, 3), np.float32), "folder/7")


@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "bomb"])
def test_broken_file_is_named_in_one_line(kind, monkeypatch):
    data = encoded(Image.fromarray(noise(64, 64)), "JPEG")
    data = {"truncated": data[:1500], "text": b"<html>", "empty": b"", "bomb": data}[kind]
    if kind == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(errors.UserError, match="photos/cat.jpg") as caught:
        transforms.decode(data, "photos/cat.jpg")
    assert "\n" not in str(caught.value)


# --- files of strangers -------------------------------------------------------------------------------------------------


def saved_as(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n(hello) =\nshowpage\n%%EOF\n"


def test_only_the_promised_formats_are_opened_and_no_program_is_started(tmp_path, monkeypatch):
    """Pillow would run Ghostscript on PostScript, whatever the file is called."""
    script = tmp_path / "gs"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    others = [saved_as(Image.new("RGB", (8, 8)), kind) for kind in ("PPM", "ICO", "TGA", "PCX", "JPEG2000", "DDS", "SGI")]
    for data in (POSTSCRIPT, b"<html></html>", b"", b"8BPS\0\1", *others):
        with pytest.raises(errors.Unreadable, match="cannot decode x.jpg: not an image file"):
            transforms.decode(data, "x.jpg")
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("kind", ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"))
def test_every_promised_format_is_read_whatever_the_name(kind):
    image = transforms.decode(saved_as(Image.new("RGB", (9, 7), (10, 200, 30)), kind), "x.dat")
    assert image.shape == (7, 9, 3) and abs(image.astype(int) - [10, 200, 30]).max() < 8


def test_too_many_pixels_are_refused_in_one_line_from_the_header(recwarn, tmp_path):
    """Pillow's own limit warns on stderr first."""
    data = saved_as(Image.new("1", (2**14, 2**13)), "PNG")
    (tmp_path / "x.png").write_bytes(data)
    for read in (lambda: transforms.decode(data, "x.png"), lambda: transforms.image_size(str(tmp_path / "x.png"))):
        with pytest.raises(errors.Unreadable, match="16384x8192 pixels; at most 64 million"):
            read()
    assert not recwarn.list


@pytest.mark.parametrize("mode, high", [("I;16", 65535), ("I", 65535), ("F", 65535.0)])
def test_wide_grey_is_scaled_to_the_nearest_of_8_bits(mode, high):
    values = np.array([[0, 128, 129, 257, 32768, high]])
    picture = Image.fromarray(values.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    grey = np.asarray(transforms.grey8(picture))
    np.testing.assert_array_equal(grey, np.clip(np.rint(values.astype(np.float64) / 257), 0, 255).astype(np.uint8))


def test_wide_grey_takes_few_bytes_a_pixel():
    data = saved_as(Image.new("I;16", (3000, 3000)), "PNG")
    tracemalloc.start()
    transforms.decode(data, "x.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * 9e6


@pytest.mark.parametrize("shape", [(3, 9000), (20000, 2)])
def test_a_strip_is_not_resized_as_a_whole(shape):
    strip = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    square = transforms.centre_square(strip, 256, 256)
    assert square.shape == (256, 256, 3)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 150  # MiB; the whole takes 1,900 and 5,800


def test_the_middle_of_a_strip_is_that_of_the_whole():
    strip = np.random.default_rng(0).integers(0, 256, (4, 3000, 3), np.uint8)
    whole = np.asarray(Image.fromarray(strip).resize((64 * 750, 64), Image.Resampling.BICUBIC))
    left = int(round((64 * 750 - 64) / 2.0))
    cut = transforms.centre_square(transforms._middle(strip, 100), 64, 64)
    assert np.abs(cut.astype(int) - whole[:, left : left + 64]).max() <= 1
    np.testing.assert_array_equal(transforms.centre_square(strip, 64, 64), whole[:, left : left + 64])  # small enough as a whole

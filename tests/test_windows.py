"""Whole images by windows of one size."""

import pathlib

import jax
import numpy as np
import pytest

from addp_jax.ops import opencv, windows

GOLDEN = pathlib.Path(__file__).parent / "golden" / "dense"
pytestmark = pytest.mark.golden


def reference_logits(windows_, classes=3):
    """The network of golden seg_eval.npz; padding is NaN, which its mean leaves out."""
    values = np.asarray(windows_, np.float64)
    i, j = np.arange(values.shape[1])[:, None], np.arange(values.shape[2])[None]
    mean = np.nanmean(values[..., 2], axis=(1, 2), keepdims=True)
    maps = [(c + 1) * values[..., 0] - 0.5 * c * values[..., 1] + np.sin(0.3 * i + 0.2 * c * j) + mean for c in range(classes)]
    return np.nan_to_num(np.stack(maps, -1)).astype(np.float32)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("case", "abcd")
def test_averaged_logits_are_the_references(case, batch):
    golden = np.load(GOLDEN / "seg_eval.npz")
    image, expected = (golden[f"slide_{case}_{part}"][0].transpose(1, 2, 0) for part in ("in", "out"))
    config = windows.Config(stride=11 / 16, batch=batch)
    found = windows.average(image, lambda crops: reference_logits(crops, expected.shape[-1]), 16, config, padding=np.nan)
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6)


def test_the_grids_of_ade20k():
    assert windows.view((512, 683), 512, windows.Config()).starts == ([0], [0, 171])
    assert windows.view((1100, 512), 512, windows.Config()).starts == ([0, 341, 588], [0])
    assert windows.view((300, 2048), 512, windows.Config()).canvas == (512, 2048)
    for length in range(1, 90):
        places = windows.starts(length, 16, 11)
        covered = {pixel for start in places for pixel in range(start, start + 16)}
        assert set(range(length)) <= covered and max(places) == max(length - 16, 0)


def by_colour(crops, shrink=1):
    """Logits that tell which channel is the largest; what is padding says the third."""
    return crops[:, shrink // 2 :: shrink, shrink // 2 :: shrink].astype(np.float32)


def blocks(height, width, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 3, (-(-height // 16), -(-width // 16)))
    label = np.kron(coarse, np.ones((16, 16), int))[:height, :width]
    return label, (np.eye(3)[label] * 200 + 20).astype(np.uint8)


CONFIGS = {
    "slide": windows.Config(),
    "whole": windows.Config(mode="whole"),
    "views": windows.Config(scales=(0.75, 1.0, 1.5), flip=True, batch=3),
    "flip": windows.Config(flip=True, mode="whole"),
}


@pytest.mark.parametrize("size", [(64, 64), (64, 150), (130, 64), (200, 260), (20, 400), (32, 48)])
@pytest.mark.parametrize("kind", CONFIGS)
def test_labels_of_whole_images(kind, size):
    label, image = blocks(*size)
    found = windows.segment(image, by_colour, 64, CONFIGS[kind])
    assert found.shape == size and found.dtype == np.uint8 and (found == label).mean() > 0.8


def test_logits_at_a_quarter_agree_with_those_resized_before():
    _, image = blocks(64, 150)

    def enlarged(crops):
        small = by_colour(crops, 4)
        lines = [windows.lines(length, 64) for length in small.shape[1:3]]
        return np.stack([np.asarray(windows._interpolate(one, *lines)) for one in small])

    first = windows.average(image, lambda crops: by_colour(crops, 4), 64)
    np.testing.assert_allclose(first, windows.average(image, enlarged, 64), atol=1e-4)


def test_interpolation_is_bilinear_with_squares_as_pixels():
    rng = np.random.default_rng(0)
    array = rng.standard_normal((7, 9, 2)).astype(np.float32)
    for size in ((28, 36), (7, 9), (10, 5)):
        found = windows._interpolate(array, *(windows.lines(*pair) for pair in zip(array.shape, size)))
        if size[0] >= 7 and size[1] >= 9:
            expected = jax.image.resize(array, (*size, 2), "bilinear")
            np.testing.assert_allclose(found, expected, atol=1e-5)
        assert found.shape == (*size, 2)


def test_few_programs_for_many_sizes():
    windows._add.clear_cache()
    windows._tile_labels.clear_cache()
    shapes = set()

    def logits(crops):
        shapes.add(crops.shape)
        return by_colour(crops, 4)

    for height in range(40, 200, 13):
        windows.segment(blocks(height, 97)[1], logits, 64)
    assert shapes == {(2, 64, 64, 3)}
    assert windows._add._cache_size() <= 7 and windows._tile_labels._cache_size() <= 7


def test_views_are_averaged_as_probabilities():
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, :32] = 255

    def logits(crops):  # sure of class 0 where the left half is bright, else a little for class 1
        bright = crops[:, :1, :1, :1] > 0
        values = np.where(bright, [[[[50.0, 0.0]]]], [[[[0.0, 0.1]]]])
        return np.broadcast_to(values, (*crops.shape[:3], 2)).astype(np.float32)

    assert (windows.segment(image, logits, 64) == 0).all()
    assert (windows.segment(image[:, ::-1], logits, 64) == 1).all()
    assert (windows.segment(image[:, ::-1], logits, 64, windows.Config(flip=True)) == 0).all()


def test_wrong_fields_are_named():
    with pytest.raises(ValueError, match="scales: .*at least one"):
        windows.Config(scales=())
    with pytest.raises(ValueError, match="mode"):
        windows.Config(mode="sliding")


def test_a_resize_and_its_window_fit():
    assert opencv.resize_linear(np.zeros((1, 999, 3), np.uint8), windows.fitted((1, 999), 2048, 512)).shape == (2, 2048, 3)

"""Label maps as a source, and the transforms of segmentation."""

import io
import itertools
import pathlib
import pickle
import zlib

import numpy as np
import pytest
from PIL import Image

from addp_jax import errors
from addp_jax.data import pipeline, segmentation, sources, walk
from addp_jax.data.sources import shapes
from addp_jax.ops import opencv, windows

GOLDEN = pathlib.Path(__file__).parent / "golden" / "dense"
pytestmark = pytest.mark.golden
LABELS = segmentation.Labels(150, shift=True)
CASES = {  # of golden augment.npz, as its README tells them
    "photo_0": segmentation.Distortion(17.3, 0.71, True, 1.31, -11),
    "photo_1": segmentation.Distortion(-25.6, 1.42, False, 0.62, 15),
}


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN / "seg_eval.npz")) | dict(np.load(GOLDEN / "augment.npz"))


def png(numbers, mode=None, **options):
    buffer = io.BytesIO()
    picture = Image.fromarray(np.asarray(numbers))
    (picture.convert(mode) if mode else picture).save(buffer, "PNG", **options)
    return buffer.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def picture(seed=0, height=40, width=60):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def label(seed=0, height=40, width=60, classes=151):
    """Blocks of ten pixels."""
    blocks = np.random.default_rng(seed).integers(0, classes, (-(-height // 10), -(-width // 10)), np.uint8)
    return np.kron(blocks, np.ones((10, 10), np.uint8))[:height, :width]


@pytest.fixture
def ade(tmp_path):
    """ADEChallengeData2016 with three training images and two for validation."""
    for split, count in (("training", 3), ("validation", 2)):
        for n in range(count):
            write(tmp_path / f"images/{split}/ADE_{n:08}.png", png(picture(n)))
            write(tmp_path / f"annotations/{split}/ADE_{n:08}.png", png(label(n)))
    return tmp_path


def open_set(root, split="train", **fields):
    return sources.open_split(pipeline.Config(source="label_maps", path=str(root), **fields), split, 64)


# --- the reference's numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_colours_are_distorted_as_opencv_does(golden, case):
    distorted = segmentation.distort(golden["photo_in"][..., ::-1], CASES[case])
    np.testing.assert_array_equal(distorted[..., ::-1], golden[case])


def test_crops_are_the_references(golden):
    for draws, chosen, used in zip(golden["crop_draws"], golden["crop_chosen"], golden["crop_used"]):
        left = iter([tuple(draw) for draw in draws.tolist()])
        assert segmentation.choose_crop(golden["crop_label"], 32, 0.75, left) == tuple(chosen)
        assert len(draws) - len(list(left)) == used


def test_sizes_are_the_references(golden):
    for width, height, ratio, new_width, new_height in golden["rescale_sizes"]:
        size = windows.fitted((int(height), int(width)), int(2048 * ratio), int(512 * ratio))
        assert size == (new_height, new_width)


def test_labels_are_shifted_as_the_reference_does(golden):
    labels = segmentation.Labels(255, shift=True)
    example = {"label_map": png(golden["zero_label_in"]), "label_path": "x.png", "index": 0}
    np.testing.assert_array_equal(labels.read(example), golden["zero_label_out"])


# --- OpenCV's arithmetic ------------------------------------------------------------------------------------------------

def crc(array):
    return zlib.crc32(np.ascontiguousarray(array).tobytes())


# Of OpenCV 5.0.0 on x86 with AVX2: size of the result, checksums of INTER_LINEAR and INTER_NEAREST.
RESIZED = {
    (41, 67): (7532132, 1825332340),
    (82, 134): (3632726853, 2839647012),
    (20, 33): (1118255672, 3663479421),
    (61, 50): (3424953237, 1844457664),
    (100, 300): (3594922629, 4014079052),
}


@pytest.mark.parametrize("size", RESIZED)
def test_resized_bytes_are_opencvs(size):
    image = picture(0, 41, 67)
    assert (crc(opencv.resize_linear(image, size)), crc(opencv.resize_nearest(image[..., 0], size))) == RESIZED[size]


def test_half_the_size_and_colours_of_wide_rows_are_opencvs():
    assert crc(opencv.resize_linear(picture(0, 40, 66), (20, 33))) == 1573204555
    hsv = opencv.rgb_to_hsv(picture(1, 64, 97))  # rows of three whole vectors and a pixel
    assert crc(hsv) == 3296767582 and crc(opencv.hsv_to_rgb(hsv)) == 1153320317


def test_a_window_of_a_resize_is_that_part_of_the_whole():
    image = picture(3, 37, 53)
    for size in ((60, 90), (19, 30), (37, 53), (200, 11)):
        whole = opencv.resize_linear(image, size)
        part = opencv.resize_linear(image, size, opencv.Window(5, 4, 12, 6))
        np.testing.assert_array_equal(part, whole[5:17, 4:10])
        assert opencv.resize_nearest(image[..., 0], size).shape == size


def test_a_resize_is_bilinear():
    ramp = np.repeat(np.arange(0, 200, 10, dtype=np.uint8)[None, :, None], 8, 0).repeat(3, 2)
    wide = opencv.resize_linear(ramp, (8, 40)).astype(int)
    assert (wide == wide[:1]).all() and (np.diff(wide[0, 1:-1, 0]) == 5).all() and wide[0, 0, 0] == 0
    np.testing.assert_array_equal(opencv.resize_linear(ramp[:, :1], (3, 9)), np.zeros((3, 9, 3)))


def test_hsv_is_undone_nearly():
    image = picture(5, 50, 32)
    hsv = opencv.rgb_to_hsv(image)
    assert hsv[..., 0].max() < 180
    assert np.abs(opencv.hsv_to_rgb(hsv).astype(int) - image).max() <= 6
    grey = np.repeat(picture(1)[..., :1], 3, 2)
    assert (opencv.rgb_to_hsv(grey)[..., :2] == 0).all() and (opencv.rgb_to_hsv(grey)[..., 2] == grey[..., 0]).all()


# --- source ---------------------------------------------------------------------------------------------------------------


def test_ade20k_is_read_as_it_is(ade):
    (ade / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1\t9\t9\t1\twall\n2\t0.1\t9\t9\t1\tbuilding\n")
    train, held_out = open_set(ade, shift_labels=True), open_set(ade, "eval")
    assert len(train) == 3 and len(held_out) == 2 and isinstance(train, sources.Source)
    assert train.classes == ("wall", "building") and held_out.classes == ("other", "wall", "building")
    example = segmentation.EvalSegmentation(LABELS)(train[1], None)
    np.testing.assert_array_equal(example["image"], picture(1))
    np.testing.assert_array_equal(example["label"], np.where(label(1) == 0, 255, label(1) - 1))
    again = pickle.loads(pickle.dumps(train))
    assert again[2]["label_map"] == train[2]["label_map"] and again.fingerprint() == train.fingerprint()


def test_a_users_folder_with_nested_images(tmp_path):
    for split in ("train", "held"):
        write(tmp_path / f"images/{split}/a/x.png", png(picture()))
        write(tmp_path / f"labels/{split}/a/x.png", png(label(classes=3)))
    (tmp_path / "names.txt").write_text("sky\nroad\ncar\n")
    source = open_set(tmp_path, "eval", eval_split="held", class_names=str(tmp_path / "names.txt"))
    assert source.classes == ("sky", "road", "car") and source.label_path(0).endswith("labels/held/a/x.png")
    with pytest.raises(errors.UserError, match="images/val.*config.data.eval_split"):
        open_set(tmp_path, "eval")


def test_the_fingerprint_tells_the_label_maps(ade):
    before = open_set(ade).fingerprint()
    write(ade / "annotations/training/ADE_00000001.png", png(label(8)))
    assert open_set(ade).fingerprint() != before


def test_a_missing_pair_is_named(ade, capsys):
    (ade / "annotations/training/ADE_00000001.png").unlink()
    with pytest.raises(errors.UserError, match="no label map .*ADE_00000001.png' for ADE_00000001.png; add") as caught:
        open_set(ade)
    assert "\n" not in str(caught.value)
    (ade / "images/training/ADE_00000001.png").unlink()
    write(ade / "annotations/training/extra.png", png(label()))
    walk._announced.clear()
    assert len(open_set(ade)) == 2 and "1 label maps without an image: extra.png" in capsys.readouterr().err
    write(ade / "images/training/ADE_00000000.jpg", png(picture()))
    with pytest.raises(errors.UserError, match="ADE_00000000.png and ADE_00000000.jpg .* share"):
        open_set(ade)


BAD = {
    "size": (png(label(0, 40, 61)), "61x40 pixels, but its image .* has 60x40"),
    "class": (png(np.full((40, 60), 151, np.uint8)), "has the label 151 at 2400 pixels; 1..150 are the classes"),
    "colours": (png(picture()), "has colours .RGB."),
    "16 bits": (png(np.full((40, 60), 300, np.uint16)), "has the label 300"),
    "no image": (b"nothing", "cannot decode .*bad.png"),
    "cut off": (png(label())[:60], "cannot decode .*bad.png"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_label_map_is_named_in_one_line(kind):
    content, match = BAD[kind]
    example = {"image": png(picture()), "index": 0, "path": "good.png", "label_map": content, "label_path": "bad.png"}
    with pytest.raises(errors.Unreadable, match=match) as caught:
        segmentation.EvalSegmentation(LABELS)(example, None)
    assert "\n" not in str(caught.value) and "bad.png" in str(caught.value)


def test_a_label_map_that_is_no_png_is_refused():
    buffer = io.BytesIO()
    Image.fromarray(label()).save(buffer, "JPEG")
    with pytest.raises(errors.Unreadable, match="x.png is a JPEG file"):
        segmentation.decode(buffer.getvalue(), "x.png")


def test_palettes_are_read_by_their_indices():
    numbers = label(classes=4)
    paletted = Image.fromarray(numbers, "P")
    paletted.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 9, 9, 9])
    for options in ({}, {"bits": 2}):
        buffer = io.BytesIO()
        paletted.save(buffer, "PNG", **options)
        np.testing.assert_array_equal(segmentation.decode(buffer.getvalue(), "x"), numbers)
    np.testing.assert_array_equal(segmentation.decode(png(numbers > 1), "x"), numbers > 1)
    np.testing.assert_array_equal(segmentation.decode(png(numbers.astype(np.uint16)), "x"), numbers)


def test_another_number_may_be_ignored_and_nothing_but_ignored_pixels_is_said(capsys):
    numbers = np.array([[0, 1], [2, 9]], np.uint8)
    example = {"label_map": png(numbers), "label_path": "x.png", "index": 0}
    np.testing.assert_array_equal(segmentation.Labels(3, ignored=9).read(example), [[0, 1], [2, 255]])
    segmentation.Labels(3, shift=True).read(example | {"label_map": png(numbers * 0), "label_path": "all.png"})
    assert "all.png: all pixels are ignored" in capsys.readouterr().err
    with pytest.raises(errors.UserError, match="1 to 255 classes, not 256"):
        segmentation.Labels(256)


def test_shapes_have_label_maps():
    example = shapes.Shapes(8, 0, 48, max_objects=3)[5]
    numbers = segmentation.of_shapes(example)
    for mask, number in zip(example["masks"], example["classes"]):
        assert (numbers[mask] == number + 1).all()
    assert (numbers == 0).sum() == (~example["masks"].any(0)).sum()
    shifted = segmentation.Labels(8, shift=True).read(example)
    np.testing.assert_array_equal(shifted == 255, numbers == 0)
    assert segmentation.shapes_classes(shapes.CLASSES, True) == shapes.CLASSES
    assert segmentation.shapes_classes(shapes.CLASSES, False)[:2] == ("background", "circle")


# --- transforms -----------------------------------------------------------------------------------------------------------


def example_of(image, numbers):
    return {"image": image, "index": 7, "path": "x.jpg", "label_map": png(numbers), "label_path": "x.png"}


@pytest.mark.parametrize("height, width", [(40, 60), (9, 7), (30, 300), (200, 90), (1, 400)])
def test_training_examples_have_one_shape_and_padding(height, width):
    transform = segmentation.TrainSegmentation(32, LABELS)
    for seed in range(8):
        example = example_of(picture(1, height, width), label(1, height, width))
        first, again = (transform(example, np.random.default_rng(seed)) for _ in range(2))
        assert {name: (value.shape, value.dtype) for name, value in first.items()} == {
            "image": ((32, 32, 3), np.uint8), "label": ((32, 32), np.uint8), "size": ((2,), np.int32), "index": ((), np.int32),
        }  # fmt: skip
        for name in first:
            np.testing.assert_array_equal(first[name], again[name])
        rows, columns = first["size"]
        assert 0 < rows <= 32 and 0 < columns <= 32
        beyond = np.ones((32, 32), bool)
        beyond[:rows, :columns] = False
        assert (first["label"][beyond] == 255).all() and (first["image"][beyond] == windows.PADDING).all()


def test_image_and_label_stay_together():
    """The image's colour tells the label, at a distance of the borders of its blocks."""
    numbers = label(3, 80, 120, 5)
    image = np.repeat(numbers[..., None] * 50, 3, 2)
    transform = segmentation.TrainSegmentation(48, segmentation.Labels(5), colours=False)
    flipped = 0
    for seed in range(20):
        example = transform(example_of(image, numbers), np.random.default_rng(seed))
        counted = example["label"] != 255
        same = example["image"][..., 0] == example["label"] * 50
        assert same[counted].mean() > 0.6
        flipped += np.array_equal(example["label"][:, ::-1], transform(example_of(image, numbers), _Unflipped(seed))["label"])
    assert 0 < flipped < 20


class _Unflipped:
    """A generator whose numbers never flip."""

    def __init__(self, seed):
        self._rng = np.random.default_rng(seed)
        self.uniform, self.integers = self._rng.uniform, self._rng.integers

    def random(self):
        return 1.0


def test_a_crop_of_one_class_is_avoided_where_it_can_be():
    numbers = np.zeros((64, 64), np.uint8)
    numbers[:, 32:] = 1
    draws = itertools.chain([(0, 0)] * 3, [(0, 16)], itertools.repeat((5, 5)))
    assert segmentation.choose_crop(numbers, 32, 0.75, draws) == (0, 16)
    draws = itertools.chain([(0, 0)] * 10, [(1, 2)])
    assert segmentation.choose_crop(numbers * 0, 32, 0.75, draws) == (1, 2)


def test_distortions_cover_their_ranges_and_leave_out_half():
    drawn = [segmentation.Distortion.draw(np.random.default_rng(seed)) for seed in range(400)]
    hues = [by.hue for by in drawn if by.hue is not None]
    assert min(hues) == -18 and max(hues) == 17 and 150 < len(hues) < 250
    brightness = [by.brightness for by in drawn if by.brightness is not None]
    assert -32 <= min(brightness) < -30 and 30 < max(brightness) <= 32
    image = picture()
    np.testing.assert_array_equal(segmentation.distort(image, segmentation.Distortion()), image)


def test_batches_come_through_the_pipeline(ade):
    config = pipeline.Config(source="label_maps", path=str(ade), on_unreadable="skip", shift_labels=True)
    write(ade / "annotations/training/ADE_00000001.png", png(picture()))
    transform = segmentation.TrainSegmentation(32, LABELS)
    batches = pipeline.train_batches(open_set(ade), transform, seed=0, batch_size=3, start_step=0, config=config)
    with batches:
        batch = next(batches)
    assert batch["image"].shape == (3, 32, 32, 3) and batch["label"].shape == (3, 32, 32) and batches.skipped == {1}
    evaluation = segmentation.EvalSegmentation(LABELS)
    with pipeline.eval_batches(open_set(ade, "eval"), evaluation, batch_size=1, config=config) as batches:
        assert [batch["label"].shape for batch in batches] == [(1, 40, 60)] * 2

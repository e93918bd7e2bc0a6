"""The generated data set."""

import pathlib
import pickle

import numpy as np
import pytest

from addp_jax.data import clutter
from addp_jax.data.sources import shapes

GOLDEN = pathlib.Path(__file__).parent / "golden" / "shapes.npz"


@pytest.mark.parametrize("max_objects", [1, 5])
@pytest.mark.parametrize("kind", ["plain", "full"])
def test_pictures_stay_what_they_were(kind, max_objects):
    """Against those before there were textured ones; processors differ in the last bit of a sine."""
    golden, source = np.load(GOLDEN), shapes.Shapes(100, 0, 24, max_objects, kind)
    for i in range(4):
        example = source[i]
        was = {name: golden[f"{kind}_{max_objects}_{name}"][i] for name in ("image", "boxes", "classes")}
        assert np.abs(example["image"].astype(int) - was["image"]).max() <= 1
        np.testing.assert_array_equal(example["boxes"], was["boxes"])
        np.testing.assert_array_equal(example["classes"], was["classes"])


def test_example_depends_on_seed_and_index_only():
    first, again, other = (shapes.Shapes(50, seed, 32, 3) for seed in (0, 0, 1))
    [first[i] for i in range(5)]
    for name, value in first[7].items():
        np.testing.assert_array_equal(value, again[7][name])
    assert not np.array_equal(first[7]["image"], other[7]["image"])
    assert not np.array_equal(first[7]["image"], first[15]["image"])


def test_data_set_sizes_share_their_examples():
    np.testing.assert_array_equal(shapes.Shapes(10, 0, 32)[3]["image"], shapes.Shapes(1000, 0, 32)[3]["image"])


@pytest.mark.parametrize("max_objects", [1, 4])
def test_shapes_and_types_are_as_documented(max_objects):
    example = shapes.Shapes(10, 0, 24, max_objects)[3]
    expected = {
        "image": ((24, 24, 3), np.uint8),
        "label": ((), np.int32),
        "boxes": ((max_objects, 4), np.float32),
        "classes": ((max_objects,), np.int32),
        "masks": ((max_objects, 24, 24), bool),
        "index": ((), np.int32),
    }
    assert {name: (value.shape, value.dtype) for name, value in example.items()} == {
        name: (shape, np.dtype(dtype)) for name, (shape, dtype) in expected.items()
    }


@pytest.mark.parametrize("kind", ["full", "textured"])
def test_boxes_are_tight_around_the_masks(kind):
    for example in map(shapes.Shapes(40, 0, 48, 5, kind).__getitem__, range(40)):
        for box, label, mask in zip(example["boxes"], example["classes"], example["masks"]):
            assert (label == -1) == (not mask.any()) == (not box.any())
            if label >= 0:
                y0, x0, y1, x1 = box.astype(int)
                outside = mask.copy()
                outside[y0:y1, x0:x1] = False
                assert not outside.any()
                assert mask[y0].any() and mask[y1 - 1].any() and mask[:, x0].any() and mask[:, x1 - 1].any()


@pytest.mark.parametrize("kind", ["full", "textured"])
def test_visible_masks_never_overlap(kind):
    source = shapes.Shapes(40, 2, 48, 6, kind)
    assert max(source[i]["masks"].sum(0).max() for i in range(40)) == 1


def test_two_objects_overlap_in_part_at_most():
    rng = np.random.default_rng(0)
    pairs = [pair for pair in (shapes._arrange(rng, 0, True, 2, "full") for _ in range(300)) if len(pair) == 2]
    gaps = [np.hypot(*(a.centre - b.centre)) / (a.radius + b.radius) for a, b in pairs]
    assert np.quantile(gaps, 0.02) > 0.75 and min(gaps) < 0.9


@pytest.mark.parametrize("max_objects", [1, 5])
def test_objects_differ_in_lightness_from_the_background(max_objects):
    source = shapes.Shapes(80, 0, 48, max_objects)
    for i in range(80):
        example = source[i]
        grey = example["image"] @ np.array([0.299, 0.587, 0.114])
        covered = example["masks"].any(0)
        background = np.median(grey[~covered])
        for mask in example["masks"]:
            if mask.sum() > 20:
                assert abs(np.median(grey[mask]) - background) > 30


def test_masks_cover_what_the_object_changed():
    """Inside its mask an object shows its own colour, just outside the background's."""
    example = shapes.Shapes(800, 0, 64)[0]
    image, mask = example["image"].astype(int), example["masks"][0]
    corner = image[0, 0]
    distance = np.abs(image - corner).sum(-1)
    assert np.median(distance[mask]) > 150
    assert np.median(distance[~mask]) < 100


def test_single_object_is_large_and_central():
    source = shapes.Shapes(160, 0, 64)
    boxes = np.stack([source[i]["boxes"][0] for i in range(160)]) / 64
    side = np.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
    assert 0.3 < side.min() and side.max() < 1.0 and 0.5 < side.mean() < 0.75
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert np.abs(centre - 0.5).max() < 0.25


@pytest.mark.parametrize("kind", ["full", "textured"])
def test_classes_are_balanced_and_the_first_is_the_label(kind):
    source = shapes.Shapes(80, 0, 32, 4, kind)
    labels = [int(source[i]["label"]) for i in range(80)]
    assert np.bincount(labels).tolist() == [10] * len(shapes.CLASSES)
    assert all(source[i]["classes"][0] == source[i]["label"] for i in range(80))


@pytest.mark.parametrize("label", range(len(shapes.CLASSES)))
def test_every_class_has_its_own_outline(label):
    """A nearest-mean classifier on centred masks knows the classes, so outlines differ."""
    source = shapes.Shapes(400, 0, 32)

    def outline(i):
        example = source[i]
        y0, x0, y1, x1 = example["boxes"][0].astype(int)
        rows, columns = np.linspace(y0, y1 - 1, 16).round().astype(int), np.linspace(x0, x1 - 1, 16).round().astype(int)
        return example["masks"][0][np.ix_(rows, columns)].astype(float)

    means = [np.mean([outline(i) for i in range(k, 200, 8)], axis=0) for k in range(8)]
    guesses = [np.argmin([((outline(i) - mean) ** 2).sum() for mean in means]) for i in range(200 + label, 400, 8)]
    assert np.mean(np.array(guesses) == label) > 0.7


def test_source_pickles_small_and_ends():
    source = shapes.Shapes(1000, 3, 32)
    assert len(pickle.dumps(source)) < 1000
    assert repr(pickle.loads(pickle.dumps(source))) == repr(source) == "Shapes(1000, 3, 32, 1, 'full')"
    with pytest.raises(IndexError):
        source[1000]


def test_plain_objects_have_one_colour_and_stand_on_grey():
    for example in map(shapes.Shapes(24, 0, 48, shapes="plain").__getitem__, range(24)):
        inside = example["image"][example["masks"][0]].astype(int)
        assert np.median(np.abs(inside - np.median(inside, axis=0))) == 0
        corner = example["image"][0, 0]
        assert len(set(corner.tolist())) == 1


def nearest_by_pixels(kind: str) -> float:
    """Accuracy of 20 nearest neighbours by the cosine of pixels."""

    def read(seed, count):
        examples = list(map(shapes.Shapes(count, seed, 32, shapes=kind).__getitem__, range(count)))
        pixels = np.stack([example["image"].reshape(-1) for example in examples]) / 127.5 - 1
        return pixels / np.linalg.norm(pixels, axis=1, keepdims=True), np.array([example["label"] for example in examples])

    (bank, labels), (queries, truth) = read(0, 800), read(1, 160)
    near = labels[np.argsort(-queries @ bank.T, axis=1)[:, :20]]
    votes = (near[:, :, None] == np.arange(len(shapes.CLASSES))).sum(1)
    return (votes.argmax(1) == truth).mean()


def test_pixels_do_not_tell_the_class_of_textured_objects():
    assert nearest_by_pixels("textured") < 0.3 < 0.4 < nearest_by_pixels("full")


def test_textured_objects_take_any_pose_and_differ_in_lightness_from_the_background():
    rng = np.random.default_rng(0)
    objects = [shapes._arrange(rng, 0, bool(k % 2), 1, "textured")[0] for k in range(200)]
    turns = np.histogram([thing.turn for thing in objects], 8, (0, 2 * np.pi))[0]
    assert turns.min() >= 10
    y, x = np.ogrid[-1:1:16j, -1:1:16j]
    for k, thing in enumerate(objects):
        ground = shapes._background(rng, 16, bool(k % 2), "textured")
        lighter = (thing.paint(x, y).mean((0, 1)) - ground.mean((0, 1))) @ clutter.LUMA
        assert lighter > 0.1 if k % 2 else lighter < -0.1


def test_a_piece_of_no_class_hides_a_part_of_an_object_or_is_left_out():
    def piece(radius):
        return shapes._Object(-1, np.array([0.5, 0.35]), radius, 0.0, lambda u, v: np.zeros(3), shapes.DISTANCES["square"])

    canvas, masks = np.ones((32, 32, 3), np.float32), np.zeros((2, 32, 32), bool)
    masks[0, 8:24, 8:24] = True
    shapes._draw(canvas, masks, None, piece(0.3))
    assert (canvas == 1).all() and masks.sum() == 256
    shapes._draw(canvas, masks, None, piece(0.1))
    assert 0 < 256 - masks.sum() < 256 * shapes.HIDDEN
    hidden = np.zeros_like(masks[0])
    hidden[8:24, 8:24] = True
    assert (canvas[hidden & ~masks[0]] < 1).any(-1).all()


def test_no_two_outlines_coincide_at_any_rotation_and_scale():
    """The masks of two classes, of equal area around one centre, share less than nine tenths of what they cover."""
    grid = np.linspace(-2, 2, 64)
    x, y = np.meshgrid(grid, grid)

    def normal(distance):
        inside = distance(x, y) < 0
        area, centre = inside.mean() * 16, [axis[inside].mean() for axis in (x, y)]
        return lambda u, v: distance(u * area**0.5 / 2 + centre[0], v * area**0.5 / 2 + centre[1])

    def turned(distance, angle):
        return (distance(np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x) < 0).reshape(-1)

    outlines = [normal(distance) for distance in shapes.DISTANCES.values()]
    poses = np.array([[turned(each, angle) for angle in np.radians(range(0, 360, 5))] for each in outlines], np.float32)
    for k, first in enumerate(poses[:, 0]):
        shared, areas = poses @ first, poses.sum(-1)
        overlap = (shared / (areas + first.sum() - shared)).max(1)
        assert overlap[k] == 1 and np.delete(overlap, k).max() < 0.9, (shapes.CLASSES[k], overlap)

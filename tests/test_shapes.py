"""The generated data set."""

import pickle

import numpy as np
import pytest

from addp_jax.data.sources import shapes


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


def test_boxes_are_tight_around_the_masks():
    for example in map(shapes.Shapes(40, 0, 48, 5).__getitem__, range(40)):
        for box, label, mask in zip(example["boxes"], example["classes"], example["masks"]):
            assert (label == -1) == (not mask.any()) == (not box.any())
            if label >= 0:
                y0, x0, y1, x1 = box.astype(int)
                outside = mask.copy()
                outside[y0:y1, x0:x1] = False
                assert not outside.any()
                assert mask[y0].any() and mask[y1 - 1].any() and mask[:, x0].any() and mask[:, x1 - 1].any()


def test_visible_masks_never_overlap():
    source = shapes.Shapes(40, 2, 48, 6)
    assert max(source[i]["masks"].sum(0).max() for i in range(40)) == 1


def test_two_objects_overlap_in_part_at_most():
    rng = np.random.default_rng(0)
    pairs = [pair for pair in (shapes._arrange(rng, 0, shapes.LIGHT, 2, False) for _ in range(300)) if len(pair) == 2]
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


def test_classes_are_balanced_and_the_first_is_the_label():
    source = shapes.Shapes(80, 0, 32, 4)
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
    assert repr(pickle.loads(pickle.dumps(source))) == repr(source) == "Shapes(1000, 3, 32, 1, False)"
    with pytest.raises(IndexError):
        source[1000]


def test_plain_objects_have_one_colour_and_stand_on_grey():
    for example in map(shapes.Shapes(24, 0, 48, plain=True).__getitem__, range(24)):
        inside = example["image"][example["masks"][0]].astype(int)
        assert np.median(np.abs(inside - np.median(inside, axis=0))) == 0
        corner = example["image"][0, 0]
        assert len(set(corner.tolist())) == 1

"""Intersection over union, and the pictures of segmentation."""

import pathlib

import numpy as np
import pytest

from addp_jax import pictures
from addp_jax.metrics import segmentation

GOLDEN = pathlib.Path(__file__).parent / "golden" / "dense"
pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN / "seg_eval.npz"))


@pytest.fixture(scope="module")
def matrices(golden):
    count = len([name for name in golden if name.startswith("iou_pred_")])
    classes = len(golden["iou_per_class"])
    pairs = [(golden[f"iou_pred_{n}"], golden[f"iou_label_{n}"]) for n in range(count)]
    return [segmentation.confusion(*pair, classes) for pair in pairs]


def test_areas_are_the_references(golden, matrices):
    matrix = sum(matrices)
    right, true, predicted = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    np.testing.assert_array_equal(right, golden["iou_area_intersect"])
    np.testing.assert_array_equal(true, golden["iou_area_label"])
    np.testing.assert_array_equal(predicted, golden["iou_area_pred"])
    np.testing.assert_array_equal(true + predicted - right, golden["iou_area_union"])


def test_figures_are_the_references(golden, matrices):
    scores = segmentation.scores(sum(matrices))
    right, union, true = (golden[f"iou_area_{name}"] for name in ("intersect", "union", "label"))
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(scores.iou, right / union, rtol=0, atol=1e-12)
        np.testing.assert_allclose(scores.accuracy, right / true, rtol=0, atol=1e-12)
        figures = [np.nanmean(right / union), np.nanmean(right / true), right.sum() / true.sum()]
    np.testing.assert_allclose([scores.scalars[name] for name in ("mIoU", "mAcc", "aAcc")], figures, rtol=0, atol=1e-12)
    # The file's figures went through float32.
    np.testing.assert_allclose(list(scores.scalars.values()), golden["miou_macc_aacc"], rtol=0, atol=1e-7)
    np.testing.assert_allclose(scores.iou, golden["iou_per_class"], rtol=0, atol=1e-7)
    np.testing.assert_allclose(scores.accuracy, golden["acc_per_class"], rtol=0, atol=1e-7)
    reported = [round(100 * value, 2) for value in scores.scalars.values()]
    np.testing.assert_allclose(reported, golden["miou_macc_aacc_reported"], atol=1e-5)


def test_confusion_has_true_classes_as_rows():
    matrix = segmentation.confusion(np.array([[1, 2], [2, 0]]), np.array([[1, 1], [255, 0]]), 3)
    np.testing.assert_array_equal(matrix, [[1, 0, 0], [0, 1, 1], [0, 0, 0]])
    nothing = segmentation.scores(np.zeros((3, 3), np.int64))
    assert all(np.isnan(value) for value in nothing.scalars.values())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        segmentation.confusion(np.zeros((2, 3)), np.zeros((3, 2)), 3)
    with pytest.raises(ValueError, match="beyond 0..2"):
        segmentation.confusion(np.zeros((2, 3)), np.full((2, 3), 3), 3)


def test_label_maps_are_drawn_with_a_legend():
    image = np.full((60, 90, 3), 200, np.uint8)
    label = np.full((60, 90), 255, np.uint8)
    label[:20], label[40:, :30] = 3, 1
    drawn = pictures.segmentation(image, label, ["sky", "ro\nad", "car", "tree", "a name that is far too long"])
    assert drawn.dtype == np.uint8 and drawn.shape[1:] == (90, 3) and drawn.shape[0] > 60 and (image == 200).all()
    assert (drawn[25:35, :] == 200).all() and (drawn[5, 5] != 200).any() and (drawn[5, 5] != drawn[50, 5]).any()
    nothing = pictures.segmentation(image / 255, np.full((60, 90), 255), ["sky"])
    np.testing.assert_array_equal(nothing, image)


def test_150_classes_have_colours_of_their_own_and_a_confusion_picture():
    assert len(np.unique(pictures.colours(150), axis=0)) > 140
    matrix = np.random.default_rng(0).integers(0, 10**6, (150, 150))
    assert pictures.confusion(matrix.sum(1), np.diag(matrix), matrix).shape == (500, 1000, 3)
    assert pictures.confusion(matrix[:5, :5].sum(1), np.diag(matrix)[:5], matrix[:5, :5]).shape == (500, 1000, 3)

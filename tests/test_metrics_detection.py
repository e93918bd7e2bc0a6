"""COCO's average precision."""

import json
import pathlib

import numpy as np
import pytest

from addp_jax import errors, pictures
from addp_jax.data.sources import shapes
from addp_jax.metrics import detection

GOLDEN = pathlib.Path(__file__).parent / "golden" / "dense"
pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def golden():
    truth, rows = (json.loads((GOLDEN / f"coco_{name}.json").read_text()) for name in ("gt", "dets"))
    return truth, rows, np.load(GOLDEN / "coco_eval.npz")


def test_figures_are_pycocotools(golden):
    truth, rows, expected = golden
    scores = detection.evaluate(truth, rows, size_of_masks="bbox")
    for kind in detection.KINDS:
        figures = [scores.scalars[f"{kind}_{name}"] for name in detection.FIGURES]
        np.testing.assert_allclose(figures, expected[f"{kind}_stats"], atol=1e-12)
        np.testing.assert_allclose(scores.classes[kind], expected[f"{kind}_ap_per_category"], atol=1e-12)


def test_the_size_of_masks_changes_figures_by_size_alone(golden):
    truth, rows, _ = golden
    by_box, by_mask = (detection.evaluate(truth, rows, size_of_masks=size).scalars for size in ("bbox", "segm"))
    differing = {name for name in by_box if by_box[name] != by_mask[name]}
    assert differing and all(name.startswith("segm") and name[-1] in "sml" for name in differing)
    alone = detection.evaluate(truth, [row | {"bbox": [0, 0, 1, 1]} for row in rows], ["segm"]).scalars
    assert alone.items() <= by_mask.items()


def test_a_truth_is_not_changed_and_its_ids_do_not_matter(golden):
    truth, rows, _ = golden
    before = json.dumps([truth, rows])
    scores = detection.evaluate(truth, rows, ["bbox"]).scalars
    assert json.dumps([truth, rows]) == before
    renumbered = truth | {"annotations": [row | {"id": n} for n, row in enumerate(truth["annotations"])]}  # one is 0
    assert detection.evaluate(renumbered, rows, ["bbox"]).scalars == scores


def test_encoded_masks_are_pycocotools(golden):
    expected = golden[2]
    for packed, counts in zip(expected["rle_masks"], expected["rle_counts"]):
        mask = np.unpackbits(packed, axis=-1)[:, :45].astype(bool)
        assert detection.encode(mask) == {"size": [37, 45], "counts": str(counts)}


def perfect(source):
    """(truth, results) of generated shapes that are detected as they are."""
    images, rows = [], []
    for i in range(len(source)):
        example = source[i]
        boxes = example["boxes"][:, [1, 0, 3, 2]]
        thing = boxes, example["classes"], example["masks"]
        images.append((i, example["image"].shape[:2], *thing))
        scores = np.linspace(1, 0.5, len(boxes))
        rows += detection.results(i, boxes, scores, example["classes"], example["masks"], category_ids=range(1, 9))
    return detection.ground_truth(images, shapes.CLASSES), rows


def test_perfect_detections_of_generated_shapes_score_one(tmp_path):
    truth, rows = perfect(shapes.Shapes(12, 0, 64, max_objects=3))
    scores = detection.evaluate(truth, rows)
    assert [scores.scalars[f"{kind}_AP"] for kind in detection.KINDS] == pytest.approx([1, 1])
    assert scores.classes["segm"].shape == (8, 4) and np.nanmin(scores.classes["segm"][:, 0]) == pytest.approx(1)
    half = [row for row in rows if row["image_id"] < 6]
    assert detection.evaluate(truth, half, ["bbox"]).scalars["bbox_AP"] < 0.9
    assert detection.evaluate(truth, half, ["bbox"], image_ids=range(6)).scalars["bbox_AP"] == pytest.approx(1)
    detection.write(tmp_path / "results.json", rows)
    assert json.loads((tmp_path / "results.json").read_text()) == rows
    with pytest.raises(errors.UserError, match="cannot write"):
        detection.write(tmp_path / "none" / "results.json", rows)


def test_no_detections_score_nothing_and_no_truth_is_undefined():
    truth, rows = perfect(shapes.Shapes(3, 0, 64))
    scores = detection.evaluate(truth, [])
    assert scores.scalars["bbox_AP"] == scores.scalars["segm_AP"] == 0
    scores = detection.evaluate(truth | {"annotations": []}, rows)
    assert scores.scalars["bbox_AP"] == -1 and np.isnan(scores.classes["bbox"]).all()


def test_results_that_do_not_fit_are_refused():
    truth, rows = perfect(shapes.Shapes(3, 0, 64))
    with pytest.raises(errors.UserError, match="result 0 is of image 77"):
        detection.evaluate(truth, [rows[0] | {"image_id": 77}])
    boxes_alone = [{name: value for name, value in row.items() if name != "segmentation"} for row in rows]
    with pytest.raises(errors.UserError, match="result 0 has no segmentation"):
        detection.evaluate(truth, boxes_alone)
    assert detection.evaluate(truth, boxes_alone, ["bbox"]).scalars["bbox_AP"] == pytest.approx(1)


def test_results_leave_out_padding_and_map_classes_back():
    boxes = np.array([[1, 2, 4, 8], [0, 0, 0, 0]], np.float32)
    (row,) = detection.results(5, boxes, [0.5, 0], np.array([1, -1]), category_ids=(3, 18))
    assert row == {"image_id": 5, "category_id": 18, "bbox": [1.0, 2.0, 3.0, 6.0], "score": 0.5}


def test_detections_are_drawn():
    image = np.full((80, 100, 3), 200, np.uint8)
    mask = np.zeros((2, 80, 100), bool)
    mask[0, 30:60, 20:50] = True
    boxes = np.array([[20, 30, 50, 60], [60.5, 0, 130, 40]])
    drawn = pictures.detections(image, boxes, mask, ["cat", "d\nog"], [0.9, 0.3])
    assert drawn.shape == image.shape and drawn.dtype == np.uint8 and (image == 200).all()
    assert (drawn[50, 40] != 200).any() and (drawn[75, 10] == 200).all() and (drawn[20, 60] != 200).any()
    truth = pictures.detections(image / 255, boxes, None, ["cat", "dog"])
    assert (truth[55, 40] == 200).all() and (truth[30:60, 20] != 200).any()
    none = pictures.detections(image, np.zeros((0, 4)), mask[:0], [])
    np.testing.assert_array_equal(none, image)
    assert pictures.grid(np.stack([truth, drawn]), 2).shape[1] > 200

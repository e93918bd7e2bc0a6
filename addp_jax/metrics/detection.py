"""COCO's average precision of boxes and masks, by pycocotools: arrays and COCO's json formats in, numbers out."""

import contextlib
import io
import json
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from addp_jax import errors, files

KINDS = {"bbox": "bbox", "segm": "segmentation"}  # what is compared: name of it, and of its field in results
FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")  # in COCO's order
AREAS = ("all", "small", "medium", "large")  # limits: 32^2 and 96^2 pixels


class Scores(NamedTuple):
    """Of results against the truth; fractions 0..1.

    scalars: "bbox_AP" and so on, FIGURES of each kind; -1 where the data has no such object.
    classes: by kind float64 [C,4], the AP of each class, in rising order of category ids, for AREAS; NaN where the data
      has no such object.
    """

    scalars: dict[str, float]
    classes: dict[str, np.ndarray]


def encode(mask: np.ndarray) -> dict:
    """bool [H,W] -> COCO's compressed RLE: size and counts, ready for json."""
    from pycocotools import mask as rle

    encoded = rle.encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def results(image_id: int, boxes, scores, classes, masks=None, *, category_ids) -> list[dict]:
    """The detections of one image in COCO's format, as its test server takes them.

    Args:
      image_id: the image's.
      boxes: [N,4], (x0, y0, x1, y1) in pixels of the original image.
      scores: [N], 0..1.
      classes: int [N]; -1 = no detection, left out.
      masks: N masks, each bool [H,W] of the original image or an RLE; None = boxes alone.
      category_ids: the data's category id of each class.
    """
    rows = []
    for n in np.flatnonzero(np.asarray(classes) >= 0):
        row = {"image_id": int(image_id), "category_id": int(category_ids[int(classes[n])])}
        row |= {"bbox": _xywh(boxes[n]), "score": float(scores[n])}
        if masks is not None:
            row["segmentation"] = _rle(masks[n])
        rows.append(row)
    return rows


def _xywh(box) -> list[float]:
    x0, y0, x1, y1 = (float(end) for end in box)
    return [x0, y0, x1 - x0, y1 - y0]


def _rle(mask) -> dict:
    return mask if isinstance(mask, dict) else encode(mask)


def write(path: str, rows: list[dict]) -> None:
    """Results as a json file for COCO's test server. Raises UserError naming the file that cannot be written."""
    with files.explain(f"cannot write {path}"):
        files.write_text(path, json.dumps(rows))


def ground_truth(images: Iterable[tuple], names: Iterable[str]) -> dict:
    """Ground truth in COCO's format, of data that has no json file; the category id of class c is c + 1.

    Args:
      images: of each (image_id, (height, width), boxes, classes, masks), the last three as for `results`.
      names: of the classes.
    """
    from pycocotools import mask as rle

    pictures, rows = [], []
    for image_id, (height, width), boxes, classes, masks in images:
        pictures.append({"id": int(image_id), "height": int(height), "width": int(width)})
        for n in np.flatnonzero(np.asarray(classes) >= 0):
            mask, box = _rle(masks[n]), _xywh(boxes[n])
            row = {"id": len(rows) + 1, "image_id": int(image_id), "category_id": int(classes[n]) + 1, "bbox": box}
            rows.append(row | {"segmentation": mask, "area": float(rle.area(mask)), "iscrowd": 0})
    categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    return {"images": pictures, "annotations": rows, "categories": categories}


def evaluate(
    truth: dict, rows: list[dict], kinds: Iterable[str] = tuple(KINDS), image_ids=None, size_of_masks: str = "segm"
) -> Scores:
    """COCO's figures.

    Args:
      truth: ground truth in COCO's format.
      rows: results in COCO's format, of all images; see `results`.
      kinds: of KINDS.
      image_ids: those to compare on; None = all of the truth.
      size_of_masks: "segm": the area of a detected mask says whether it is small, medium or large, as in detectron2.
        "bbox": that of its box, which is what pycocotools makes of a file of results that has boxes too. It changes
        the figures of masks by size and no others.

    Raises:
      UserError: a result is of an image or a category that the truth does not have, or lacks what a kind compares.
    """
    from pycocotools import cocoeval

    image_ids = sorted({row["id"] for row in truth["images"]} if image_ids is None else set(map(int, image_ids)))
    _check(truth, rows, kinds)
    scalars, classes = {}, {}
    for kind in kinds:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress and a table
            # Ids from 1: to COCOeval an object with id 0 looks unmatched.
            known = _coco(truth, [row | {"id": n} for n, row in enumerate(truth["annotations"], 1)])
            detected = _coco(truth, _detections(rows, size_of_masks if kind == "segm" else kind))
            run = cocoeval.COCOeval(known, detected, kind)
            run.params.imgIds = image_ids
            run.evaluate()
            run.accumulate()
            run.summarize()
        scalars |= {f"{kind}_{name}": float(value) for name, value in zip(FIGURES, run.stats)}
        precision = run.eval["precision"][..., -1]  # [10 IoUs, 101 recalls, C, 4] of 100 detections; -1 = undefined
        defined = (precision > -1).all((0, 1))
        classes[kind] = np.where(defined, precision.mean((0, 1)), np.nan)
    return Scores(scalars, classes)


def _check(truth: dict, rows: list[dict], kinds: Iterable[str]) -> None:
    images, categories = ({row["id"] for row in truth[table]} for table in ("images", "categories"))
    for number, row in enumerate(rows):
        if row["image_id"] not in images or row["category_id"] not in categories:
            raise errors.UserError(
                f"result {number} is of image {row['image_id']} and category {row['category_id']}, "
                "which the annotations do not have; use the results of these images"
            )
        missing = [KINDS[kind] for kind in kinds if KINDS[kind] not in row]
        if missing:
            raise errors.UserError(f"result {number} has no {missing[0]}; detect with it, or compare something else")


def _coco(truth: dict, annotations: list[dict]):
    from pycocotools import coco

    api = coco.COCO()
    api.dataset = truth | {"annotations": annotations}
    api.createIndex()
    return api


def _detections(rows: list[dict], size: str) -> list[dict]:
    """Results with what COCOeval reads; `size`: of KINDS, whose area says small or large."""
    from pycocotools import mask as rle

    detections = []
    for number, row in enumerate(rows, 1):
        area = row["bbox"][2] * row["bbox"][3] if size == "bbox" else float(rle.area(row["segmentation"]))
        detections.append(row | {"id": number, "area": area, "iscrowd": 0})
    return detections

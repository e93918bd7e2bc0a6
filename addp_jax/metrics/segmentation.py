"""Intersection over union of label maps, by mmsegmentation's rules: arrays in, numbers out.

A confusion matrix int64 [C,C], true classes as rows, holds all that is needed. Those of images, batches or processes
are added up.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from addp_jax.ops.segmentation import IGNORED


def confusion(prediction: np.ndarray, label: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 [C,C]: how many pixels of each true class (row) were taken for each class (column).

    Args:
      prediction: int [...], 0..C-1 where the label counts.
      label: int [...], 0..C-1 or IGNORED.
    Raises ValueError: shapes that differ, or a number beyond the classes.
    """
    prediction, label = np.asarray(prediction), np.asarray(label)
    if prediction.shape != label.shape:
        raise ValueError(f"prediction {prediction.shape} and label {label.shape} differ in shape")
    counted = label != IGNORED
    predicted, true = prediction[counted].astype(np.int32), label[counted].astype(np.int32)
    for values in (predicted, true):
        if values.size and not 0 <= values.min() <= values.max() < num_classes:
            raise ValueError(f"a class beyond 0..{num_classes - 1}")
    pairs = np.bincount(true * num_classes + predicted, minlength=num_classes**2)
    return pairs.reshape(num_classes, num_classes)


class Scores(NamedTuple):
    """Fractions 0..1.

    scalars: mIoU and mAcc, means over the classes that have a value; aAcc, the share of all pixels. NaN without pixels.
    iou: float64 [C], intersection / union; NaN for a class that is neither there nor predicted.
    accuracy: float64 [C], intersection / pixels of the class; NaN for a class that is not there.
    """

    scalars: dict[str, float]
    iou: np.ndarray
    accuracy: np.ndarray


def scores(matrix: np.ndarray) -> Scores:
    """Of the confusion matrix [C,C] of all pixels."""
    right, true, predicted = np.diag(matrix).astype(np.float64), matrix.sum(1), matrix.sum(0)
    iou, accuracy = _share(right, true + predicted - right), _share(right, true)
    scalars = {"mIoU": _mean(iou), "mAcc": _mean(accuracy), "aAcc": float(_share(right.sum(), true.sum()))}
    return Scores(scalars, iou, accuracy)


def _share(part, whole) -> np.ndarray:
    return np.where(np.asarray(whole) > 0, part / np.maximum(whole, 1), np.nan)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")

"""Accuracy of classifiers: logits and labels in, numbers out."""

from __future__ import annotations

import numpy as np

# Top-1 error of AlexNet over the five severities of each ImageNet-C corruption (arXiv:1903.12261): the unit of mCE.
ALEXNET = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
    "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056,
    "pixelate": 0.717840, "jpeg_compression": 0.606500,
}  # fmt: skip


def in_top(logits, labels, k: int) -> np.ndarray:
    """bool [B]: fewer than `k` classes of `logits` [B,C] lie above the label's."""
    logits, labels = np.asarray(logits), np.asarray(labels)
    return (logits > np.take_along_axis(logits, labels[:, None], 1)).sum(1) < k


def cross_entropy(logits, labels) -> np.ndarray:
    """float64 [B]."""
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(1, keepdims=True)
    return np.log(np.exp(logits).sum(1)) - np.take_along_axis(logits, np.asarray(labels)[:, None], 1)[:, 0]


def confusion(labels, predicted, num_classes: int) -> np.ndarray:
    """int64 [C,C]: how often each class (row) was taken for each (column)."""
    matrix = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(matrix, (np.asarray(labels), np.asarray(predicted)), 1)
    return matrix


def class_accuracy(matrix) -> np.ndarray:
    """float64 [C] from a confusion matrix; nan for a class without examples."""
    counts = matrix.sum(1)
    return np.divide(np.diag(matrix), counts, out=np.full(len(matrix), np.nan), where=counts > 0)


def mean_corruption_error(error: dict[str, float]) -> float:
    """mCE from the error of each corruption, averaged over severities: relative to AlexNet's, mean over corruptions."""
    return float(np.mean([error[name] / ALEXNET[name] for name in ALEXNET]))

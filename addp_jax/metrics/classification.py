"""Accuracy of classifiers: logits and labels in, numbers out.

Everything that counts as right is counted by `in_top`: a tie is never a hit, nor is a score that is not finite, so that a
network that says the same of all classes, or nothing at all, names none rightly.
"""

from __future__ import annotations

import numpy as np

# Top-1 error of AlexNet over the five severities of each ImageNet-C corruption (arXiv:1903.12261): the unit of mCE.
ALEXNET = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
    "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056,
    "pixelate": 0.717840, "jpeg_compression": 0.606500,
}  # fmt: skip


def in_top(logits, labels, k: int, xp=np):
    """bool [...]: fewer than `k` other classes of `logits` [...,C] have a score as high as the label's, which is finite.

    A NaN among the scores makes it False. xp: numpy, or jax.numpy under a trace.
    """
    logits, labels = xp.asarray(logits), xp.asarray(labels)
    own = xp.take_along_axis(logits, labels[..., None], -1)
    rivals = (logits >= own).sum(-1) - 1
    return (rivals < k) & xp.isfinite(own[..., 0]) & ~xp.isnan(logits).any(-1)


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


def class_accuracy(hits, counts) -> np.ndarray:
    """float64 [C] from the hits and the examples of each class [C]; nan for a class without examples."""
    return np.divide(hits, counts, out=np.full(len(counts), np.nan), where=np.asarray(counts) > 0)


def mean_corruption_error(error: dict[str, float]) -> float:
    """mCE from the error of each corruption, averaged over severities: relative to AlexNet's, mean over corruptions."""
    return float(np.mean([error[name] / ALEXNET[name] for name in ALEXNET]))

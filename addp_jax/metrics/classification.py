"""Accuracy of classifiers: scores and labels in, numbers out.

One rule for every count: an example is right only where its scores are all finite and its label's score is strictly
above the others'. A tie counts for the rival, and NaN or infinite scores decide nothing, so that a classifier that has
learnt nothing, or is broken, is never right by the order of the classes.
"""

from __future__ import annotations

import numpy as np

UNDECIDED = -1  # the predicted class where no score is the largest
MATRIX_CLASSES = 256  # at most so many have a confusion matrix, whose size is their square
# Top-1 error of AlexNet over the five severities of each ImageNet-C corruption (arXiv:1903.12261): the unit of mCE.
ALEXNET = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
    "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056,
    "pixelate": 0.717840, "jpeg_compression": 0.606500,
}  # fmt: skip


def in_top(scores, labels, k: int, xp=np):
    """bool [...]: fewer than `k` other classes of `scores` [...,C] reach the label's score, and all scores are finite.

    Equal scores are therefore no hit for k < C, and a hit for k >= C. `labels`: int [...] in [0,C). xp: numpy, or
    jax.numpy under a trace.
    """
    scores, labels = xp.asarray(scores), xp.asarray(labels)
    own = xp.take_along_axis(scores, labels[..., None], -1)
    return xp.isfinite(scores).all(-1) & ((scores >= own).sum(-1) <= k)


def decisions(scores) -> np.ndarray:
    """int64 [B]: the class of `scores` [B,C] whose score is the largest, -1 where two share it or one is not finite.

    `decisions(scores) == labels` is `in_top(scores, labels, 1)`.
    """
    scores = np.asarray(scores)
    top = np.where(np.isfinite(scores), scores, -np.inf).argmax(1)
    return np.where(in_top(scores, top, 1), top, UNDECIDED)


def cross_entropy(logits, labels) -> np.ndarray:
    """float64 [B]; NaN where a logit is NaN or +inf."""
    logits = np.asarray(logits, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        logits = logits - logits.max(1, keepdims=True)
        return np.log(np.exp(logits).sum(1)) - np.take_along_axis(logits, np.asarray(labels)[:, None], 1)[:, 0]


class Tally:
    """Examples and hits of each class, in memory that grows with the number of classes C.

    `examples`, `hits`: int64 [C], by true class. `matrix`: int64 [C,C], how often each class (row) was taken for each
    (column), undecided examples in none; None above 256 classes.
    """

    def __init__(self, num_classes: int):
        self.examples, self.hits = np.zeros(num_classes, np.int64), np.zeros(num_classes, np.int64)
        self.matrix = np.zeros((num_classes, num_classes), np.int64) if num_classes <= MATRIX_CLASSES else None

    def add(self, labels, predicted) -> None:
        """`labels`: int [B] in [0,C). `predicted`: int [B], as `decisions` has it."""
        labels, predicted = np.asarray(labels), np.asarray(predicted)
        np.add.at(self.examples, labels, 1)
        np.add.at(self.hits, labels, labels == predicted)
        if self.matrix is not None:
            decided = predicted != UNDECIDED
            np.add.at(self.matrix, (labels[decided], predicted[decided]), 1)

    def accuracy(self) -> np.ndarray:
        """float64 [C], of each class; NaN for a class without examples."""
        return np.divide(self.hits, self.examples, out=np.full(len(self.hits), np.nan), where=self.examples > 0)


def mean_corruption_error(error: dict[str, float]) -> float:
    """mCE from the error of each corruption, averaged over severities: relative to AlexNet's, mean over corruptions."""
    return float(np.mean([error[name] / ALEXNET[name] for name in ALEXNET]))

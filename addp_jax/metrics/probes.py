"""What features are worth, told by cheap means: their effective rank, nearest neighbours, a linear classifier."""

from __future__ import annotations

import jax
import numpy as np

from addp_jax import partition
from addp_jax.metrics import classification, nearest

NEIGHBOURS, TEMPERATURE = 20, 0.07  # as the task `linear_probe` has them
ROUNDING = 1e-6  # relative, of features that a network computes in float32
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the ridge regression; 1 = the variance of a feature


def effective_rank(features) -> float:
    """Of features [N,D]: exp of the entropy of their covariance's eigenvalues, divided by their sum. From 1 to D.

    0 where all rows are equal but for the rounding of float32; NaN where a feature is not finite.
    """
    features = np.asarray(features, np.float64)
    if not np.isfinite(features).all():
        return float("nan")
    centred = features - features.mean(0)
    if (centred**2).sum() <= ROUNDING**2 * (features**2).sum():
        return 0.0
    values = np.linalg.eigvalsh(centred.T @ centred)
    shares = values[values > 0] / values[values > 0].sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def knn_accuracy(bank, bank_labels, queries, labels) -> float:
    """Share of `queries` [M,D] whose label [M] the weighted votes of their neighbours in `bank` [N,D] tell."""
    classes, index = np.unique(bank_labels, return_inverse=True)
    settings = dict(k=min(NEIGHBOURS, len(bank)), temperature=TEMPERATURE, num_classes=len(classes))
    with partition.one_device():
        weighted, _ = jax.device_get(nearest.votes(bank, index.astype(np.int32), queries, **settings))
    return _accuracy(weighted, classes, labels)


def probe_accuracy(bank, bank_labels, queries, labels) -> float:
    """Share of `queries` [M,D] whose label [M] a ridge regression of the classes, fitted to `bank` [N,D], tells.

    Features are standardised by the bank's statistics. Of PENALTIES the one with the least leave-one-out error counts.
    """
    bank, queries = np.asarray(bank, np.float64), np.asarray(queries, np.float64)
    if not (np.isfinite(bank).all() and np.isfinite(queries).all()):
        return 0.0
    classes, index = np.unique(bank_labels, return_inverse=True)
    mean, deviation = bank.mean(0), np.where(bank.std(0) > 0, bank.std(0), 1)
    bank, queries = (bank - mean) / deviation, (queries - mean) / deviation
    targets = np.eye(len(classes))[index]
    centre = targets.mean(0)
    values, axes = np.linalg.eigh(bank.T @ bank / len(bank))
    scores, towards = bank @ axes, axes.T @ (bank.T @ (targets - centre)) / len(bank)

    def error_left_out(penalty):
        shrunk = 1 / (np.maximum(values, 0) + penalty)
        leverage = (1 + scores**2 @ shrunk) / len(bank)  # 1: of the mean
        residuals = targets - centre - scores @ (shrunk[:, None] * towards)
        return ((residuals / (1 - leverage)[:, None]) ** 2).sum()

    penalty = min(PENALTIES, key=error_left_out)
    weights = axes @ (towards / (np.maximum(values, 0) + penalty)[:, None])
    return _accuracy(queries @ weights + centre, classes, labels)


def _accuracy(scores, classes, labels) -> float:
    """Of `scores` [M,C] of `classes` [C], sorted; a label that is none of these is missed."""
    decided = classification.decisions(scores)
    return float(((decided != classification.UNDECIDED) & (classes[decided] == labels)).mean())

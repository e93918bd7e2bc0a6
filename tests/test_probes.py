"""Effective rank, nearest neighbours and the linear probe of features."""

import numpy as np
import pytest
from sklearn import linear_model

from addp_jax.metrics import probes


def clusters(count=60, width=12, classes=3, noise=1.0, seed=0):
    """(features, labels) around a centre for each class; the seed does not move the centres."""
    centres = 4 * np.random.default_rng(9).normal(size=(classes, width))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count).astype(np.int32)
    return (centres[labels] + noise * rng.normal(size=(count, width))).astype(np.float32), labels


# --- rank -------------------------------------------------------------------------------------------------------------


def test_equal_variances_along_some_axes_count_these_axes():
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0][:3]
    features = 100 + np.concatenate([axes, -axes])
    assert probes.effective_rank(features) == pytest.approx(3)
    assert probes.effective_rank(1e-3 * features) == pytest.approx(3)


def test_the_rank_is_exp_of_the_entropy_of_the_eigenvalues():
    features = np.random.default_rng(1).normal(size=(40, 5)) * [3, 1, 1, 0.5, 0.1]
    shares = np.linalg.eigvalsh(np.cov(features.T))
    shares /= shares.sum()
    assert probes.effective_rank(features) == pytest.approx(np.prod(shares**-shares))


def test_features_without_any_or_with_infinite_variance():
    assert probes.effective_rank(np.zeros((5, 3), np.float32)) == 0
    same = np.random.default_rng(2).normal(size=(1, 30)) * (1 + 1e-7 * np.random.default_rng(3).normal(size=(50, 30)))
    assert probes.effective_rank(same) == 0
    assert np.isnan(probes.effective_rank(np.array([[0.0, np.inf], [1.0, 2.0]])))


# --- accuracies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accuracy", (probes.knn_accuracy, probes.probe_accuracy))
def test_what_is_apart_is_told_apart_and_what_is_not_is_not(accuracy):
    bank, queries = clusters(seed=1), clusters(seed=2)
    assert accuracy(*bank, *queries) == 1
    assert accuracy(*clusters(seed=1, noise=1000), *clusters(seed=2, noise=1000)) < 0.6
    features, labels = queries
    unseen = np.where(np.arange(len(labels)) < 15, 2**31 - 1, labels).astype(np.int32)  # a quarter of unknown classes
    assert accuracy(*bank, features, unseen) == 0.75
    assert accuracy(*bank, np.full_like(features, np.nan), labels) == 0


def test_the_probe_is_the_ridge_regression_of_least_error_left_out():
    for noise in (2.0, 8.0, 40.0):  # which want other penalties
        (bank, labels), (queries, truth) = clusters(noise=noise, seed=3), clusters(400, noise=noise, seed=4)
        mean, deviation = bank.mean(0), bank.std(0)
        theirs = linear_model.RidgeCV(len(bank) * np.array(probes.PENALTIES)).fit((bank - mean) / deviation, np.eye(3)[labels])
        expected = (theirs.predict((queries - mean) / deviation).argmax(1) == truth).mean()
        assert probes.probe_accuracy(bank, labels, queries, truth) == pytest.approx(expected, abs=1e-9)


def test_a_feature_that_never_changes_and_more_features_than_images_do_no_harm():
    (bank, labels), (queries, truth) = clusters(20, width=30, seed=5), clusters(width=30, seed=6)
    bank[:, 0] = queries[:, 0] = 3
    assert probes.probe_accuracy(bank, labels, queries, truth) > 0.9

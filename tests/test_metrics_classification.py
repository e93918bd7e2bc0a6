"""Accuracy, confusion and mCE."""

import jax.numpy as jnp
import numpy as np
import pytest

from addp_jax.metrics import classification as metrics


def test_top_k_counts_labels_among_the_k_largest():
    logits = np.array([[3.0, 2.0, 1.0, 0.0]] * 4)
    labels = np.arange(4)
    for k in range(1, 5):
        assert metrics.in_top(logits, labels, k).sum() == k


def test_cross_entropy_of_large_logits_is_finite():
    values = metrics.cross_entropy(np.array([[1e4, 0.0], [0.0, 0.0]]), np.array([1, 0]))
    np.testing.assert_allclose(values, [1e4, np.log(2)])


def test_confusion_has_true_classes_as_rows():
    matrix = metrics.confusion([0, 0, 2], [0, 1, 2], 3)
    np.testing.assert_array_equal(matrix, [[1, 1, 0], [0, 0, 0], [0, 0, 1]])
    np.testing.assert_array_equal(metrics.class_accuracy(np.diag(matrix), matrix.sum(1)), [0.5, np.nan, 1.0])


@pytest.mark.parametrize("xp", (np, jnp))
def test_ties_and_scores_that_are_not_finite_are_never_hits(xp):
    same = np.zeros((3, 3))
    assert not metrics.in_top(same, np.arange(3), 1, xp).any() and metrics.in_top(same, np.arange(3), 5, xp).all()
    assert list(metrics.in_top([[1.0, 1.0, 0.0], [1.0, 0.5, 0.0]], [0, 0], 1, xp)) == [False, True]
    for bad in (np.nan, np.inf, -np.inf):
        assert not metrics.in_top(np.full((3, 3), bad), np.arange(3), 3, xp).any()
    assert not metrics.in_top([[1.0, np.nan, 0.0]], [0], 1, xp).any() and not metrics.in_top([[1.0, np.inf]], [0], 1, xp).any()
    assert metrics.in_top([[1.0, -np.inf]], [0], 1, xp).all()


def test_hits_of_many_places_at_once():
    logits = np.random.default_rng(0).normal(size=(2, 5, 7))
    np.testing.assert_array_equal(metrics.in_top(logits, logits.argmax(-1), 1), np.ones((2, 5), bool))


def test_alexnet_has_an_mce_of_one_and_no_error_has_none():
    assert len(metrics.ALEXNET) == 15
    assert metrics.mean_corruption_error(metrics.ALEXNET) == pytest.approx(1)
    assert metrics.mean_corruption_error(dict.fromkeys(metrics.ALEXNET, 0.0)) == 0

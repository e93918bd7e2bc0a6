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


def test_equal_scores_are_a_hit_only_where_all_classes_are_asked_for():
    logits, labels = np.zeros((3, 3)), np.arange(3)
    assert [int(metrics.in_top(logits, labels, k).sum()) for k in (1, 2, 3, 5)] == [0, 0, 3, 3]


def test_a_tie_counts_for_the_rival():
    scores, labels = np.array([[2.0, 2.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]), np.array([0, 0, 0])
    assert metrics.in_top(scores, labels, 1).tolist() == [False, True, False]
    assert metrics.in_top(scores, labels, 2).tolist() == [True, True, False]
    assert metrics.decisions(scores).tolist() == [-1, 0, -1]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("places", [[0], [1], [2], [0, 1, 2]])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_scores_that_are_not_finite_are_never_right(value, places, k):
    scores = np.array([[3.0, 2.0, 1.0]] * 3, np.float32)
    scores[:, places] = value
    assert not metrics.in_top(scores, np.arange(3), k).any()
    assert metrics.decisions(scores).tolist() == [-1] * 3


def test_hits_of_many_places_at_once_under_a_trace_too():
    scores = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)
    scores[0, 0] = 1.0
    for xp in (np, jnp):
        hits = np.asarray(metrics.in_top(scores, scores.argmax(-1), 1, xp))
        assert hits.sum() == 9 and not hits[0, 0]


def test_decisions_are_the_top_class():
    scores = np.random.default_rng(0).integers(0, 4, (200, 5)).astype(float)  # many ties
    scores[::7, 2] = np.nan
    for label in range(5):
        labels = np.full(200, label)
        np.testing.assert_array_equal(metrics.decisions(scores) == labels, metrics.in_top(scores, labels, 1))


def test_cross_entropy_of_what_is_not_finite_is_not_finite(recwarn):
    values = metrics.cross_entropy(np.array([[np.nan, 0.0], [np.inf, 0.0], [-np.inf, 0.0], [1.0, 1.0]]), np.array([0, 0, 0, 0]))
    assert np.isfinite(values).tolist() == [False, False, False, True] and not recwarn.list


def tally(labels, predicted, num_classes):
    found = metrics.Tally(num_classes)
    found.add(labels, predicted)
    return found


def test_confusion_has_true_classes_as_rows():
    found = tally([0, 0, 2], [0, 1, 2], 3)
    np.testing.assert_array_equal(found.matrix, [[1, 1, 0], [0, 0, 0], [0, 0, 1]])
    np.testing.assert_array_equal(found.accuracy(), [0.5, np.nan, 1.0])


def test_undecided_examples_are_examples_and_no_hits():
    found = tally([0, 0, 1], [-1, 0, -1], 2)
    assert found.examples.tolist() == [2, 1] and found.hits.tolist() == [1, 0]
    assert found.matrix.tolist() == [[1, 0], [0, 0]] and found.accuracy().tolist() == [0.5, 0.0]


def test_memory_grows_with_the_classes_not_with_their_square():
    many = 10**6
    found = tally([many - 1, many - 1, 5], [many - 1, 5, -1], many)
    assert found.matrix is None and found.examples.sum() == 3 and found.hits.sum() == 1
    assert metrics.Tally(metrics.MATRIX_CLASSES).matrix is not None and metrics.Tally(metrics.MATRIX_CLASSES + 1).matrix is None


def test_alexnet_has_an_mce_of_one_and_no_error_has_none():
    assert len(metrics.ALEXNET) == 15
    assert metrics.mean_corruption_error(metrics.ALEXNET) == pytest.approx(1)
    assert metrics.mean_corruption_error(dict.fromkeys(metrics.ALEXNET, 0.0)) == 0

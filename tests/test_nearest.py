"""The nearest-neighbour vote against a loop over plain numpy."""

import collections

import numpy as np
import pytest

from addp_jax.metrics import nearest

RNG = np.random.default_rng(0)
BANK, LABELS = RNG.normal(size=(40, 6)).astype(np.float32), RNG.integers(0, 4, 40)
QUERIES = RNG.normal(size=(70, 6)).astype(np.float32)  # more than one chunk


def vote(bank=BANK, queries=QUERIES, k=7):
    weighted, plain = nearest.votes(bank, LABELS, queries, k=k, temperature=0.07, num_classes=4)
    return np.asarray(weighted), np.asarray(plain)


def test_votes_are_those_of_a_plain_loop():
    weighted, plain = vote()
    unit = lambda rows: rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for query, w, p in zip(unit(QUERIES), weighted, plain):
        similarity = unit(BANK) @ query
        near = np.argsort(-similarity)[:7]
        expected = np.zeros(4)
        np.add.at(expected, LABELS[near], np.exp(similarity[near] / 0.07))
        np.testing.assert_allclose(w, expected / expected.sum(), atol=1e-5)
        counts = collections.Counter(LABELS[near].tolist())
        assert counts[int(p.argmax())] == max(counts.values())


def test_length_of_a_feature_makes_no_difference():
    np.testing.assert_allclose(vote()[0], vote(bank=BANK * 5, queries=QUERIES * 0.1)[0], atol=1e-5)


def test_the_nearest_of_one_neighbour_is_the_example_itself():
    weighted, plain = nearest.votes(BANK, LABELS, BANK, k=1, temperature=0.07, num_classes=4)
    assert (np.asarray(weighted).argmax(1) == LABELS).all() and (np.asarray(plain).argmax(1) == LABELS).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_a_query_without_a_direction_gets_no_votes_and_harms_no_other(value):
    queries = QUERIES.copy()
    queries[3] = value
    for found, sound in zip(vote(queries=queries), vote()):
        assert not found[3].any()
        np.testing.assert_array_equal(np.delete(found, 3, 0), np.delete(sound, 3, 0))


def test_one_number_of_a_query_that_is_not_finite_is_enough():
    queries = QUERIES.copy()
    queries[3, 2] = np.nan
    assert not vote(queries=queries)[1][3].any()


@pytest.mark.parametrize("value", [np.nan, -np.inf, 0.0])
def test_a_training_example_without_a_direction_is_nobodys_neighbour(value):
    bank, labels = np.concatenate([BANK, np.full((2, 6), value, np.float32)]), np.append(LABELS, [0, 1])
    found = nearest.votes(bank, labels, QUERIES, k=7, temperature=0.07, num_classes=4)
    for one, sound in zip(found, vote()):
        np.testing.assert_allclose(one, sound, atol=1e-6)


def test_fewer_neighbours_than_k_share_the_votes():
    bank = np.full((7, 6), np.nan, np.float32)
    bank[:3] = BANK[:3]
    weighted, plain = nearest.votes(bank, LABELS[:7], QUERIES, k=7, temperature=0.07, num_classes=4)
    np.testing.assert_allclose(np.asarray(weighted).sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(np.asarray(plain).sum(1), 3.5, atol=1e-5)

"""The nearest-neighbour vote against a loop over plain numpy."""

import collections

import numpy as np

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

"""Distances between sets of features: torch-fidelity's and pytorch-fid's numbers, and answers known in closed form."""

import numpy as np
import pytest

from addp_jax.metrics import generation

AGREEMENT = 1e-4  # relative, with the other implementations on the same features
CLOSED_FORM = 1e-9  # relative
# torch-fidelity 0.4.0 and pytorch-fid 0.3.0 (torch 2.13.0, numpy 2.4) on `sets()`.
FID, FID_OF_40_ROWS, PYTORCH_FID = 0.6497816698379637, 16.93355120449872, 0.6497818795426511
IS, IS_IN_ORDER = (5.4698740993357555, 0.07366246604510066), (5.5054643688885765, 0.2037473809409237)
KID = (0.005331583023071289, 0.001206759059578585)
PRECISION, RECALL = 0.8458333611488342, 0.628000020980835


def sets(count=1500, other=1200, width=64):
    """Features [1500,64] and [1200,64] of which a third is 0, as after a ReLU, and logits [1200,20]."""
    rng = np.random.RandomState(0)
    mix = rng.standard_normal((width, width)) / np.sqrt(width)
    real = np.maximum(rng.standard_normal((count, width)) @ mix + 0.3, 0)
    samples = np.maximum(rng.standard_normal((other, width)) @ mix * 0.9 + 0.4, 0)
    return [array.astype(np.float32) for array in (real, samples, 3 * rng.standard_normal((other, 20)))]


def gaussian(rows, batch_size=100):
    moments = generation.Moments(rows.shape[1])
    for first in range(0, len(rows), batch_size):
        moments.add(rows[first : first + batch_size])
    return moments.gaussian()


def test_fid_agrees():
    real, samples, _ = sets()
    distance = generation.frechet_distance(gaussian(real), gaussian(samples))
    np.testing.assert_allclose(distance, [FID, PYTORCH_FID], rtol=AGREEMENT)
    few = generation.frechet_distance(gaussian(real[:40]), gaussian(samples[:40]))  # singular covariances
    np.testing.assert_allclose(few, FID_OF_40_ROWS, rtol=AGREEMENT)


def test_inception_score_agrees():
    logits = sets()[2]
    np.testing.assert_allclose(generation.inception_score(logits), IS, rtol=AGREEMENT)
    np.testing.assert_allclose(generation.inception_score(logits, seed=None), IS_IN_ORDER, rtol=AGREEMENT)


def test_kid_agrees():
    real, samples, _ = sets()
    np.testing.assert_allclose(generation.kernel_distance(real, samples), KID, rtol=AGREEMENT)


def test_precision_and_recall_agree(monkeypatch):
    real, samples, _ = sets()
    values = generation.neighbourhoods(real, samples)
    np.testing.assert_allclose([values["precision"], values["recall"]], [PRECISION, RECALL], rtol=AGREEMENT)
    monkeypatch.setattr(generation, "BLOCK", 77)
    assert generation.neighbourhoods(real, samples) == values


def test_fid_of_two_gaussians():
    """Diagonal covariances: |m1-m2|^2 + sum (s1-s2)^2; in a rotated basis the same, also where they are singular."""
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    means, scales = rng.normal(size=(2, 6)), np.abs(rng.normal(size=(2, 6)))
    scales[0, :2] = 0
    one, other = (
        generation.Gaussian(rotation @ mean, rotation @ np.diag(scale**2) @ rotation.T) for mean, scale in zip(means, scales)
    )
    expected = ((means[0] - means[1]) ** 2).sum() + ((scales[0] - scales[1]) ** 2).sum()
    np.testing.assert_allclose(generation.frechet_distance(one, other), expected, rtol=CLOSED_FORM)


def test_fid_of_covariances_that_do_not_commute():
    """Of 2x2 covariances: tr (AB)^(1/2) = (tr AB + 2 (det AB)^(1/2))^(1/2)."""
    one, other = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[0.5, -0.3], [-0.3, 3.0]])
    product = one @ other
    expected = np.trace(one + other) - 2 * np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    distance = generation.frechet_distance(generation.Gaussian(np.zeros(2), one), generation.Gaussian(np.zeros(2), other))
    np.testing.assert_allclose(distance, expected, rtol=CLOSED_FORM)


def test_noise_of_singular_covariances_does_not_count():
    """Fewer rows than columns, in two spaces at right angles: nothing overlaps, and the distance is that of the traces."""
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(300, 300)))[0]
    sets_of_rows = [rng.normal(size=(60, 100)) @ rotation[part : part + 100] for part in (0, 150)]
    gaussians = [gaussian(rows - rows.mean(0)) for rows in sets_of_rows]
    expected = sum(np.trace(one.covariance) for one in gaussians)
    np.testing.assert_allclose(generation.frechet_distance(*gaussians), expected, rtol=CLOSED_FORM)


@pytest.mark.parametrize("count", (30, 1500))  # fewer rows than columns, and more
def test_a_set_against_itself(count):
    rows = sets()[0][:count]
    assert generation.frechet_distance(gaussian(rows), gaussian(rows)) < 1e-10
    values = generation.neighbourhoods(rows, rows)
    assert values["precision"] == values["recall"] == values["coverage"] == 1
    assert generation.kernel_distance(rows, rows, subsets=10)[0] <= 0  # unbiased for independent sets


def test_kid_is_unbiased():
    """Of 200 pairs of sets of one distribution the mean is 0 within four standard errors."""
    rng = np.random.default_rng(0)
    values = [generation.kernel_distance(*rng.normal(size=(2, 50, 8)), subsets=1)[0] for _ in range(200)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(200)


def test_moments_do_not_depend_on_batches():
    rows = 1000 + sets()[0][:301].astype(np.float64)
    whole = gaussian(rows, 301)
    np.testing.assert_allclose(whole.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole.covariance, np.cov(rows, rowvar=False), rtol=CLOSED_FORM, atol=1e-12)
    parts = gaussian(np.tile(rows, (9, 1)), 7)  # enough rows to be counted in more than once
    np.testing.assert_allclose(parts.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(parts.covariance * 2708 / 9 / 300, whole.covariance, rtol=CLOSED_FORM, atol=1e-10)
    with pytest.raises(ValueError, match="1 rows"):
        gaussian(rows[:1])


def test_inception_score_of_sure_and_of_equal_labels():
    """N sure labels, evenly spread over C classes, score C; equal ones 1."""
    labels = 50 * np.eye(8)[np.arange(800) % 8]
    np.testing.assert_allclose(generation.inception_score(labels, seed=None), (8, 0), atol=1e-6)
    np.testing.assert_allclose(generation.inception_score(np.zeros((100, 8))), (1, 0), atol=1e-12)


def test_kid_of_a_set_moved_by_a_constant():
    """Rows that are all one vector: MMD^2 = k(a,a) + k(b,b) - 2 k(a,b), exactly."""
    one, other = np.full((9, 4), 0.5, np.float32), np.full((7, 4), -1.5, np.float32)
    kernel = lambda a, b: (a * b + 1) ** 3
    expected = kernel(0.5, 0.5) + kernel(-1.5, -1.5) - 2 * kernel(0.5, -1.5)
    np.testing.assert_allclose(generation.kernel_distance(one, other), (expected, 0), rtol=CLOSED_FORM, atol=1e-12)


def test_neighbourhoods_on_a_line():
    """Real rows at 0, 1, ..., 9 and samples at 4.5 (inside) and 100 (far away), eight of each."""
    real = np.arange(10.0)[:, None]
    samples = np.repeat([[4.5], [100.0]], 8, axis=0)
    values = generation.neighbourhoods(real, samples)
    # The 5th neighbour of 0, 1, ..., 9 is 5, 4, 3, 3, 3, 3, 3, 3, 4, 5 away; 4.5 is nearer than that to 0..8 and to 9.
    held = (np.abs(4.5 - np.arange(10)) < [5, 4, 3, 3, 3, 3, 3, 3, 4, 5]).sum()
    assert values["precision"] == 0.5 and values["recall"] == 0  # equal samples' neighbourhoods are points
    np.testing.assert_allclose([values["density"], values["coverage"]], [held / 5 / 2, held / 10])


def test_a_set_without_enough_neighbours_has_no_value():
    real, samples, _ = sets()
    assert set(generation.neighbourhoods(real[:5], samples)) == {"precision", "recall"}
    assert set(generation.neighbourhoods(real, samples[:3])) == {"precision", "density", "coverage"}

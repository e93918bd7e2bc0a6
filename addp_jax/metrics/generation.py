"""How far apart two sets of images are, from the features of a network: float64 numpy, arrays in, numbers out.

| function | measure | source |
|---|---|---|
| `frechet_distance` | FID, sFID: distance of the two Gaussians with the sets' moments | arXiv:1706.08500, 2103.03841 |
| `inception_score` | IS: how sure each label is and how varied they are together | arXiv:1606.03498 |
| `kernel_distance` | KID: unbiased squared MMD with a cubic kernel | arXiv:1801.01401 |
| `neighbourhoods` | improved precision and recall; density and coverage | arXiv:1904.06991, 2002.09797 |

What is free in these papers (splits, subsets, neighbours, random order) is set as in torch-fidelity 0.4.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.linalg
import scipy.special

SEED = 2020  # torch-fidelity's, of the order for IS and the subsets for KID
SPLITS = 10  # of IS
SUBSETS, SUBSET_SIZE = 100, 1000  # of KID
MANIFOLD_NEIGHBOURS = 3  # k of precision and recall
DENSITY_NEIGHBOURS = 5  # k of density and coverage
BLOCK = 1000  # rows that are worked on at a time


class Moments:
    """Mean and covariance of rows that come in batches of any size."""

    def __init__(self, width: int):
        self._count, self._mean = 0, np.zeros(width)
        self._scatter = np.zeros((width, width))  # sum of the outer products of the deviations from the mean
        self._waiting = []  # small batches: adding to the scatter costs more than they do

    def add(self, rows) -> None:
        """Count `rows` [n,D] in."""
        self._waiting.append(np.array(rows))
        if sum(map(len, self._waiting)) >= BLOCK:
            self._count_waiting()

    def _count_waiting(self) -> None:
        batches, self._waiting = self._waiting, []
        if batches:
            rows = np.concatenate(batches).astype(np.float64)
            count, mean, total = len(rows), rows.mean(0), max(self._count + len(rows), 1)
            rows -= mean
            gap = mean - self._mean
            self._scatter += rows.T @ rows
            self._scatter += np.outer(gap, gap * (self._count * count / total))
            self._mean = self._mean + gap * (count / total)
            self._count = total

    def gaussian(self) -> Gaussian:
        """The Gaussian with these moments. Raises ValueError below two rows."""
        self._count_waiting()
        if self._count < 2:
            raise ValueError(f"the covariance of {self._count} rows is not defined")
        return Gaussian(self._mean, self._scatter / (self._count - 1))


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """`mean` [D] and `covariance` [D,D] (divided by N - 1)."""

    mean: np.ndarray
    covariance: np.ndarray


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """Squared Wasserstein-2 distance of two Gaussians, at least 0.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). The trace of the last root is the sum of the singular values of
    C1^(1/2) C2^(1/2): no root of a product, which is not symmetric, is needed, and covariances of fewer rows than
    columns do no harm.
    """
    gap = one.mean - other.mean
    overlap = scipy.linalg.svdvals(root(one.covariance).T @ root(other.covariance)).sum()
    distance = gap @ gap + np.trace(one.covariance) + np.trace(other.covariance) - 2 * overlap
    return max(float(distance), 0.0)


def root(covariance):
    """R [D,D] with R R^T = `covariance`; eigenvalues that are noise count as 0."""
    values, vectors = scipy.linalg.eigh(covariance)
    noise = values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors * np.sqrt(np.where(values > noise, values, 0))


def inception_score(logits, splits: int = SPLITS, seed: int | None = SEED) -> tuple[float, float]:
    """(mean, standard deviation) over `splits` equal parts of `logits` [N,C]; 1..C.

    seed: of the order in which the parts are cut; None = as they come.
    """
    logits = np.asarray(logits)
    if seed is not None:
        logits = logits[np.random.RandomState(seed).permutation(len(logits))]
    scores = []
    for part in range(splits):
        rows = logits[part * len(logits) // splits : (part + 1) * len(logits) // splits].astype(np.float64)
        log_probs = scipy.special.log_softmax(rows, axis=1)
        probs = np.exp(log_probs)
        scores.append(np.exp((probs * (log_probs - np.log(probs.mean(0)))).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(real, samples, subsets: int = SUBSETS, size: int = SUBSET_SIZE) -> tuple[float, float]:
    """(mean, standard deviation) over `subsets` random subsets of `size` rows of each of two sets [N,D].

    The mean may be below 0. A set with fewer rows makes all subsets as small as it is.
    """
    size = min(size, len(real), len(samples))
    rng, values = np.random.RandomState(SEED), []
    for _ in range(subsets):
        fake = np.asarray(samples[rng.choice(len(samples), size, replace=False)], np.float64)
        true = np.asarray(real[rng.choice(len(real), size, replace=False)], np.float64)
        diagonals = [((rows**2).mean(1) + 1) ** 3 for rows in (fake, true)]
        within = sum(cubic_kernel(rows, rows).sum() - own.sum() for rows, own in zip((fake, true), diagonals))
        values.append(within / (size * (size - 1)) - 2 * cubic_kernel(fake, true).mean())
    return float(np.mean(values)), float(np.std(values))


def cubic_kernel(one, other):
    base = one @ other.T / one.shape[1] + 1
    return base * base * base  # several times as fast as ** 3


def neighbourhoods(real, samples) -> dict[str, float]:
    """`precision`, `recall`, `density`, `coverage` of `samples` [M,D] against `real` [N,D].

    A row's neighbourhood is the ball that reaches to its k-th nearest other row of the same set.
    precision: share of the samples inside a real neighbourhood; recall: share of the real rows inside one of the
    samples' (k = 3). density: mean number of real neighbourhoods that hold a sample, over k; coverage: share of the
    real neighbourhoods that hold a sample (k = 5). A set of k rows or fewer has no such ball, and no value.
    """
    # Centred, so that the float32 distances lose nothing to a large common mean.
    centre = np.asarray(real).mean(0, dtype=np.float64)
    real, samples = ((np.asarray(rows) - centre).astype(np.float32) for rows in (real, samples))
    narrow, wide = (radii(real, (MANIFOLD_NEIGHBOURS, DENSITY_NEIGHBOURS))).T
    (around_samples,) = radii(samples, (MANIFOLD_NEIGHBOURS,)).T
    inside_real, held = [], np.zeros(len(samples))
    recalled, nearest = np.zeros(len(real), bool), np.full(len(real), np.inf, np.float32)
    for first, distances in blocks(samples, real):
        rows = slice(first, first + len(distances))
        inside_real.append((distances <= narrow).any(1))
        held[rows] = (distances < wide).sum(1)
        recalled |= (distances <= around_samples[rows, None]).any(0)
        nearest = np.minimum(nearest, distances.min(0))
    measures = {
        "precision": (np.concatenate(inside_real).mean(), narrow),
        "recall": (recalled.mean(), around_samples),
        "density": (held.mean() / DENSITY_NEIGHBOURS, wide),
        "coverage": ((nearest < wide).mean(), wide),
    }
    return {name: float(value) for name, (value, balls) in measures.items() if np.isfinite(balls).all()}


def radii(rows, neighbours: tuple[int, ...]):
    """Squared distance of each row of [N,D] to its k-th nearest other row: [N, len(neighbours)]; inf if N <= k."""
    radius = np.full((len(rows), len(neighbours)), np.inf, np.float32)
    places = [(column, k) for column, k in enumerate(neighbours) if k < len(rows)]
    for first, distances in blocks(rows, rows):
        part = np.arange(len(distances))
        distances[part, first + part] = -1  # itself comes first, whatever the rounding
        if places:
            distances.partition([k for _, k in places], axis=1)
        for column, k in places:
            radius[first : first + len(distances), column] = distances[:, k]
    return radius


def blocks(one, other):
    """(first row, squared distances [<= BLOCK, M] of the rows of `one` from there to all of `other` [M,D]), float32."""
    norms = (other**2).sum(1)
    for first in range(0, len(one), BLOCK):
        rows = one[first : first + BLOCK]
        distances = rows @ other.T
        distances *= -2
        distances += norms
        distances += (rows**2).sum(1)[:, None]
        yield first, np.maximum(distances, 0, out=distances)

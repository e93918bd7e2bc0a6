"""What is kept of a set of images to compare it with another, and all comparisons of two sets at once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from addp_jax.metrics import generation

# What the measures are called when the features are those of the Inception net of FID.
INCEPTION_NAMES = {
    "frechet": "fid", "spatial_frechet": "sfid", "class_score": "is", "class_score_std": "is_std",
    "kernel": "kid", "kernel_std": "kid_std",
}  # fmt: skip
FULL_SIZE = 50_000  # samples of a published figure; measures of fewer carry their number in the name


class FeatureSet:
    """The features of a set of images, gathered in batches of any size.

    gaussians: moments of "pool" and, where the network has them, "spatial" features; pool float32 [N,D];
    logits float32 [N,C], [0,0] where the network has none. Of a set whose moments are known, `gaussians` are given, and
    the features [N,D] of some of its images.
    """

    def __init__(self, gaussians: dict[str, generation.Gaussian] | None = None, pool=None):
        self._moments, self._gaussians = {}, gaussians
        self._rows = {"pool": [] if pool is None else [np.asarray(pool)], "logits": []}

    def add(self, features: Mapping[str, np.ndarray]) -> None:
        """Count in a batch's features by name: "pool" [B,D], and perhaps "logits" [B,C] and "spatial" [B,E]."""
        for name, rows in features.items():
            if name in self._rows:
                self._rows[name].append(np.asarray(rows, np.float32))
            if name != "logits":
                self._moments.setdefault(name, generation.Moments(rows.shape[1])).add(rows)

    pool = property(lambda self: self._joined("pool"))
    logits = property(lambda self: self._joined("logits"))

    def __len__(self) -> int:
        return len(self.pool)

    def _joined(self, name: str):
        if len(self._rows[name]) != 1:
            self._rows[name] = [np.concatenate(self._rows[name] or [np.zeros((0, 0), np.float32)])]
        return self._rows[name][0]

    @property
    def gaussians(self) -> dict[str, generation.Gaussian]:
        """Raises ValueError for a set of fewer than two images."""
        return self._gaussians or {name: moments.gaussian() for name, moments in self._moments.items()}


def compare(real: FeatureSet, samples: FeatureSet, seed: int | None = generation.SEED) -> dict[str, float]:
    """Every measure that the two sets' features allow; the words are those of any network, see `named`.

    seed: of the order in which `class_score` splits the samples; None = as they come.
    """
    ours, theirs = samples.gaussians, real.gaussians
    values = {"frechet": generation.frechet_distance(theirs["pool"], ours["pool"])}
    if "spatial" in ours and "spatial" in theirs:
        values["spatial_frechet"] = generation.frechet_distance(theirs["spatial"], ours["spatial"])
    if len(samples.logits) >= generation.SPLITS:
        values["class_score"], values["class_score_std"] = generation.inception_score(samples.logits, seed=seed)
    if min(len(real), len(samples)) > 1:
        values["kernel"], values["kernel_std"] = generation.kernel_distance(real.pool, samples.pool)
        values |= generation.neighbourhoods(real.pool, samples.pool)
    return values


def named(values: Mapping[str, float], network: str, count: int, published: bool = True) -> dict[str, float]:
    """`values` of `compare` under the names that say what they may be compared with.

    Inception's are called fid, sfid, is, kid. All names end in the number of samples, fid_2k or fid_64, but those of
    50,000 whose real images are prepared as those of `published` figures are.
    """
    names = INCEPTION_NAMES if network == "inception" else {}
    thousands, rest = divmod(count, 1000)
    suffix = "" if published and count == FULL_SIZE else f"_{count}" if rest else f"_{thousands}k"
    return {names.get(name, name) + suffix: value for name, value in values.items()}

"""A part of a source that stands for all of it."""

import numpy as np

from addp_jax import errors
from addp_jax.data import sources


class Part(sources.Source):
    """`size` examples spread over a source, see `spread`: files are sorted by class, generated shapes take turns."""

    def __init__(self, source, size: int):
        if size > len(source):
            raise errors.UserError(f"{source!r} has {len(source)} examples, fewer than the {size} asked for")
        self.source, self.size = source, size
        self.classes, self.labelled, self.has_objects = source.classes, source.labelled, source.has_objects
        self.has_label_maps = source.has_label_maps
        self._chosen = spread(len(source), size)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> dict:
        return self.source[int(self._chosen[i])]

    def __repr__(self) -> str:
        return f"Part({self.source!r}, {self.size})"

    def ground_truth(self) -> dict | None:
        """Of the whole source."""
        return self.source.ground_truth()

    def fingerprint(self, times: bool = False) -> str:
        return f"{self.size} of {self.source.fingerprint(times)}"


def spread(total: int, size: int) -> np.ndarray:
    """Which `size` of `total` examples stand for all: one drawn of each of as many equal stretches, always the same."""
    edges = np.arange(size + 1) * total // size
    return np.random.default_rng(0).integers(edges[:-1], edges[1:])

"""Exact means over a data set that comes in padded batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np


def mean_over(batches: Iterable[tuple[Mapping[str, np.ndarray], np.ndarray]]) -> dict[str, float]:
    """Mean of each quantity over the valid examples.

    Args:
      batches: pairs of {name: values [B]} and `valid` bool [B] (False = padding, not counted).
    Returns:
      {} when there is no batch.
    """
    totals, count = {}, 0
    for values, valid in batches:
        valid = np.asarray(valid)
        count += int(valid.sum())
        for name, value in values.items():
            totals[name] = totals.get(name, 0.0) + float(np.asarray(value, np.float64)[valid].sum())
    return {name: total / count for name, total in totals.items()} if count else {}


class ByMaskRatio:
    """Mean loss of the examples of each tenth of the mask ratios."""

    def __init__(self):
        self._totals, self._counts = np.zeros(11), np.zeros(11)

    def add(self, ratios, losses, valid) -> None:
        """`ratios` and `losses` of a batch [B], of which the `valid` [B] with a ratio in (0,1] count."""
        ratios, losses, valid = np.asarray(ratios, np.float64), np.asarray(losses, np.float64), np.asarray(valid)
        valid = valid & (ratios > 0) & (ratios <= 1)
        ratios = np.where(valid, ratios, 1)
        tenths = np.ceil(10 * ratios - 1e-6).astype(int)[valid]  # 0.6 as float32 is above 0.6
        np.add.at(self._totals, tenths, losses[valid])
        np.add.at(self._counts, tenths, 1)

    def means(self) -> dict[str, float]:
        """{"loss_mask_50_60": that of the ratios in (0.5, 0.6]} and so on; tenths without an example are left out."""
        tenths = np.flatnonzero(self._counts)
        return {f"loss_mask_{10 * n - 10}_{10 * n}": float(self._totals[n] / self._counts[n]) for n in tenths}

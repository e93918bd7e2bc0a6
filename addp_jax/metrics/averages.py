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

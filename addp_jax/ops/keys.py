"""One stream of random keys for each purpose, so that no two purposes share a draw."""

from __future__ import annotations

import jax

PURPOSES = ("parameters", "training", "evaluation", "samples")
FIRST = 2**31  # beyond every step: `split(key)[i]` is `fold_in(key, i)`, so small numbers would meet those of steps


def of(seed: int, purpose: str) -> jax.Array:
    """The key from which everything random of `purpose`, one of PURPOSES, is derived."""
    return jax.random.fold_in(jax.random.key(seed), FIRST + PURPOSES.index(purpose))

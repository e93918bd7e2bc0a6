"""The k-nearest-neighbour classifier of features, for encoders that are not trained further."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

CHUNK = 64  # queries whose similarities to all training examples are held at a time


@functools.partial(jax.jit, static_argnames=("k", "num_classes"))
def votes(bank, labels, queries, *, k: int, temperature: float, num_classes: int):
    """Votes of the `k` training examples most similar to each query, by cosine.

    Args:
      bank: float32 [N,D] training features; at least `k` of them.
      labels: int32 [N].
      queries: float32 [B,D].
      temperature: a neighbour of similarity s has weight exp(s / temperature) (arXiv:1805.01978 has 0.07).
    Returns:
      weighted, plain: float32 [B,C]. In `plain` every neighbour counts 1, and less than one vote in all
      decides between equals: that of the more similar ones.
    """
    unit = lambda features: features / (jnp.linalg.norm(features, axis=-1, keepdims=True) + 1e-12)
    bank = unit(bank)

    def one(query):
        similarity, index = jax.lax.top_k(bank @ query, k)
        weight = jax.nn.softmax(similarity / temperature)
        voices = jax.nn.one_hot(labels[index], num_classes)
        return weight @ voices, (1 + weight / 2) @ voices

    return jax.lax.map(one, unit(queries), batch_size=CHUNK)

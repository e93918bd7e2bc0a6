"""The k-nearest-neighbour classifier of features, for encoders that are not trained further.

A feature that is zero or not finite has no direction: it is nobody's neighbour, and as a query it gets no votes.
"""

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
      decides between equals: that of the more similar ones. A query without a direction has votes for no
      class, [0, ..., 0], which `classification.in_top` counts as wrong.
    """
    bank, in_bank = _unit(bank)
    queries, asked = _unit(queries)

    def one(query):
        similarity, index = jax.lax.top_k(jnp.where(in_bank, bank @ query, -jnp.inf), k)
        near = similarity > -jnp.inf
        weight = jnp.where(near, jax.nn.softmax(similarity / temperature), 0)
        voices = jax.nn.one_hot(labels[index], num_classes)
        return weight @ voices, jnp.where(near, 1 + weight / 2, 0) @ voices

    weighted, plain = jax.lax.map(one, queries, batch_size=CHUNK)
    return jnp.where(asked[:, None], weighted, 0), jnp.where(asked[:, None], plain, 0)


def _unit(features):
    """`(features [N,D] of length 1, bool [N]: has a direction)`; those without one are zeros."""
    length = jnp.linalg.norm(features, axis=-1, keepdims=True)
    directed = jnp.isfinite(length) & (length > 0)
    return jnp.where(directed, features / (length + 1e-12), 0), directed[:, 0]

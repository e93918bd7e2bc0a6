"""What all attention layers share: the softmax, dropout of its weights, and their sum of values."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from addp_jax.models import dropout


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend(scores, value, rng=None, rate: float = 0.0):
    """Values weighted by softmax(scores): float32 [...,Q,K], [...,K,d] -> [...,Q,d], of the values' type.

    rng: a typed key; weights are dropped with probability `rate`. None = none are.

    The gradient of the softmax needs, for each query, the sum of weights times their gradients. That is the output
    times its gradient, summed over d (Dao et al. 2022, arXiv 2205.14135, appendix B). So the backward pass sums d
    products where automatic differentiation sums K, and keeps nothing of size Q x K but the weights. It spares a TPU
    v5e an eighth of a ViT-L block.
    """
    return _forward(scores, value, rng, rate)[0]


def _forward(scores, value, rng, rate):
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    out = jnp.einsum("...qk,...kd->...qd", _dropped(weights, rng, rate), value)
    return out, (weights, value, rng, out)


def _backward(rate, residuals, gradient):
    weights, value, rng, out = residuals
    to_weights = jnp.einsum("...qd,...kd->...qk", gradient, value, preferred_element_type=jnp.float32)
    mean = (gradient.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    to_scores = weights.astype(jnp.float32) * (_dropped(to_weights, rng, rate) - mean)
    to_value = jnp.einsum("...qk,...qd->...kd", _dropped(weights, rng, rate), gradient)
    return to_scores, to_value, None if rng is None else np.zeros(rng.shape, jax.dtypes.float0)


def _dropped(weights, rng, rate: float):
    return weights if rng is None else dropout.drop(weights, rng, rate)


attend.defvjp(_forward, _backward)

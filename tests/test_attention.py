"""The inner part of the attention layers: what it gives, and its own backward pass beside automatic differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from addp_jax.models import dropout
from addp_jax.models.attention import attend

RATE = 0.4
KEY = jax.random.key(3)


def plain(scores, value, rng=None, rate=0.0):
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    if rng is not None:
        weights = jnp.where(dropout.keep(rng, rate, weights.shape), weights / jnp.asarray(1 - rate, weights.dtype), 0)
    return jnp.einsum("...qk,...kd->...qd", weights, value)


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


SCORES = 3 * random(0, 2, 3, 5, 7)  # more keys than queries
VALUE, GRADIENT = random(1, 2, 3, 7, 4), random(2, 2, 3, 5, 4)


@pytest.fixture(scope="module", params=[None, KEY], ids=["plain", "dropout"])
def both(request):
    """Output and gradients by `attend` and by automatic differentiation, as functions of (scores, value, gradient)."""

    def by(function):
        def run(scores, value, gradient):
            out, back = jax.vjp(lambda scores, value: function(scores, value, request.param, RATE), scores, value)
            return out, *back(gradient)

        return jax.jit(run)

    return by(attend), by(plain)


def test_output_and_gradients_are_those_of_automatic_differentiation(both):
    ours, expected = (function(SCORES, VALUE, GRADIENT) for function in both)
    np.testing.assert_array_equal(ours[0], expected[0])
    for mine, other in zip(ours[1:], expected[1:]):
        np.testing.assert_allclose(mine, other, atol=2e-6)
    assert np.abs(ours[1]).max() > 0.1


def test_keys_that_are_hidden_get_no_weight_and_no_gradient(both):
    hidden = jnp.arange(7) >= 4
    ours, expected = (function(jnp.where(hidden, -jnp.inf, SCORES), VALUE, GRADIENT) for function in both)
    assert not np.any(ours[1][..., 4:]) and not np.any(ours[2][..., 4:, :])
    np.testing.assert_allclose(ours[1], expected[1], atol=2e-6)


def test_in_bfloat16_output_and_gradients_are_those_of_float32_but_for_rounding(both):
    narrow = VALUE.astype(jnp.bfloat16), GRADIENT.astype(jnp.bfloat16)
    exact = both[1](SCORES, *(array.astype(jnp.float32) for array in narrow))
    for mine, right in zip(both[0](SCORES, *narrow), exact):
        error = np.sqrt(np.mean((np.asarray(mine, np.float32) - right) ** 2) / np.mean(right**2))
        assert error < 2**-7  # bfloat16 rounds by up to 2**-9, several times over


def test_under_remat_the_same_weights_are_dropped_again():
    gradient = lambda function: jax.jit(jax.grad(lambda scores: (function(scores, VALUE) ** 2).sum()))(SCORES)
    ours = gradient(jax.checkpoint(lambda scores, value: attend(scores, value, KEY, RATE)))
    np.testing.assert_allclose(ours, gradient(lambda scores, value: plain(scores, value, KEY, RATE)), atol=2e-5)

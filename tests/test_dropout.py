"""Dropout's mask: its share, that no pattern shows, and that the mesh does not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from addp_jax import partition
from addp_jax.models import dropout

RATE, SHAPE = 0.1, (24, 5, 131, 129)
SIGMAS = 5  # of 50 statistics that should be standard normal
keep = jax.jit(dropout.keep, static_argnums=(1, 2))


def mask(seed: int) -> np.ndarray:
    return np.asarray(keep(jax.random.key(seed), RATE, SHAPE), np.float32)


def sigmas(one, other) -> float:
    """Correlation of two masks in standard deviations."""
    one, other = one - (1 - RATE), other - (1 - RATE)
    return float((one * other).mean() / (RATE * (1 - RATE)) * np.sqrt(one.size))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.003])
def test_the_share_that_is_dropped(rate):
    kept = np.asarray(keep(jax.random.key(0), rate, SHAPE))
    assert abs(kept.mean() - (1 - rate)) < SIGMAS * np.sqrt(rate * (1 - rate) / kept.size)


@pytest.mark.parametrize("axis", range(4))
def test_neighbours_are_independent(axis):
    found = mask(0)
    for distance in (1, 2, 3):
        one = np.take(found, range(distance, SHAPE[axis]), axis)
        assert abs(sigmas(one, np.take(found, range(SHAPE[axis] - distance), axis))) < SIGMAS
    means = found.mean(tuple(other for other in range(4) if other != axis))
    spread = ((means - (1 - RATE)) ** 2).sum() / (RATE * (1 - RATE)) * found.size / SHAPE[axis]  # chi squared
    assert abs(spread - SHAPE[axis]) < SIGMAS * np.sqrt(2 * SHAPE[axis])


def test_keys_are_independent_and_the_same_key_is_the_same_mask():
    assert abs(sigmas(mask(0), mask(1))) < SIGMAS
    np.testing.assert_array_equal(mask(0), mask(0))


def test_four_places_of_a_rectangle_are_independent():
    """Where a hash of rows and a hash of columns are merely combined, the fourth follows from three."""
    found = mask(2) - (1 - RATE)
    product = found[..., 1:, 1:] * found[..., 1:, :-1] * found[..., :-1, 1:] * found[..., :-1, :-1]
    assert abs(product.mean() / (RATE * (1 - RATE)) ** 2 * np.sqrt(product.size)) < SIGMAS


@pytest.mark.parametrize("layout", [P(("data", "fsdp")), P(None, "tensor"), P("data", None, None, "fsdp")])
def test_every_mesh_draws_the_same(layout):
    shape, mesh = (8, 2, 3, 4), partition.make_mesh(partition.Config(2, 2, 2))
    with jax.set_mesh(mesh):
        divided = jax.jit(dropout.keep, static_argnums=(1, 2), out_shardings=NamedSharding(mesh, layout))
        found = divided(jax.random.key(3), RATE, shape)
    np.testing.assert_array_equal(found, keep(jax.random.key(3), RATE, shape))


def test_the_rest_is_scaled_and_evaluation_drops_nothing():
    layer, ones = dropout.Dropout(0.2), jnp.ones((64, 32))
    out = np.asarray(layer.apply({}, ones, True, rngs={"dropout": jax.random.key(0)}))
    assert set(np.unique(out)) == {np.float32(0), np.float32(1) / np.float32(0.8)}
    assert layer.apply({}, ones, False) is ones and dropout.Dropout(0.0).apply({}, ones, True) is ones


def test_gradient_goes_through_what_was_kept():
    layer, key = dropout.Dropout(0.5), jax.random.key(0)
    apply = lambda inputs: layer.apply({}, inputs, True, rngs={"dropout": key})
    ones = jnp.ones((8, 16))
    np.testing.assert_array_equal(jax.grad(lambda inputs: apply(inputs).sum())(ones), apply(ones))

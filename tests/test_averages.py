"""Means over padded batches."""

import jax.numpy as jnp
import numpy as np

from addp_jax.metrics import averages


def batches(values: np.ndarray, size: int):
    """`values` [N] and their squares in batches of `size`, the last one padded with what must not count."""
    for first in range(0, len(values), size):
        part = values[first : first + size]
        padding = size - len(part)
        padded = np.concatenate([part, np.full(padding, np.nan)])
        yield {"value": jnp.asarray(padded), "square": padded**2}, np.arange(size) < len(part)


def test_every_valid_example_counts_once_whatever_the_batches():
    values = np.random.default_rng(0).normal(size=23).astype(np.float32)
    for size in (1, 4, 23, 32):
        means = averages.mean_over(batches(values, size))
        np.testing.assert_allclose(means["value"], values.astype(np.float64).mean(), rtol=1e-12)
        np.testing.assert_allclose(means["square"], (values.astype(np.float64) ** 2).mean(), rtol=1e-6)
        assert all(type(mean) is float for mean in means.values())


def test_a_batch_of_padding_alone_changes_nothing():
    full = ({"value": np.array([1.0, 3.0])}, np.array([True, True]))
    empty = ({"value": np.array([np.nan, 7.0])}, np.array([False, False]))
    assert averages.mean_over([empty, full, empty]) == averages.mean_over([full]) == {"value": 2.0}


def test_sums_are_exact_where_float32_is_not():
    many = [({"value": np.full(1024, 0.1, np.float32)}, np.ones(1024, bool))] * 500
    np.testing.assert_allclose(averages.mean_over(many)["value"], np.float64(np.float32(0.1)), rtol=1e-12)


def test_booleans_average_to_shares():
    assert averages.mean_over([({"right": np.array([True, False, True, True])}, np.ones(4, bool))]) == {"right": 0.75}


def test_without_examples_there_is_no_mean():
    assert averages.mean_over([]) == {}
    assert averages.mean_over([({"value": np.array([1.0])}, np.array([False]))]) == {}


def test_losses_by_mask_ratio():
    losses = averages.ByMaskRatio()
    assert losses.means() == {}
    losses.add(np.float32([0.51, 0.6, 0.61]), jnp.asarray([1.0, 3.0, 5.0]), np.ones(3, bool))
    losses.add(np.float32([1.0, 0.95, 0.2, 0.9]), np.array([7.0, 9.0, np.nan, 11.0]), np.array([True, True, False, True]))
    assert losses.means() == {"loss_mask_50_60": 2, "loss_mask_60_70": 5, "loss_mask_80_90": 11, "loss_mask_90_100": 8}


def test_a_ratio_that_is_no_fraction_is_in_no_tenth():
    tenths = averages.ByMaskRatio()
    tenths.add([0.05, np.nan, 0.0, -1.0, 2.0, np.inf], np.arange(6.0), np.ones(6, bool))
    assert tenths.means() == {"loss_mask_0_10": 0.0}

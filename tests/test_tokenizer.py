"""The tokenizer's own convolutions against plain ones."""

import jax
import jax.numpy as jnp
import numpy as np

from addp_jax import partition
from addp_jax.models import tokenizer

ROUNDING = 1e-4  # absolute, of activations of size 1


def random(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(0, 1, shape), jnp.float32)


def plain(image, kernel):
    return jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def test_upsampling_is_a_convolution_of_the_repeated_image():
    image, kernel, bias = random(2, 3, 5, 4), random(3, 3, 4, 6) / 6, random(6)
    net = tokenizer.Upsample(6, jnp.float32)
    large = image.repeat(2, axis=1).repeat(2, axis=2)
    expected = plain(large, kernel) + bias[None, None, None]
    found = net.apply({"params": {"kernel": kernel, "bias": bias}}, image)
    np.testing.assert_allclose(found, expected, atol=ROUNDING)


def test_the_fast_convolution_is_a_convolution():
    image, kernel = random(2, 32, 5, 64), random(3, 3, 64, 64) / 24

    def fast(image, kernel):
        return tokenizer.fast_convolve(image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert jax.jit(fast).lower(image, kernel).as_text().count("stablehlo.convolution") == len(tokenizer.FILTER)
    np.testing.assert_allclose(jax.jit(fast)(image, kernel), plain(image, kernel), atol=ROUNDING)


def test_one_by_one_is_the_whole_batch():
    batch = random(3, 4)
    assert "while" in jax.jit(lambda batch: partition.one_by_one(jnp.sin, batch)).lower(batch).as_text()
    np.testing.assert_allclose(partition.one_by_one(jnp.sin, batch), jnp.sin(batch), atol=1e-6)

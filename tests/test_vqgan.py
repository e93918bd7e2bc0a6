"""The tokenizer's own convolutions against plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from addp_jax import parameters, partition
from addp_jax.codecs import vqgan
from addp_jax.ops import winograd

ROUNDING = 1e-4  # absolute, of activations of size 1


def random(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(0, 1, shape), jnp.float32)


def plain(image, kernel):
    return jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def test_upsampling_is_a_convolution_of_the_repeated_image():
    image, kernel, bias = random(2, 3, 5, 4), random(3, 3, 4, 6) / 6, random(6)
    net = vqgan.Upsample(6, jnp.float32)
    large = image.repeat(2, axis=1).repeat(2, axis=2)
    expected = plain(large, kernel) + bias[None, None, None]
    found = net.apply({"params": {"kernel": kernel, "bias": bias}}, image)
    np.testing.assert_allclose(found, expected, atol=ROUNDING)


def test_the_fast_convolution_is_a_convolution():
    image, kernel = random(2, 32, 5, 64), random(3, 3, 64, 64) / 24

    def fast(image, kernel):
        return winograd.fast_convolve(image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert jax.jit(fast).lower(image, kernel).as_text().count("stablehlo.convolution") == len(winograd.FILTER)
    np.testing.assert_allclose(jax.jit(fast)(image, kernel), plain(image, kernel), atol=ROUNDING)


NHWC = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"))
OTHERS = {
    "stride": (((2, 2), "SAME"), NHWC), "one stride": (((1, 2), "SAME"), NHWC), "valid": (((1, 1), "VALID"), NHWC), "pads": (((1, 1), [(0, 2), (1, 1)]), NHWC),
    "dilated": (((1, 1), "SAME"), NHWC | dict(rhs_dilation=(2, 2))), "spread": (((1, 1), [(1, 1), (1, 1)]), NHWC | dict(lhs_dilation=(2, 2))),
    "groups": (((1, 1), "SAME"), NHWC | dict(feature_group_count=2)), "batches": (((1, 1), "SAME"), NHWC | dict(batch_group_count=2)),
    "precision": (((1, 1), "SAME"), NHWC | dict(precision=jax.lax.Precision.HIGHEST)),
    "output": (((1, 1), "SAME"), NHWC | dict(preferred_element_type=jnp.float32)),
    "order": (((1, 1), "SAME"), dict(dimension_numbers=("NWHC", "HWIO", "NWHC"))), "out": (((1, 1), "SAME"), dict(dimension_numbers=("NHWC", "HWIO", "NCHW"))),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_convolution_is_done_as_asked(name):
    args, keywords = OTHERS[name]
    image, kernel = random(2, 32, 32, 128 if name == "groups" else 64), random(3, 3, 64, 64) / 24
    expected = jax.lax.conv_general_dilated(image, kernel, *args, **keywords)
    np.testing.assert_array_equal(winograd.fast_convolve(image, kernel, *args, **keywords), expected)


@pytest.mark.parametrize("padding", ["SAME", [(1, 1), (1, 1)], ((1, 1), (1, 1))])
def test_the_ordinary_convolution_is_the_fast_one_however_it_is_written(padding):
    image, kernel = random(1, 32, 8, 64), random(3, 3, 64, 64) / 24
    more = NHWC | dict(lhs_dilation=(1, 1), rhs_dilation=None, feature_group_count=1, precision=None)
    fast = jax.jit(lambda image, kernel: winograd.fast_convolve(image, kernel, (1, 1), padding, **more))
    assert fast.lower(image, kernel).as_text().count("stablehlo.convolution") == len(winograd.FILTER)
    np.testing.assert_allclose(fast(image, kernel), plain(image, kernel), atol=ROUNDING)


def test_a_network_with_compact_kernels_computes_the_same_in_bfloat16():
    config = vqgan.Config(image_size=16, channels=8, multipliers=(1, 2, 2), num_res_blocks=1, num_codes=32, code_width=8, num_groups=4)
    net = vqgan.Tokenizer(config, jnp.bfloat16)
    image = random(2, 16, 16, 3)
    params = {"tokenizer": jax.jit(lambda key: vqgan.init(net, key))(jax.random.key(0))}
    compact = parameters.compact(params, ("tokenizer",), jnp.bfloat16)
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(compact)}
    assert kinds == {"bfloat16", "float32"}
    for name, inputs in (("features", image), ("decode", random(2, 16, 8))):
        run = jax.jit(lambda params, inputs, method=name: net.apply({"params": params["tokenizer"]}, inputs, method=method))
        np.testing.assert_array_equal(run(compact, inputs), run(params, inputs))


def test_one_by_one_is_the_whole_batch():
    batch = random(3, 4)
    assert "while" in jax.jit(lambda batch: partition.one_by_one(jnp.sin, batch)).lower(batch).as_text()
    np.testing.assert_allclose(partition.one_by_one(jnp.sin, batch), jnp.sin(batch), atol=1e-6)

"""The tokenizer's discriminator and the perceptual distance."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_reconstruction

from addp_jax import partition
from addp_jax.models import discriminator, perceptual
from addp_jax.weights import torch_nets

SIZE = 16  # pixels
LPIPS_AGREEMENT = 1e-4  # relative
TINY = discriminator.Config(channels=4, max_channels=8)


def judge(params, image, dtype=jnp.float32):
    return jax.jit(discriminator.Discriminator(TINY, dtype).apply)({"params": params}, image)


def images(count=2, size=SIZE, seed=0):
    return jax.random.uniform(jax.random.key(seed), (count, size, size, 3))


@pytest.fixture(scope="module")
def params():
    net = discriminator.Discriminator(TINY)
    return jax.jit(lambda rng: discriminator.init(net, rng, SIZE))(jax.random.key(0))


@pytest.fixture
def vgg_arrays(monkeypatch):
    """Random weights of a thin VGG16 under torchvision's names, and something of the classifier."""
    indices = [indices for _, indices in perceptual.STAGES]
    monkeypatch.setattr(perceptual, "STAGES", tuple(zip((4, 4, 6, 8, 8), indices)))
    rng, arrays, inputs = np.random.default_rng(0), {"classifier.0.bias": np.zeros(8, np.float32)}, 3
    for width, stage in perceptual.STAGES:
        for index in stage:
            scale = np.sqrt(2 / (9 * inputs))
            arrays[f"features.{index}.weight"] = rng.normal(0, scale, (width, inputs, 3, 3)).astype(np.float32)
            arrays[f"features.{index}.bias"] = rng.normal(0, 0.1, width).astype(np.float32)
            inputs = width
    return arrays


def test_widths_are_maskgits_at_256_pixels():
    assert discriminator.Config().widths(256) == (64, 128, 256, 512, 512, 512, 512)


def test_size_at_256_pixels():
    """MaskGIT's layers written out: stem, blocks (3x3, 3x3, bias-free 1x1), last conv, two dense layers."""
    widths = discriminator.Config().widths(256)
    count = 9 * 3 * 64 + 64
    for narrow, wide in zip(widths, widths[1:]):
        count += (9 * narrow * narrow + narrow) + (9 * narrow * wide + wide) + narrow * wide
    count += (9 * 512 * 512 + 512) + (4 * 4 * 512 * 512 + 512) + (512 + 1)
    net = discriminator.Discriminator(discriminator.Config())
    shapes = jax.eval_shape(lambda rng: discriminator.init(net, rng, 256), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize("size", (2, 17, 48))
def test_sizes_that_do_not_halve_to_four_are_refused(size):
    with pytest.raises(ValueError, match=str(size)):
        TINY.widths(size)


def test_every_parameter_has_a_layout(params):
    partition.shardings({"discriminator": params}, partition.make_mesh(partition.Config()), discriminator.LAYOUT)


def test_images_do_not_influence_each_other(params):
    batch = images(3)
    together = judge(params, batch)
    assert together.shape == (3,) and together.dtype == jnp.float32
    np.testing.assert_allclose(together[1:2], judge(params, batch[1:2]), atol=1e-5)


def test_blur_pool_is_the_depthwise_filter():
    features = jax.random.normal(jax.random.key(0), (2, 8, 6, 5))
    taps = jnp.asarray([1.0, 3.0, 3.0, 1.0]) / 8
    kernel = jnp.tile((taps[:, None] * taps[None])[:, :, None, None], (1, 1, 1, 5))
    expected = jax.lax.conv_general_dilated(
        features, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=5
    )
    np.testing.assert_allclose(discriminator.blur_pool(features), expected, atol=1e-5)


def test_logits_stay_float32_when_computing_in_bfloat16(params):
    logits = judge(params, images(), jnp.bfloat16)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, judge(params, images()), atol=0.1)


def test_vgg_has_the_published_size():
    """14,714,688 parameters: VGG16's 138,357,544 without its three dense layers."""
    shapes = jax.eval_shape(perceptual.Vgg16().init, jax.random.key(0), images(1))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 14_714_688


def test_vgg_convolutions_are_torchvisions(vgg_arrays):
    """The first two against a correlation written out with numpy, weights as torchvision stores them (OIHW)."""
    image = np.asarray(images(1, 16))
    hidden = ((image - np.array(perceptual.MEAN)) / np.array(perceptual.STD)).transpose(0, 3, 1, 2)
    for index in (0, 2):
        padded = np.pad(hidden, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
        hidden = np.einsum("bchwij,ocij->bohw", windows, vgg_arrays[f"features.{index}.weight"])
        hidden = np.maximum(hidden + vgg_arrays[f"features.{index}.bias"][None, :, None, None], 0)
    params = torch_nets.vgg16_params(vgg_arrays)
    stages = jax.jit(perceptual.Vgg16().apply)({"params": params}, image)
    np.testing.assert_allclose(stages[0].transpose(0, 3, 1, 2), hidden, atol=1e-4)
    assert [stage.shape[1:] for stage in stages] == [(16, 16, 4), (8, 8, 4), (4, 4, 6), (2, 2, 8), (1, 1, 8)]


def test_vgg_entries_must_be_there_and_fit(vgg_arrays):
    with pytest.raises(KeyError, match="features.28.bias"):
        torch_nets.vgg16_params({name: v for name, v in vgg_arrays.items() if name != "features.28.bias"})
    with pytest.raises(ValueError, match="features.5.bias"):
        torch_nets.vgg16_params({**vgg_arrays, "features.5.bias": np.zeros(3, np.float32)})


def test_perceptual_distance_grows_with_the_damage(vgg_arrays):
    params = torch_nets.vgg16_params(vgg_arrays)
    image, noise = images(2), jax.random.normal(jax.random.key(1), (2, SIZE, SIZE, 3))
    distance = jax.jit(perceptual.distance)
    same, near, far = (distance(params, image, image + scale * noise) for scale in (0.0, 0.02, 0.3))
    np.testing.assert_allclose(same, 0, atol=1e-12)
    assert (near > 0).all() and (far > near).all() and (far < 2).all()


def test_perceptual_distance_has_a_finite_gradient_at_zero(vgg_arrays):
    params = torch_nets.vgg16_params(vgg_arrays)
    image = jnp.zeros((1, SIZE, SIZE, 3))
    gradient = jax.jit(jax.grad(lambda other: perceptual.distance(params, image, other).sum()))(image)
    assert jnp.isfinite(gradient).all()


def lpips_draw(name, shape):
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.startswith("lin"):
        return (np.abs(noise) / shape[1]).astype(np.float32)
    return (noise * (np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.1)).astype(np.float32)


def test_lpips_agrees_with_torch_fidelity():
    """Random weights in both, on the images of test_reconstruction.py (torch-fidelity 0.4.0, torch 2.13.0)."""
    arrays, inputs = {}, 3
    for stage, (width, indices) in enumerate(perceptual.STAGES):
        arrays[f"lin{stage}.model.1.weight"] = (1, width, 1, 1)
        for index in indices:
            arrays |= {f"features.{index}.weight": (width, inputs, 3, 3), f"features.{index}.bias": (width,)}
            inputs = width
    arrays = {name: lpips_draw(name, shape) for name, shape in arrays.items()}
    params = torch_nets.vgg16_params(arrays)
    distance = jax.jit(perceptual.lpips)(params, torch_nets.lpips_weights(arrays), *test_reconstruction.pairs())
    np.testing.assert_allclose(distance, [0.0004976266645826399, 0.007274126634001732], rtol=LPIPS_AGREEMENT)

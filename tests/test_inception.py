"""Inception-v3 for FID against torch-fidelity's and pytorch-fid's features, with the same random weights."""

import zlib

import jax
import numpy as np
import programs
import pytest

from addp_jax.models import inception
from addp_jax.weights import torch_nets

pytestmark = [pytest.mark.golden, pytest.mark.medium]

AGREEMENT = 1e-3  # of the largest feature
LEAST_FEATURES = {"pool": 256, "logits": 126, "spatial": 127}  # every 8th or 16th of two images


def random_weights(seed=0):
    """The state dict of pt_inception-2015-12-05, each entry drawn from a generator of its own."""
    arrays = {"fc.weight": (1008, 2048)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.eval_shape(inception.init, jax.random.key(0))):
        *module, kind = (part.key for part in path)
        if kind == "kernel" and module != ["fc"]:
            height, width, inputs, outputs = leaf.shape
            name = ".".join(module)
            arrays[f"{name}.conv.weight"] = (outputs, inputs, height, width)
            arrays |= {f"{name}.bn.{part}": (outputs,) for part in ("weight", "bias", "running_mean", "running_var")}
    return {name: draw(name, shape, seed) for name, shape in arrays.items()}


def draw(name, shape, seed):
    noise = np.random.RandomState((seed + zlib.crc32(name.encode())) % 2**32).standard_normal(shape)
    if name.endswith(("running_var", "bn.weight")):
        noise = 1 + 0.2 * np.tanh(noise)
    else:
        noise *= np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.1
    return noise.astype(np.float32)


def images():
    """A blocky and a smooth image, uint8 [2,72,96,3]."""
    rng = np.random.RandomState(0)
    image = rng.standard_normal((2, 9, 12, 3)).repeat(8, 1).repeat(8, 2) + 0.3 * rng.standard_normal((2, 72, 96, 3))
    image[1] = np.linspace(-2, 2, 96)[None, :, None] * np.array([1, -1, 0.5])
    return np.clip(128 + 60 * image, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def features():
    params = torch_nets.inception_params(random_weights())
    return jax.jit(lambda image: inception.Inception().apply({"params": params}, image))(images())


@pytest.mark.parametrize("name", LEAST_FEATURES)
def test_features_agree_with_torch_fidelity(features, name):
    expected = np.load(programs.ROOT / "tests/golden/inception.npz")[name]
    found = np.asarray(features[name])[:, :: 16 if name == "spatial" else 8]
    assert expected.shape == found.shape and expected.shape[1] == LEAST_FEATURES[name]
    np.testing.assert_allclose(found, expected, atol=AGREEMENT * np.abs(expected).max(), rtol=0)
    assert np.abs(expected[0] - expected[1]).max() > 100 * AGREEMENT * np.abs(expected).max()  # the images differ


def test_features_agree_with_pytorch_fid(features):
    """On images already resized by TensorFlow's rule, which pytorch-fid does not follow."""
    expected = np.load(programs.ROOT / "tests/golden/inception.npz")["pytorch_fid"]
    np.testing.assert_allclose(np.asarray(features["pool"])[:, ::8], expected, atol=AGREEMENT * expected.max(), rtol=0)


def test_resize_follows_tensorflow():
    """Pixel i looks at i * H / size: without the half-pixel offset, and the last pixels repeat."""
    image = np.arange(4, dtype=np.float32)[None, :, None, None] * np.ones((1, 1, 4, 1), np.float32)
    np.testing.assert_allclose(inception.resize(image, 8)[0, :, 0, 0], [0, 0.5, 1, 1.5, 2, 2.5, 3, 3], atol=1e-6)
    np.testing.assert_allclose(inception.resize(image.swapaxes(1, 2), 2)[0, 0, :, 0], [0, 2], atol=1e-6)


def test_weights_that_do_not_fit_are_named():
    arrays = {name: np.broadcast_to(np.float32(1), array.shape) for name, array in random_weights().items()}
    broken = arrays | {"Mixed_6c.branch_pool.conv.weight": arrays["Mixed_5b.branch_pool.conv.weight"]}
    with pytest.raises(ValueError, match="Mixed_6c.branch_pool.conv.weight has shape"):
        torch_nets.inception_params(broken)
    del arrays["Mixed_7c.branch3x3_2a.bn.running_var"]
    with pytest.raises(KeyError, match="no entry Mixed_7c.branch3x3_2a.bn.running_var"):
        torch_nets.inception_params(arrays)


def test_number_of_parameters():
    """The model zoos' 23,834,568 less their output layer; batch norms folded; 1008 classes without a bias."""
    shapes = jax.eval_shape(inception.init, jax.random.key(0))
    folded = sum(leaf.size for leaf in jax.tree.leaves(shapes) if leaf.ndim == 1)  # one bias instead of scale and shift
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == 23_834_568 - 2048 * 1000 - 1000 - folded + 2048 * 1008

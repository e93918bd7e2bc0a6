"""Feature networks from files and runs."""

import jax
import numpy as np
import pytest
import test_inception
from safetensors.numpy import save_file

from addp_jax import errors, parameters
from addp_jax.models import convnet, layers, pixel_to_token, vit
from addp_jax.weights import checkpoint, feature_nets, torch_nets

CONVNET = dict(image_size=16, patch_size=2, channels=8, multipliers=(1, 2), num_groups=4, num_classes=8)
BLOCKS = dict(width=16, depth=1, heads=2)
SAME = 1e-4  # of the largest value


def load(features_path, mesh, weights=""):
    return feature_nets.load(str(features_path), str(weights), mesh, "--features", "--weights")


def pictures(count, size=16):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def test_inception_is_read_from_its_pytorch_names(tmp_path, mesh):
    arrays = {name: np.ascontiguousarray(array) for name, array in test_inception.random_weights().items()}
    save_file(arrays | {"AuxLogits.conv0.bn.num_batches_tracked": np.zeros(1)}, tmp_path / "weights.safetensors")
    net = load("inception", mesh, tmp_path / "weights.safetensors")
    assert (net.name, net.size) == ("inception", 0)
    assert net.weights == parameters.content_hash(torch_nets.inception_params(arrays))


def test_files_that_are_no_inception_are_one_line(tmp_path, mesh):
    save_file({"fc.weight": np.zeros((2, 2), np.float32)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("text")
    for name in ("other", "text", "none"):
        with pytest.raises(errors.UserError, match=f"weights: .*{name}.safetensors.*pt_inception-2015-12-05") as caught:
            load("inception", mesh, tmp_path / f"{name}.safetensors")
        assert "\n" not in str(caught.value)


@pytest.mark.medium
def test_a_classifier_gives_its_features_and_logits(tmp_path, mesh):
    net = convnet.ConvNet(convnet.Config(**CONVNET))
    params = convnet.init(net, jax.random.key(0))
    checkpoint.save_params(tmp_path, {"convnet": params}, {"model": {"net": CONVNET}})
    found = load(tmp_path, mesh)(pictures(4))
    assert set(found) == {"pool", "logits"} and found["pool"].shape == (4, 16)
    expected = net.apply({"params": params}, pictures(4) / np.float32(255))
    np.testing.assert_allclose(found["logits"], expected, atol=SAME)


@pytest.mark.medium
def test_the_encoder_of_an_addp_run_gives_its_mean_patch(tmp_path, mesh):
    encoder = vit.Config(**BLOCKS, image_size=16, patch_size=8)
    config = pixel_to_token.Config(encoder, layers.TransformerConfig(**BLOCKS), num_codes=8, vocab_size=9)
    net = pixel_to_token.PixelToToken(config)
    params = pixel_to_token.init(net, jax.random.key(0))
    fields = {"encoder": BLOCKS | dict(image_size=16, patch_size=8), "decoder": BLOCKS, "num_codes": 8, "vocab_size": 9}
    checkpoint.save_params(tmp_path, {"pixel_to_token": params}, {"model": {"net": fields}})
    found = load(tmp_path, mesh)(pictures(4))
    tokens = net.apply({"params": params}, pictures(4) / np.float32(255), method="encode")
    np.testing.assert_allclose(found["pool"], tokens[:, 1:].mean(1), atol=SAME)


def test_images_of_another_size_are_resized_and_weights_tell_networks_apart(tmp_path, mesh):
    nets = []
    for seed in (0, 1):
        params = convnet.init(convnet.ConvNet(convnet.Config(**CONVNET)), jax.random.key(seed))
        checkpoint.save_params(tmp_path / str(seed), {"convnet": params}, {"model": {"net": CONVNET}})
        nets.append(load(tmp_path / str(seed), mesh))
    assert nets[0].weights != nets[1].weights
    flat = np.full((4, 16, 16, 3), 77, np.uint8)
    large = nets[0](flat.repeat(3, 1).repeat(3, 2))
    np.testing.assert_allclose(large["pool"], nets[0](flat)["pool"], atol=SAME)


@pytest.mark.parametrize("network, identity", (("tokenizer", {"model": {"net": CONVNET}}), ("convnet", {})))
def test_a_run_of_another_network_or_without_its_config_is_refused(tmp_path, mesh, network, identity):
    checkpoint.save_params(tmp_path, {network: {"codebook": np.zeros((2, 2), np.float32)}}, identity)
    with pytest.raises(errors.UserError, match="neither convnet nor addp"):
        load(tmp_path, mesh)

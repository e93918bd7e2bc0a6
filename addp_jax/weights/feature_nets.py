"""Networks whose features tell sets of images apart: FID's Inception, or a network of one of our own runs."""

from __future__ import annotations

import functools
from typing import Callable

import jax
import jax.numpy as jnp
import numpy as np

from addp_jax import errors, parameters, partition, schema
from addp_jax.models import convnet, inception, pixel_to_token
from addp_jax.weights import buckets, checkpoint, torch_nets, weight_files

INCEPTION = "inception"
KNOWN = ("fc.weight", "features.0.weight", "lin0.model.1.weight")  # a tensor of Inception, VGG16 and LPIPS each


class FeatureNet:
    """Images -> features, on all devices of a mesh.

    Attributes:
      name: "inception", "convnet" or "pixel_to_token".
      weights: hash of its parameters.
      size: pixels that images are resized to (bicubic) where they have another size; 0 = any size.
    """

    def __init__(self, name: str, params, apply: Callable, size: int, mesh):
        self.name, self.size, self.mesh = name, size, mesh
        self.weights = parameters.content_hash(params)
        self._params = partition.put(params, partition.replicated(mesh))

        def run(params, image):
            image = image.astype(jnp.float32)
            if size and image.shape[1:3] != (size, size):
                image = jnp.clip(jax.image.resize(image, (len(image), size, size, 3), "cubic"), 0, 255)
            features = apply(params, image)
            return jax.tree.map(lambda rows: partition.constrain(rows.astype(jnp.float32), None, None), features)

        self._run = jax.jit(run)

    def __call__(self, image) -> dict[str, np.ndarray]:
        """uint8 [B,H,W,3], the batch a multiple of the devices -> float32 by name: "pool" [B,D]; see the networks."""
        image = jax.device_put(image, partition.batch_sharding(self.mesh))
        return jax.device_get(self._run(self._params, image))


def load(features: str, weights: str, mesh, field: str, weights_field: str) -> FeatureNet:
    """The network that `features` names.

    Args:
      features: "inception", or the work directory of a run of the task convnet or addp.
      weights: file of Inception's weights; "" for other networks.
      field, weights_field: where the user set them, for messages.
    Raises UserError naming the field when there are no such weights or they do not fit.
    """
    if features == INCEPTION:
        params = read_weights(weights, torch_nets.inception_params, weights_field, "pt_inception-2015-12-05-6726825d")
        apply = lambda params, image: inception.Inception().apply({"params": params}, image)
        return FeatureNet(INCEPTION, params, apply, 0, mesh)
    params, info = checkpoint.load_params(buckets.fetched(features, f"{field}: "), ema=True)
    if "model" not in info["identity"] or not {"convnet", "pixel_to_token"} & params.keys():
        lacking = "is a training run of neither convnet nor addp"
        raise errors.UserError(f"{field}={features} {lacking}; give one, or {INCEPTION}")
    if "convnet" in params:
        net, params = convnet_of(features, params, info["identity"])
        return FeatureNet("convnet", params, functools.partial(convnet_features, net), net.config.image_size, mesh)
    settings = schema.build(pixel_to_token.Config, info["identity"]["model"]["net"], "config.model.net")
    net = pixel_to_token.PixelToToken(settings)
    expected = jax.eval_shape(lambda rng: pixel_to_token.init(net, rng), jax.random.key(0))
    params = parameters.match(params["pixel_to_token"], expected, where=features)
    apply = functools.partial(encoder_features, net)
    return FeatureNet("pixel_to_token", params, apply, net.config.encoder.image_size, mesh)


def read_weights(path: str, convert: Callable, field: str, what: str):
    """`convert` of the tensors by name in a weight file (see `weight_files.read`).

    Raises UserError naming `field`, and `what` to give, if the file cannot be read or does not fit.
    """
    if not path:
        raise errors.UserError(f"{field} is empty: give {what}, a .pth or .safetensors file")
    try:
        tensors = weight_files.read(buckets.fetched(path))
        return convert(weight_files.without_prefix(tensors, lambda names: any(name in KNOWN for name in names)))
    except errors.UserError as error:
        raise errors.UserError(f"{field}: {error}; give {what}") from error
    except (KeyError, ValueError) as error:
        raise errors.UserError(f"{field}: {path}: {error.args[0]}; give {what}") from error


def convnet_of(workdir: str, params: dict, identity: dict):
    """(network, its parameters) of a loaded run of the task convnet."""
    net = convnet.ConvNet(schema.build(convnet.Config, identity["model"]["net"], "config.model.net"))
    expected = jax.eval_shape(lambda rng: convnet.init(net, rng), jax.random.key(0))
    return net, parameters.match(params["convnet"], expected, where=workdir)


def convnet_features(net, params, image):
    """What the classes are read off, and the classes' logits, of `image` in 0..255."""
    read = lambda net, image: {"pool": net.features(image), "logits": net(image)}
    return net.apply({"params": params}, image / 255, method=read)


def encoder_features(net, params, image):
    """Mean of ADDP's encoder over the patches of `image` in 0..255."""
    return {"pool": net.apply({"params": params}, image / 255, method="encode")[:, 1:].mean(1)}

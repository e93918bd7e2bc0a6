"""The released code's numbers on a small random model: `tests/golden/*.npz`, and the networks that load its weights.

weights.npz holds every parameter under the released names. They have 11 mantissa bits, so a float32 is kept in
2.5 bytes. outputs.npz holds what the released PyTorch code computes with them, float32 on a CPU, dropout off.
A checksum of a tensor is [sum(x), sum|x|, sqrt(sum x^2), sum(x cos(0.1 k))] over its C-order elements, float64.
"""

import functools
import json
import pathlib

import numpy as np

from addp_jax.codecs import vqgan
from addp_jax.models import layers, pixel_to_token, token_predictor, vit
from addp_jax.weights import pytorch

FOLDER = pathlib.Path(__file__).parent / "golden"
TRANSFORMER = functools.partial(layers.TransformerConfig, width=64, depth=2)
TOKENIZER = vqgan.Config(channels=32, multipliers=(1, 1, 2, 2, 2))
PREDICTOR = token_predictor.Config(TRANSFORMER(heads=4), TRANSFORMER(heads=2))
ADDP = pixel_to_token.Config(vit.Config(64, 2, 4), TRANSFORMER(heads=2))


@functools.cache
def outputs() -> dict:
    return dict(np.load(FOLDER / "outputs.npz"))


@functools.cache
def schedules() -> dict:
    return dict(np.load(FOLDER / "schedules.npz"))


@functools.cache
def state_dict() -> dict:
    """{released name: float32 array}."""
    stored = np.load(FOLDER / "weights.npz")
    low = np.stack([stored["lower"] & 15, stored["lower"] >> 4], axis=1).reshape(-1)[: len(stored["top"])]
    bits = stored["top"].astype(np.uint32) << 24 | stored["upper"].astype(np.uint32) << 16 | low.astype(np.uint32) << 12
    shapes = [json.loads(str(shape)) for shape in stored["shapes"]]
    parts = np.split(bits.view(np.float32), np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1])
    return {str(name): part.reshape(shape) for name, part, shape in zip(stored["names"], parts, shapes)}


def part(prefix: str) -> dict:
    return {name[len(prefix) :]: value for name, value in state_dict().items() if name.startswith(prefix)}


@functools.cache
def tokenizer_params():
    return pytorch.from_torch(part("vqgan."), pytorch.tokenizer_rules(TOKENIZER))


@functools.cache
def predictor_params(scale=lambda name: 1):
    tensors = {name: value * np.float32(scale("token_predictor." + name)) for name, value in part("token_predictor.").items()}
    return pytorch.from_torch(tensors, pytorch.predictor_rules(), pytorch.PREDICTOR_DEAD)


@functools.cache
def addp_params(scale=lambda name: 1):
    own = {name: value for name, value in state_dict().items() if not name.startswith(("vqgan.", "token_predictor."))}
    tensors = {name: value * np.float32(scale(name)) for name, value in own.items()}
    return pytorch.from_torch(tensors, pytorch.addp_rules(), pytorch.ADDP_DEAD)


def masks(name: str) -> np.ndarray:
    """A stored mask, unpacked to bool [..., 256]."""
    return np.unpackbits(outputs()[name], axis=-1).astype(bool)


def images() -> np.ndarray:
    """The two input images, float32 [2,256,256,3] in [0,1]."""
    return outputs()["images_u8"].transpose(0, 2, 3, 1).astype(np.float32) / np.float32(255)


def checksum(array) -> np.ndarray:
    flat = np.asarray(array, np.float64).ravel()
    waves = np.cos(0.1 * np.arange(flat.size))
    return np.array([flat.sum(), np.abs(flat).sum(), np.sqrt((flat**2).sum()), (flat * waves).sum()])

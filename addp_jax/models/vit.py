"""The recognition encoder: a plain vision transformer (ViT-B/16 and ViT-L/16 in the paper)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from addp_jax import partition, schema
from addp_jax.models import layers
from addp_jax.models.dropout import Dropout

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)
LAYOUT = (
    (r".*patch_embed/kernel", ("replicated", "width")),
    (r".*pos_embed", ("replicated", "width")),
    (r".*class_token", ("replicated",)),
    *layers.LAYOUT,
)


@schema.config
class Config(layers.TransformerConfig):
    """A vision transformer; `image_size` / `patch_size` gives the token grid."""

    image_size: int = schema.field(256, least=1, tiny=16)  # pixels; position embeddings of another size are resized
    patch_size: int = schema.field(16, least=1, tiny=4)  # pixels
    input_dropout: float = schema.field(0.1, least=0, below=1, matters=schema.TRAINING)  # after the input LayerNorm
    input_norm: bool = True  # LayerNorm between the embeddings and the first block; tokens always have it
    final_norm: bool = True  # LayerNorm after the last block
    pos_std: float = schema.field(0.02, least=0, matters=schema.TRAINING)  # of the initial position embeddings
    # Of a patch's mean colour in the initial patch embedding; below 1, edges and positions are not drowned by colours.
    colour_scale: float = schema.field(1.0, least=0, matters=schema.TRAINING)

    def __post_init__(self):
        layers.TransformerConfig.__post_init__(self)
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size: {self.image_size} is not a multiple of patch_size={self.patch_size}")

    @property
    def length(self) -> int:
        return (self.image_size // self.patch_size) ** 2


def normalize(image):
    """Clip to [0,1] and apply ImageNet's mean and standard deviation; `image` [B,H,W,3]."""
    return (jnp.clip(image, 0.0, 1.0) - IMAGENET_MEAN[None, None, None]) / IMAGENET_STD[None, None, None]


def inside(size, shape):
    """`size` int32 [B,2], `shape` (H, W) -> bool [B,H,W]: which pixels are the picture's."""
    rows, columns = (np.arange(length)[None] < size[:, axis, None] for axis, length in enumerate(shape))
    return rows[:, :, None] & columns[:, None, :]


class Embedding(nn.Module):
    """Where an encoder begins: features of an image's patches or, as in MAGE, of the codes of a frozen tokenizer.

    Then a token id stands in the place of a patch; `input_norm` is always there, as MAGE's pre-training has it.
    """

    config: Any  # of the encoder
    dtype: jnp.dtype = jnp.float32
    num_codes: int = 0  # K of the token ids that are read; 0 = pixels are

    def embed(self, inputs, size=None, kernel_init=layers.XAVIER):
        """Pixels [B,H,W,3] in [0,1], or token ids int32 [B,h,w] -> ([B,h*w,D], (h, w)).

        size: of the pictures, int32 [B,2], top left; beyond it the mean colour is read. Of token ids it says nothing.
        """
        width, side = self.config.width, self.config.patch_size
        if self.num_codes:
            grid = inputs.shape[1:]
            table = self.param("token_embed", layers.EMBEDDING_INIT, (self.num_codes, width))
            tokens = table[inputs.reshape(len(inputs), -1)]
        else:
            image = normalize(inputs)
            if size is not None:
                image = jnp.where(inside(size, image.shape[1:3])[..., None], image, 0.0)
            grid = image.shape[1] // side, image.shape[2] // side
            patches = rearrange(image, "b (h p) (w q) c -> b (h w) (p q c)", p=side, q=side).astype(self.dtype)
            tokens = layers.dense(width, "patch_embed", self.dtype, kernel_init)(patches)
        # Else the patches are gathered, not the kernel.
        return partition.constrain(tokens, "batch", "length", "embed"), grid

    def place(self, tokens, pos_init):
        """[B,L,D] -> [B,1+L,D]: behind a class token, all with their position embeddings."""
        width = self.config.width
        class_token = self.param("class_token", layers.EMBEDDING_INIT, (width,))
        pos_embed = self.param("pos_embed", pos_init, (1 + self.config.length, width))
        first = jnp.broadcast_to(class_token[None, None].astype(tokens.dtype), (len(tokens), 1, width))
        return jnp.concatenate([first, tokens], axis=1) + pos_embed[None].astype(tokens.dtype)

    def norm(self, tokens):
        """The LayerNorm between the embeddings and the first block, where there is one."""
        if self.config.input_norm or self.num_codes:
            tokens = layers.layer_norm("input_norm", dtype=self.dtype)(tokens)
        return tokens


def blank(config, num_codes: int = 0):
    """What an encoder reads, without content: pixels [1,S,S,3] or, with `num_codes`, token ids [1,h,w]."""
    grid = config.image_size // config.patch_size
    return jnp.zeros((1, grid, grid), jnp.int32) if num_codes else jnp.zeros((1, config.image_size, config.image_size, 3))


class VisionTransformer(Embedding):
    """Image, or its token ids -> class token and patch features."""

    @nn.compact
    def __call__(self, image, train: bool = False, tap: int = 0):
        """`image` [B,H,W,3] in [0,1] (values outside are clipped), or see `embed` -> [B,1+L,D], class token first.

        tap: a block, counted from 1, whose output [B,1+L,D] is returned as well; 0 = none.
        """
        config = self.config
        tokens, _ = self.embed(image, kernel_init=_patch_init(config))
        tokens = self.norm(self.place(tokens, nn.initializers.normal(config.pos_std)))
        tokens = Dropout(config.input_dropout)(tokens, train)
        tokens = layers.Blocks(config, self.dtype, name="blocks")(tokens, train=train, tap=tap)
        tokens, tapped = tokens if tap else (tokens, None)
        if config.final_norm:
            tokens = layers.layer_norm("final_norm", dtype=self.dtype)(tokens)
        return (tokens, tapped) if tap else tokens


def _patch_init(config: Config):
    """Xavier's initial kernel [P*P*3,D], in which the mean over a patch of each colour counts `colour_scale` times."""

    def init(rng, shape, dtype=jnp.float32):
        kernel = layers.XAVIER(rng, shape, dtype).reshape(-1, 3, shape[-1])
        return (kernel - (1 - config.colour_scale) * kernel.mean(0)[None]).reshape(shape)

    return init if config.colour_scale != 1 else layers.XAVIER


def init(config: Config, rng):
    """Parameters of a `VisionTransformer`; pure."""
    return VisionTransformer(config).init(rng, blank(config))["params"]


def resize_pos_embed(pos_embed, length: int):
    """Position embeddings [1+L,D] for a grid of `length` patches, float32 [1+length,D]; the class token's row is kept.

    Bicubic as the release does it for fine-tuning at another image size: half-pixel centres, no antialiasing.
    """
    pos_embed = np.asarray(pos_embed, np.float32)
    old, new = round((len(pos_embed) - 1) ** 0.5), round(length**0.5)
    if old == new:
        return pos_embed
    weights, grid = bicubic_weights(old, new), pos_embed[1:].reshape(old, old, -1).astype(np.float64)
    resized = np.einsum("ip,jq,pqd->ijd", weights, weights, grid).reshape(new * new, -1)
    return np.concatenate([pos_embed[:1], resized.astype(np.float32)])


def bicubic_weights(old: int, new: int, a: float = -0.75):
    """float64 [new,old]: what each of `old` points gives to each of `new` ones; edge points are repeated outwards.

    a: of the cubic convolution kernel; -0.75 is PyTorch's, while jax.image.resize has -0.5.
    """
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(centre).astype(int) - 1
    weights = np.zeros((new, old))
    for tap in range(4):
        x = np.abs(centre - (first + tap))
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        np.add.at(weights, (np.arange(new), np.clip(first + tap, 0, old - 1)), np.where(x <= 1, near, far))
    return weights

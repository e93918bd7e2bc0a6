"""The ADDP network: pixels of a half-denoised image -> distribution of cleaner tokens (paper section 3.2)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from addp_jax import schema
from addp_jax.models import layers, vit

LAYOUT = ((r".*(pos_visible|pos_masked|pos_token)", ("replicated", "width")), *vit.LAYOUT)


@schema.config
class Config:
    """Encoder and decoder of one width; the vocabulary holds the codes first, the mask token last."""

    encoder: vit.Config = vit.Config()
    decoder: layers.TransformerConfig = layers.TransformerConfig(depth=8, heads=16)
    num_codes: int = schema.field(1024, least=1, tiny=32)  # K
    vocab_size: int = schema.field(2025, least=2, tiny=36)  # V: codes, 1000 rows that are never a target, mask token
    # Of the initial token embedding, which also is the (untrained) output matrix.
    token_std: float = schema.field(0.02, least=0, matters=schema.TRAINING)

    @property
    def length(self) -> int:
        return self.encoder.length


class PixelToToken(nn.Module):
    """Encoder over pixels, decoder over the masked grid plus the embeddings of the known tokens."""

    config: Config
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        config, width = self.config, self.config.decoder.width
        positions = (1 + config.length, width)
        self.encoder = vit.VisionTransformer(config.encoder, self.dtype)
        self.decoder_embed = layers.dense(width, None, self.dtype)
        self.mask_token = self.param("mask_token", layers.EMBEDDING_INIT, (width,))
        token_init = nn.initializers.normal(config.token_std)
        self.token_embed = self.param("token_embed", token_init, (config.vocab_size, width))
        self.pos_visible = self.param("pos_visible", layers.EMBEDDING_INIT, positions)  # class slot, grid slots
        self.pos_masked = self.param("pos_masked", layers.EMBEDDING_INIT, positions)
        self.pos_token = self.param("pos_token", layers.EMBEDDING_INIT, positions)  # known tokens
        self.decoder = layers.Blocks(config.decoder, self.dtype)
        self.decoder_norm = layers.layer_norm(dtype=self.dtype)
        self.head = layers.TokenHead(self.dtype)

    def __call__(self, image, token_ids, mask, capacity: int, train: bool = False, tap: int = 0):
        """Logits of every grid position.

        Args:
          image: `[B,H,W,3]` decoded pixels, clipped to [0,1] here.
          token_ids: int32 `[B,L]`, used where `mask` is False.
          mask: bool `[B,L]`, True = masked.
          capacity: static number of slots for known tokens; every example must have at most so many.
          tap: a block of the encoder, counted from 1, whose output [B,1+L,D] is returned as well; 0 = none.
        Returns:
          float32 `[B,L,V]`.
        """
        if not tap:
            return self.decode(self.encode(image, train), token_ids, mask, capacity, train)
        features, tapped = self.encoder(image, train, tap)
        return self.decode(features, token_ids, mask, capacity, train), tapped

    def encode(self, image, train: bool = False):
        """`image` [B,H,W,3] -> features [B,1+L,D], class token first."""
        return self.encoder(image, train)

    def decode(self, features, token_ids, mask, capacity: int, train: bool = False):
        """As `__call__`, from the encoder's features. The class feature and those under the mask are not read."""
        length = self.config.length
        masked = mask[..., None]
        mask_token = self.mask_token[None, None]
        slots = self.decoder_embed(features[:, 1:]) + self.pos_visible[None, 1:]
        slots = jnp.where(masked, mask_token + self.pos_masked[None, 1:], slots)
        first = jnp.broadcast_to(mask_token + self.pos_visible[None, :1], (len(slots), 1, slots.shape[-1]))
        known, present = self._known_tokens(token_ids, mask, capacity)
        tokens = jnp.concatenate([first, slots, known], axis=1).astype(self.dtype)
        key_mask = jnp.concatenate([jnp.ones_like(mask[:, :1]), jnp.ones_like(mask), present], axis=1)
        tokens = self.decoder(tokens, key_mask if capacity else None, train)
        return self.head(self.decoder_norm(tokens[:, 1 : 1 + length]), self.token_embed)

    def _known_tokens(self, token_ids, mask, capacity: int):
        """Known tokens gathered, in raster order, into `capacity` slots: embeddings [B,c,D] and which are real [B,c].

        Departs from the release, which appends exactly the known tokens: a static length with
        ignored attention keys gives the same logits and compiles once.
        """
        order = jnp.argsort(mask, axis=-1, stable=True)[:, :capacity]
        ids = jnp.take_along_axis(token_ids, order, axis=-1)
        present = jnp.arange(capacity)[None] < (~mask).sum(-1, keepdims=True)
        return self.token_embed[ids] + self.pos_token[1:][order], present


def init(net: PixelToToken, rng):
    """Parameters of `net`; pure."""
    size, shape = net.config.encoder.image_size, (1, net.config.length)
    image = jnp.zeros((1, size, size, 3))
    return net.init(rng, image, jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool), capacity=1)["params"]


def bind(net: PixelToToken, params, known_tokens: bool = True):
    """`net` with its parameters as `samplers.Nets.predict`. known_tokens: the decoder is told them."""
    num_codes = net.config.num_codes

    def predict(image, token_ids, mask, capacity):
        if capacity == 0:  # the encoder's output is hidden: one row of logits serves the whole batch
            features = jnp.zeros((1, 1 + mask.shape[1], net.config.encoder.width), net.dtype)
            logits = net.apply({"params": params}, features, token_ids[:1], mask[:1], 0, method=net.decode)
            return jnp.broadcast_to(logits[..., :num_codes], (*mask.shape, num_codes))
        return net.apply({"params": params}, image, token_ids, mask, capacity * known_tokens)[..., :num_codes]

    return predict

"""The token predictor: MAGE's masked-token transformer, ADDP's frozen teacher."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from addp_jax import schema
from addp_jax.models import layers
from addp_jax.models.dropout import Dropout

LAYOUT = ((r".*(pos_embed|decoder_pos)", ("replicated", "width")), *layers.LAYOUT)


@schema.config
class Config:
    """The vocabulary holds the codes, then rows of which `class_id` fills the class slot, then the mask token."""

    encoder: layers.TransformerConfig = layers.TransformerConfig()
    decoder: layers.TransformerConfig = layers.TransformerConfig(depth=8, heads=16)
    num_codes: int = schema.field(1024, least=1, tiny=32)  # K
    vocab_size: int = schema.field(2025, least=2, tiny=36)  # V
    class_id: int = schema.field(1100, least=0, tiny=34)  # in the class slot; released: row 76 after the codes
    length: int = schema.field(256, least=1, tiny=16)  # L
    # Of the initial token embedding, which also is the (untrained) output matrix.
    token_std: float = schema.field(0.02, least=0, matters=schema.TRAINING)


class TokenPredictor(nn.Module):
    """Masked token ids -> logits of every position."""

    config: Config
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        config = self.config
        positions = 1 + config.length
        self.token_embed = self.param(
            "token_embed", nn.initializers.normal(config.token_std), (config.vocab_size, config.encoder.width)
        )
        self.pos_embed = self.param("pos_embed", layers.EMBEDDING_INIT, (positions, config.encoder.width))
        self.embed_norm = layers.layer_norm(dtype=self.dtype)
        self.embed_dropout = Dropout(config.encoder.dropout)
        self.encoder = layers.Blocks(config.encoder, self.dtype)
        self.encoder_norm = layers.layer_norm(dtype=self.dtype)
        self.decoder_embed = layers.dense(config.decoder.width, None, self.dtype)
        self.decoder_pos = self.param("decoder_pos", layers.EMBEDDING_INIT, (positions, config.decoder.width))
        self.decoder = layers.Blocks(config.decoder, self.dtype)
        self.decoder_norm = layers.layer_norm(dtype=self.dtype)
        self.head = layers.TokenHead(self.dtype)

    def __call__(self, token_ids, mask, kept=None, train: bool = False):
        """Logits of every position.

        Args:
          token_ids: int32 `[B,L]`.
          mask: bool `[B,L]`, True = masked.
          kept: int32 `[B,k]` positions that enter the encoder (training drops masked ones to save
            work), or None for all. Positions left out must be masked.
        Returns:
          float32 `[B,L,V]`.
        """
        features = self.encode(token_ids, mask, kept, train)
        return self.decode(features, mask, kept, train)

    def encode(self, token_ids, mask, kept=None, train: bool = False):
        """-> [B,1+k,D], class slot first."""
        config = self.config
        ids = jnp.where(mask, config.vocab_size - 1, token_ids)
        ids = jnp.pad(ids, ((0, 0), (1, 0)), constant_values=config.class_id)
        tokens = self.embed_norm(self.token_embed[ids] + self.pos_embed[None])
        tokens = self.embed_dropout(tokens, train)
        if kept is not None:
            kept = jnp.pad(kept + 1, ((0, 0), (1, 0)))
            tokens = jnp.take_along_axis(tokens, kept[..., None], axis=1)
        return self.encoder_norm(self.encoder(tokens.astype(self.dtype), train=train))

    def decode(self, features, mask, kept=None, train: bool = False):
        """Masked and dropped positions are filled with the encoded class token. -> logits [B,L,V]."""
        tokens = self.decoder_embed(features)
        first, grid = tokens[:, :1], tokens[:, 1:]
        if kept is not None:
            rows = jnp.arange(len(kept))[:, None]
            filler = jnp.broadcast_to(first, (len(kept), self.config.length, first.shape[-1]))
            grid = filler.at[rows, kept].set(grid)
        grid = jnp.where(mask[..., None], first, grid)
        tokens = jnp.concatenate([first, grid], axis=1) + self.decoder_pos[None].astype(self.dtype)
        tokens = self.decoder_norm(self.decoder(tokens, train=train)[:, 1:])
        return self.head(tokens, self.token_embed)


def init(net: TokenPredictor, rng):
    """Parameters of `net`; pure."""
    shape = (1, net.config.length)
    return net.init(rng, jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))["params"]


def bind(net: TokenPredictor, params):
    """`net` with its parameters as `samplers.Nets.predict`; it reads neither pixels nor the capacity."""
    num_codes = net.config.num_codes
    return lambda image, token_ids, mask, capacity: net.apply({"params": params}, token_ids, mask)[..., :num_codes]

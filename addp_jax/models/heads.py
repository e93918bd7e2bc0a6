"""Recognition on top of the encoder: pooled features, the fine-tuned classifier, the linear probe."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from addp_jax import parameters, schema
from addp_jax.models import layers, vit

POOLINGS = ("mean", "class")
HEAD_STD = 2e-5  # of the fine-tuned head (the release)
PROBE_STD = 0.01  # of the linear probe (MAE)
PROBE_LAYOUT = ((r".*dense_out/kernel", ("replicated", "replicated")), (r".*(bias|scale)", ("replicated",)))
LAYOUT = (*PROBE_LAYOUT[:1], *vit.LAYOUT)


@schema.config
class Config:
    """A classifier of images. The release fine-tunes without the encoder's input and final LayerNorm."""

    encoder: vit.Config = vit.Config(dropout=0.0, input_dropout=0.0, input_norm=False, final_norm=False)
    num_classes: int = schema.field(1000, least=1)  # C
    pooling: str = schema.field("mean", choices=POOLINGS)  # mean (of the patches) | class (the class token)


def pool(tokens, pooling: str):
    """Features [B,1+L,D], class token first -> float32 [B,D]."""
    return (tokens[:, 1:].mean(1, dtype=jnp.float32) if pooling == "mean" else tokens[:, 0]).astype(jnp.float32)


class Classifier(nn.Module):
    """Encoder, pooling, LayerNorm, linear head."""

    config: Config
    dtype: jnp.dtype = jnp.float32
    num_codes: int = 0  # see `vit.Embedding`

    def setup(self):
        self.encoder = vit.VisionTransformer(self.config.encoder, self.dtype, self.num_codes)
        self.head_norm = layers.layer_norm()
        self.dense_out = nn.Dense(self.config.num_classes, kernel_init=nn.initializers.truncated_normal(HEAD_STD))

    def __call__(self, image, train: bool = False):
        """`image` [B,H,W,3] in [0,1] -> logits float32 [B,C]."""
        return self.dense_out(self.features(image, train))

    def features(self, image, train: bool = False):
        """`image` [B,H,W,3] in [0,1] -> what the classes are read off, float32 [B,D]."""
        return self.head_norm(pool(self.encoder(image, train), self.config.pooling))


class LinearProbe(nn.Module):
    """Classes from features that are not trained.

    `norm_scale` and `norm_bias` are a BatchNorm without affine parameters, its statistics folded into two vectors: no
    gradient reaches them, and as `parameters.FOLDED` no weight decay does.
    """

    num_classes: int

    @nn.compact
    def __call__(self, features):
        """`features` float32 [B,D] -> logits float32 [B,C]."""
        scale_name, bias_name = parameters.FOLDED
        scale = self.param(scale_name, nn.initializers.ones, (features.shape[-1],))
        bias = self.param(bias_name, nn.initializers.zeros, (features.shape[-1],))
        features = features * jax.lax.stop_gradient(scale)[None] + jax.lax.stop_gradient(bias)[None]
        kernel_init = nn.initializers.truncated_normal(PROBE_STD)
        return nn.Dense(self.num_classes, kernel_init=kernel_init, name="dense_out")(features)


def block_features(config: vit.Config, params, image, block: int, pooling: str, dtype=jnp.float32):
    """`block_tokens`, pooled: float32 [B,D]."""
    return pool(block_tokens(config, params, image, block, dtype), pooling)


def block_tokens(config: vit.Config, params, image, block: int, dtype=jnp.float32):
    """Features [B,1+L,D] after the first `block` blocks of an encoder; no final norm unless these are all.

    params: of a `vit.VisionTransformer` of this config; the blocks behind `block` are not computed.
    """
    if block < config.depth:
        blocks = jax.tree.map(lambda leaf: leaf[:block], params["blocks"])
        config = dataclasses.replace(config, depth=block, final_norm=False)
        params = {name: value for name, value in params.items() if name != "final_norm"} | {"blocks": blocks}
    return vit.VisionTransformer(config, dtype).apply({"params": params}, image)


def init(net: Classifier, rng):
    """Parameters of `net`; pure."""
    return net.init(rng, vit.blank(net.config.encoder, net.num_codes))["params"]

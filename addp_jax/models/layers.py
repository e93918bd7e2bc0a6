"""Transformer parts shared by every network: attention, MLP, pre-norm blocks, the scanned stack, the token head."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from addp_jax import partition, schema
from addp_jax.models.attention import attend
from addp_jax.models.dropout import Dropout

LAYER_NORM_EPS = 1e-6
REMAT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
HEAD_NORM_EPS = 1e-5  # the release's token heads use torch's default here
EMBEDDING_INIT = nn.initializers.normal(0.02)
# A TPU takes queries by 128. A class token in front of full tiles would cost one more: it goes with seven others, which
# are computed twice.
TILE, SHORT_TILE = 128, 8
XAVIER = nn.initializers.xavier_uniform()
LAYOUT = (
    (r".*/block/attention/(query|key|value)/kernel", ("layers", "width", "heads")),
    (r".*/block/attention/(query|key|value)/bias", ("layers", "heads")),
    (r".*/block/attention/out/kernel", ("layers", "heads", "width")),
    (r".*/block/mlp/fc1/kernel", ("layers", "width", "mlp")),
    (r".*/block/mlp/fc1/bias", ("layers", "mlp")),
    (r".*/block/mlp/fc2/kernel", ("layers", "mlp", "width")),
    (r".*/block/((attention/out|mlp/fc2)/bias|norm[12]/(scale|bias))", ("layers", "replicated")),
    (r".*(decoder_embed|head/fc)/kernel", ("replicated", "width")),
    (r".*token_embed", ("vocab", "width")),
    (r".*(mask_token|bias|scale)", ("replicated",)),
)


@schema.config
class BlockConfig:
    """Size of a stack of pre-norm transformer blocks."""

    width: int = schema.field(768, least=1, tiny=16)  # D
    depth: int = schema.field(12, least=1, tiny=2)  # blocks
    heads: int = schema.field(12, least=1, tiny=2)  # N
    mlp_ratio: int = schema.field(4, least=1)

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"heads: {self.heads} does not divide width={self.width}")


@schema.config
class TransformerConfig(BlockConfig):
    """A stack as `Blocks` computes it."""

    # Of attention weights, attention output and both MLP layers.
    dropout: float = schema.field(0.1, least=0, below=1, matters=schema.TRAINING)
    # Of the last block; grows linearly from 0 at the first.
    drop_path: float = schema.field(0.0, least=0, below=1, matters=schema.TRAINING)
    # What the backward pass computes again: none | dots (all but matmul outputs) | full.
    remat: str = schema.field("none", choices=("none", *REMAT_POLICIES), matters=schema.NOTHING, tiny="none")


def layer_norm(name: str | None = None, eps: float = LAYER_NORM_EPS, dtype=None) -> nn.LayerNorm:
    """In bfloat16, mean and variance are made in one pass, in float32, which spares a TPU a twentieth of a block.

    The variance is then off by about (mean / deviation)**2 * 2**-24 of itself: less than bfloat16 rounds, 2**-9, while
    the mean of a token's features is below a hundred of their deviations.
    """
    return nn.LayerNorm(epsilon=eps, use_fast_variance=dtype == jnp.bfloat16, dtype=dtype, name=name)


def dense(features: int, name: str, dtype=None, kernel_init=XAVIER) -> nn.Dense:
    return nn.Dense(features, kernel_init=kernel_init, dtype=dtype, name=name)


def gelu(inputs):
    """The exact GELU, in float32: in bfloat16 1 + erf would cancel, and erfc costs a TPU ten times as much as erf."""
    wide = inputs.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * np.float32(0.5**0.5)))).astype(inputs.dtype)


class Attention(nn.Module):
    """Multi-head self-attention; softmax in float32."""

    heads: int
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens, key_mask, train: bool):
        """`tokens` [B,M,D], `key_mask` bool [B,M] or None (False keys are ignored) -> [B,M,D]."""
        batch, length, width = tokens.shape
        # Xavier over the fused (D, 3D) matrix, as the release initialises it; three matmuls avoid a relayout on TPU.
        fused_xavier = nn.initializers.variance_scaling(0.5, "fan_avg", "uniform")

        def project(name):
            out = nn.Dense(width, kernel_init=fused_xavier, dtype=self.dtype, name=name)(tokens)
            return out.reshape(batch, length, self.heads, width // self.heads).swapaxes(1, 2)  # heads first: plain matmuls

        query, key, value = project("query"), project("key"), project("value")
        rng = self.make_rng("dropout") if train and self.dropout else None

        def attended(query):
            scores = jnp.einsum("bnqd,bnkd->bnqk", query, key, preferred_element_type=jnp.float32)
            scores = scores * (width // self.heads) ** -0.5
            if key_mask is not None:
                scores = jnp.where(key_mask[:, None, None, :], scores, -jnp.inf)
            return attend(scores, value, rng, self.dropout)

        if length % TILE == 1 and not train:  # the backward pass would lose what the forward pass gains
            out = jnp.concatenate([attended(query[:, :, :SHORT_TILE])[:, :, :1], attended(query[:, :, 1:])], axis=2)
        else:
            out = attended(query)
        out = out.swapaxes(1, 2).reshape(batch, length, width)
        out = dense(width, "out", self.dtype)(out)
        return Dropout(self.dropout)(out, train)


class Mlp(nn.Module):
    """Two layers with an exact GELU between them."""

    ratio: int
    dropout: float
    dtype: jnp.dtype
    kernel_init: nn.initializers.Initializer = XAVIER

    @nn.compact
    def __call__(self, tokens, train: bool):
        width = tokens.shape[-1]
        hidden = gelu(dense(self.ratio * width, "fc1", self.dtype, self.kernel_init)(tokens))
        hidden = Dropout(self.dropout)(hidden, train)
        out = dense(width, "fc2", self.dtype, self.kernel_init)(hidden)
        return Dropout(self.dropout)(out, train)


class DropPath(nn.Module):
    """Drops a residual branch of whole examples with probability `rate`, a traced scalar."""

    @nn.compact
    def __call__(self, branch, rate):
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - rate, (branch.shape[0], 1, 1))
        return jnp.where(keep, branch / (1.0 - rate).astype(branch.dtype), 0)


class Block(nn.Module):
    """Pre-norm transformer block: attention and MLP, each with a residual."""

    config: TransformerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens, drop_path, key_mask, train: bool):
        config = self.config

        def add(tokens, branch):
            if config.drop_path and train:
                branch = DropPath()(branch, drop_path)
            return partition.constrain(tokens + branch, "batch", "length", "embed")

        attention = Attention(config.heads, config.dropout, self.dtype, name="attention")
        tokens = add(tokens, attention(layer_norm("norm1", dtype=self.dtype)(tokens), key_mask, train))
        mlp = Mlp(config.mlp_ratio, config.dropout, self.dtype, name="mlp")
        return add(tokens, mlp(layer_norm("norm2", dtype=self.dtype)(tokens), train))


class Blocks(nn.Module):
    """`depth` blocks, scanned: their parameters are stacked on a leading axis."""

    config: TransformerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens, key_mask=None, train: bool = False, tap: int = 0):
        """`tokens` [B,M,D], `key_mask` bool [B,M] or None -> [B,M,D].

        tap: a block, counted from 1, whose output [B,M,D] is returned as well; 0 = none.
        """
        config = self.config
        block = Block
        if config.remat != "none":
            block = nn.remat(Block, prevent_cse=False, static_argnums=(4,), policy=REMAT_POLICIES[config.remat])

        def step(module, carry, layer):
            (tokens, tapped), (drop_path, number) = carry, layer
            tokens = module(tokens, drop_path, key_mask, train)
            return (tokens, jnp.where(number == tap, tokens, tapped) if tap else None), None

        scan = nn.scan(
            step,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            length=config.depth,
        )
        drop_path = jnp.asarray(np.linspace(0, config.drop_path, config.depth), jnp.float32)
        tokens = partition.constrain(tokens, "batch", "length", "embed")
        numbers = jnp.arange(1, config.depth + 1) if tap else None
        carry = (tokens, tokens if tap else None)
        (tokens, tapped), _ = scan(block(config, self.dtype, name="block"), carry, (drop_path, numbers))
        return (tokens, tapped) if tap else tokens


class TokenHead(nn.Module):
    """Token logits from features: dense, GELU, norm, product with the (detached) token embedding, bias."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, features, token_embed):
        """`features` [B,M,D], `token_embed` [V,D] (no gradient goes into it here) -> float32 [B,M,V]."""
        hidden = gelu(dense(token_embed.shape[1], "fc", self.dtype)(features))
        hidden = layer_norm("norm", HEAD_NORM_EPS, self.dtype)(hidden)
        table = jax.lax.stop_gradient(token_embed).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (token_embed.shape[0],))
        return jnp.einsum("bmd,vd->bmv", hidden, table, preferred_element_type=jnp.float32) + bias[None, None]

"""Losses on the patch features of one encoder block, beside the loss of the tokens.

Alignment: a head predicts, from the corrupted image, another encoder's features of the clean image: those of the
averaged parameters (SRA, arXiv 2505.02831) or of a frozen network (REPA, arXiv 2410.06940).
Dispersion: the features of the batch's images are pushed apart (arXiv 2506.09027).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from addp_jax import schema
from addp_jax.models import layers, vit

LAYOUT = (
    (r".*alignment/fc1/kernel", ("width", "mlp")),
    (r".*alignment/fc2/kernel", ("mlp", "width")),
    (r".*alignment/fc[12]/bias", ("replicated",)),
)
SMOOTH_L1_BETA = 0.05  # SRA's


@schema.config
class Config:
    """Both are off where their weight is 0. Blocks are counted from 1."""

    weight: float = schema.field(0.0, least=0)  # of the alignment in the loss
    dispersive_weight: float = schema.field(0.0, least=0)  # of the dispersion
    block: int = schema.field(4, least=1, tiny=1)  # of the encoder, whose output both read
    target: str = schema.field("average", choices=("average", "network"))  # whose features are predicted
    # Of the target, whose output is predicted; behind its last block comes its final norm, if it has one.
    target_block: int = schema.field(8, least=1, tiny=2)
    network: vit.Config = vit.Config(input_norm=False)  # the frozen one; its images and patches must be the encoder's
    loss: str = schema.field("cosine", choices=("cosine", "smooth_l1"))  # of two patches' features; 1 - their cosine

    @property
    def tap(self) -> int:
        """The block whose output is needed; 0 = none."""
        return self.block if self.weight or self.dispersive_weight else 0

    def target_config(self, encoder: vit.Config) -> vit.Config:
        """Of the network whose features are predicted."""
        return encoder if self.target == "average" else self.network

    def check(self, encoder: vit.Config) -> None:
        """Raises ValueError, which begins with a field's name, unless this fits `encoder`."""
        target = self.target_config(encoder)
        if self.tap > encoder.depth:
            raise ValueError(f"block: {self.block}; the encoder has {encoder.depth} blocks")
        if self.weight and self.target_block > target.depth:
            raise ValueError(f"target_block: {self.target_block}; the target has {target.depth} blocks")
        for name in ("image_size", "patch_size"):
            own, other = (getattr(config, name) for config in (target, encoder))
            if self.weight and own != other:
                raise ValueError(f"network.{name}: {own}; use the encoder's, {other}")


class Head(nn.Module):
    """Features of a patch -> the target's: dense, SiLU, dense."""

    width: int  # of the target
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, features):
        """`features` [B,L,D] -> [B,L,width]."""
        hidden = nn.silu(layers.dense(2 * features.shape[-1], "fc1", self.dtype)(features))
        return layers.dense(self.width, "fc2", self.dtype)(hidden)


def distance(predicted, target, kind: str):
    """What `Config.loss` says, [B,L,D] twice -> float32, the mean over all patches. No gradient goes into `target`."""
    predicted, target = predicted.astype(jnp.float32), jax.lax.stop_gradient(target).astype(jnp.float32)
    if kind == "cosine":
        return 1 - (_unit(predicted) * _unit(target)).sum(-1).mean()
    error = jnp.abs(predicted - target)
    quadratic = 0.5 * error**2 / SMOOTH_L1_BETA
    return jnp.where(error < SMOOTH_L1_BETA, quadratic, error - 0.5 * SMOOTH_L1_BETA).mean()


def _unit(features):
    return features * jax.lax.rsqrt((features**2).sum(-1, keepdims=True) + 1e-12)


def dispersion(features):
    """Features [B,L,D] -> float32, at most 0: log of the mean of exp(-|z_i - z_j|^2 / D) over all pairs of the batch.

    z is an image's mean over its patches, which is what probes read. Departs from the published term, where z is the
    row of all patches: to compare those of 4096 images, each device would gather 1.6 GB (ViT-B, bfloat16).
    """
    pooled = features.mean(1, dtype=jnp.float32)
    pooled -= pooled.mean(0, keepdims=True)  # of like features the differences would drown in rounding
    square = (pooled**2).sum(-1)
    products = jnp.einsum("id,jd->ij", pooled, pooled, precision=jax.lax.Precision.HIGHEST)
    distances = jnp.maximum(square[:, None] + square[None] - 2 * products, 0) / pooled.shape[-1]
    return jax.nn.logsumexp(-distances) - 2 * jnp.log(len(pooled))

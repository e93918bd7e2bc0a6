"""The loss of semantic segmentation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from addp_jax.ops import resize

IGNORED = 255  # label of pixels that no loss and no metric counts


@jax.checkpoint  # else the softmax of every pixel is kept for the backward pass, beside its logits
def cross_entropy(logits: jax.Array, label: jax.Array, counted_only: jax.Array | bool = False) -> jax.Array:
    """Cross entropy of the classes of pixels, a float32 scalar.

    The sum over the pixels that count is divided by the number of all pixels of the batch, as in mmsegmentation.

    Args:
      logits: [B,h,w,C]; resized bilinearly to the labels.
      label: uint8 [B,H,W], 0 to C-1, or `IGNORED`.
      counted_only: divide by the number of the pixels that count (Hugging Face's UperNet); 0 if there are none.
    """
    logits = resize.bilinear(logits.astype(jnp.float32), label.shape[1:])
    counts = label != IGNORED
    own = label[..., None] == jnp.arange(logits.shape[-1])[None, None, None]  # no gather, whose gradient is a scatter
    losses = jax.nn.logsumexp(logits, axis=-1) - jnp.where(own, logits, 0).sum(-1)
    total = jnp.where(counts, losses, 0).sum()
    return total / jnp.where(counted_only, jnp.maximum(counts.sum(), 1), label.size)

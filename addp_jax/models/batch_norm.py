"""Batch normalisation whose running statistics lie among the parameters.

In training a module *sows* their new values into the collection `COLLECTION`, a tree like the parameters'. No gradient
reaches them and no optimizer moves them: `program.make_step` puts the new values in their places.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from addp_jax import errors, parameters

COLLECTION = "statistics"
MOMENTUM, EPS = 0.1, 1e-5  # of PyTorch
LAYOUT = ((r".*running_(mean|var)", ("replicated",)),)


class BatchNorm(nn.Module):
    """In float32. In training over the batch on all devices, else by the running statistics.

    As in PyTorch: the biased variance normalises, the unbiased one is averaged.
    """

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, features, train: bool):
        """[B,H,W,C] -> [B,H,W,C] in `dtype`."""
        shape = features.shape[-1:]
        starts = (nn.initializers.zeros, nn.initializers.ones)
        running = [self.param(name, start, shape) for name, start in zip(parameters.RUNNING, starts)]
        scale, bias = self.param("scale", nn.initializers.ones, shape), self.param("bias", nn.initializers.zeros, shape)
        mean, variance = map(jax.lax.stop_gradient, running)
        features = features.astype(jnp.float32)
        if train:
            count = features.size // shape[0]
            if count < 2:
                raise errors.UserError("batch_size: BatchNorm needs more than one value of each channel; use 2 images")
            mean = features.mean((0, 1, 2))
            variance = jnp.square(features - mean[None, None, None]).mean((0, 1, 2))
            for name, old, new in zip(parameters.RUNNING, running, (mean, variance * (count / (count - 1)))):
                new = jax.lax.stop_gradient(old + MOMENTUM * (new - old))
                self.sow(COLLECTION, name, new, init_fn=lambda: None, reduce_fn=lambda _, value: value)
        factor = scale * jax.lax.rsqrt(variance + EPS)
        features = (features - mean[None, None, None]) * factor[None, None, None] + bias[None, None, None]
        return features.astype(self.dtype)

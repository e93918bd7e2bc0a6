"""Dropout whose mask is a hash of each element's position: cheap to make, the same on every mesh."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

GOLDEN = 0x9E3779B9  # 2**32 / golden ratio: spreads consecutive columns over all 32 bits


class Dropout(nn.Module):
    """Sets each element to zero with probability `rate` in training, and scales the others up by 1 / (1 - rate)."""

    rate: float

    @nn.compact
    def __call__(self, inputs, train: bool):
        if self.rate == 0.0 or not train:
            return inputs
        return drop(inputs, self.make_rng("dropout"), self.rate)


def drop(inputs, key, rate: float):
    """`inputs` where they are kept, scaled up by 1 / (1 - rate), else 0."""
    return jnp.where(keep(key, rate, inputs.shape), inputs / jnp.asarray(1.0 - rate, inputs.dtype), 0)


def keep(key, rate: float, shape: tuple[int, ...]):
    """Bool `shape`, False with probability `rate`: a function of the key and of the position in the whole array alone.

    jax.random's generator costs ten times the arithmetic, which on a TPU is a quarter of a training step, and its cheap
    one ("unsafe_rbg") is not partitioned: every device would make the mask of the global batch. Here a row's position
    (all axes but the last) is hashed to two words and only one short round is left for each element; XLA fuses it into
    the matrix product next to it, and makes it again in the backward pass instead of storing it, under any remat.
    """
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    row = jnp.zeros((*shape[:-1], 1), jnp.uint32)
    for axis in range(len(shape) - 1):
        stride = math.prod(shape[axis + 1 : -1])
        row = row + jax.lax.broadcasted_iota(jnp.uint32, row.shape, axis) * jnp.uint32(stride)
    start = _mixed(_mixed(row ^ first) ^ second)
    salt = _mixed(start + jnp.uint32(GOLDEN))
    column = jax.lax.broadcasted_iota(jnp.uint32, (1,) * (len(shape) - 1) + shape[-1:], len(shape) - 1)
    bits = start + column * jnp.uint32(GOLDEN)
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15) ^ salt) * jnp.uint32(0x846CA68B)
    return bits >= jnp.uint32(round(rate * 2**32))


def _mixed(bits):
    """Every bit of each uint32 changes about half of the result's bits (the finalizer `lowbias32`)."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits ^ (bits >> 16)

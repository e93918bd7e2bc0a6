"""What the rest of the program knows of a sampler. Adding a sampler adds one file here and edits none.

A sampler file has a frozen, hashable `Config` and two functions:

    segments(config, length, mask_ratio) -> [(static, at), ...]   numpy schedules, made before tracing;
                                     `static` is compiled in, `at` holds arrays with a leading step axis
    step(nets, config, static, carry, at, noise) -> carry         one step, deterministic given its noise

`sample` below is the loop, the same for all. Every image has its own key: its draws do not depend on
the batch it is in.
"""

from __future__ import annotations

from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp

from addp_jax import diffusion, errors, partition


class Nets(NamedTuple):
    """The networks as functions, parameters bound."""

    encode: Callable  # image [B,H,W,3] -> token_ids [B,L]
    predict: Callable  # (image [B,H,W,3], token_ids [B,L], mask [B,L], capacity) -> logits [B,L,K]
    decode: Callable  # latents [B,L,Z] -> image [B,H,W,3]
    codebook: jax.Array  # [K,Z]


class Noise(NamedTuple):
    """Standard Gumbel noise of one step."""

    tokens: jax.Array  # [B,L,K]: the argmax of logits + noise is a draw from their softmax
    confidence: jax.Array  # [B,L]


class Carry(NamedTuple):
    """What one step hands to the next."""

    image: jax.Array  # float32 [B,H,W,3], decoded from the tokens, not clipped
    token_ids: jax.Array  # int32 [B,L]; final where mask is False
    mask: jax.Array  # bool [B,L], True = still unknown


def check_schedule(schedule: str, steps: int) -> None:
    """Raises UserError unless `diffusion` knows the schedule and there is a step."""
    if schedule not in diffusion.SCHEDULES:
        raise errors.UserError(f"config.model.sampler.schedule: {schedule!r}; use {' or '.join(diffusion.SCHEDULES)}")
    if steps < 1:
        raise errors.UserError(f"config.model.sampler.steps: {steps}; use at least 1")


def draw_noise(keys: jax.Array, at_step: jax.Array, length: int, num_codes: int) -> Noise:
    """Each image's own noise for this step: a function of its key and the step's number alone."""

    def one(key):
        token_key, confidence_key = jax.random.split(jax.random.fold_in(key, at_step))
        return Noise(jax.random.gumbel(token_key, (length, num_codes)), jax.random.gumbel(confidence_key, (length,)))

    return jax.vmap(one)(keys)


def sample(sampler, config, nets: Nets, keys, carry: Carry, mask_ratio: float, keep_frames: bool = False):
    """Run all steps. Call it under `jax.jit`: the whole loop is one program.

    Args:
      sampler: a sampler module.
      keys: typed PRNG keys `[B]`.
      carry: the start; each row of its mask has `diffusion.start_num_masked(L, mask_ratio)` True entries.
      keep_frames: also return the image after each step that was run, `[<=T,B,H,W,3]`, else None.
    """
    length, num_codes = carry.mask.shape[1], nets.codebook.shape[0]
    frames = []
    for static, at in sampler.segments(config, length, mask_ratio):

        def body(carry, at, static=static):
            noise = draw_noise(keys, at.step, length, num_codes)
            carry = sampler.step(nets, config, static, carry, at, noise)
            return carry, carry.image if keep_frames else None

        carry, images = jax.lax.scan(body, carry, jax.tree.map(jnp.asarray, at))
        frames.append(images)
    return carry, jnp.concatenate(frames) if keep_frames else None


def start(nets: Nets, keys, image, mask_ratio: float) -> Carry:
    """The first carry: tokens of `image` [B,H,W,3], of which a random `mask_ratio` is hidden (1 = all, the image counts for nothing)."""
    shape = jax.eval_shape(nets.encode, image).shape
    token_ids = nets.encode(image) if mask_ratio < 1 else jnp.zeros(shape, jnp.int32)
    num_masked = diffusion.start_num_masked(shape[1], mask_ratio)
    mask_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, jnp.uint32(2**32 - 1))  # steps use 0..T-1
    return Carry(image, token_ids, diffusion.draw_masks(mask_keys, shape[1], num_masked))


def unconditional(task, count: int):
    """Jitted `(params, frozen, key) -> [N,H,W,3]`: `count` samples, clipped to [0,1]. Make it once: it is compiled once.

    `task` has `nets`, `sampler` and `sampler_config`.
    """

    @jax.jit
    def run(params, frozen, key):
        nets, keys = task.nets(params, frozen), jax.random.split(key, count)
        size = task.config.tokenizer.image_size
        carry = start(nets, keys, jnp.zeros((count, size, size, 3)), 1.0)
        carry, _ = sample(task.sampler, task.sampler_config, nets, keys, carry, 1.0)
        return partition.replicate(jnp.clip(carry.image, 0, 1))

    return run


def per_device(task, mask_ratio: float, mesh):
    """`((params, frozen), (keys [B], images [B,H,W,3])) -> uint8 [B,H,W,3]`; each device samples its own images."""

    def run(nets_params, batch):
        nets = task.nets(*nets_params)
        carry = start(nets, *batch, mask_ratio)
        carry, _ = sample(task.sampler, task.sampler_config, nets, batch[0], carry, mask_ratio)
        return to_uint8(carry.image)

    return partition.per_device(run, mesh)


def to_uint8(image: jax.Array) -> jax.Array:
    """[0,1] -> 0..255, truncated as the release does (0.999 -> 254)."""
    return jnp.clip(image * 255, 0, 255).astype(jnp.uint8)

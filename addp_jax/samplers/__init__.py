"""What the rest of the program knows of a sampler. Adding a sampler adds one file here and edits none.

A sampler file has a frozen, hashable `Config`, derived from the one below, whose `name` is the file's, and the functions of
`Sampler`.

`sample` below is the loop, the same for all. Every image has its own key: its draws do not depend on
the batch it is in.
"""

from __future__ import annotations

import copy
from typing import Any, Callable, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from addp_jax import codecs, diffusion, partition, schema
from addp_jax.ops import images


class Nets(NamedTuple):
    """The networks as functions, parameters bound."""

    encode: Callable  # image [B,H,W,3] -> token_ids [B,L]
    predict: Callable  # (image [B,H,W,3], token_ids [B,L], mask bool [B,L], capacity) -> logits [B,L,K]
    decode: Callable  # latents [B,L,Z] -> image [B,H,W,3]
    codebook: jax.Array  # [K,Z]


class Sampler(Protocol):
    """A sampler's module."""

    def segments(self, config: Config, length: int, mask_ratio: float, fewest: int | None = None) -> list[tuple[Any, Any]]:
        """[(static, at), ...]: schedules as numpy arrays, made before tracing.

        `static` is compiled in, `at` a NamedTuple of arrays with a leading step axis, among them `step` and `num_masked`.
        """
        ...

    def step(self, nets: Nets, config: Config, static: Any, carry: Carry, at: Any, noise: Noise) -> Carry:
        """One step, deterministic given its noise."""
        ...


class Noise(NamedTuple):
    """Standard Gumbel noise of one step."""

    tokens: jax.Array  # [B,L,K]: the argmax of logits + noise is a draw from their softmax
    confidence: jax.Array  # [B,L]


class Carry(NamedTuple):
    """What one step hands to the next."""

    image: jax.Array  # float32 [B,H,W,3], decoded from the tokens, not clipped
    token_ids: jax.Array  # int32 [B,L]; final where mask is False
    mask: jax.Array  # bool [B,L], True = still unknown


@schema.config
class Config(schema.Named):
    """How tokens are drawn."""

    PACKAGE = __name__

    steps: int = schema.field(20, least=1)  # T
    # How the masked tokens become fewer, r the share of the steps done. cosine: cos(pi/2 r) | linear: 1 - r |
    # sqrt: 1 - sqrt(r) | constant: L^-r, the same share of what is left in each step
    schedule: str = schema.field("cosine", choices=diffusion.SCHEDULES)
    temperature: float = schema.field(6.0, least=0)  # of the noise on the confidence
    annealed: bool = True  # temperature falls linearly to 0 (the release's "dynamic"); else constant
    top_p: float = schema.field(1.0, above=0, most=1)  # nucleus of the token draw; 1 = all codes
    top_k: int = schema.field(0, least=0)  # most probable codes that are drawn from, before the nucleus; 0 = all codes
    name: str = "alternating"  # a file in addp_jax/samplers


def bind(predict: Callable, codec: codecs.Codec) -> Nets:
    """The nets of a network's `predict` and its tokenizer."""
    return Nets(codec.encode, predict, codec.decode, codec.codebook)


def allowed(logits: jax.Array, config: Config) -> jax.Array:
    """`logits` [B,L,K] with those of the codes that may not be drawn at -inf."""
    return diffusion.keep_nucleus(diffusion.keep_top(logits, config.top_k), config.top_p)


def draw_noise(keys: jax.Array, at_step: jax.Array, length: int, num_codes: int) -> Noise:
    """Each image's own noise for this step: a function of its key and the step's number alone."""

    def one(key):
        token_key, confidence_key = jax.random.split(jax.random.fold_in(key, at_step))
        return Noise(jax.random.gumbel(token_key, (length, num_codes)), jax.random.gumbel(confidence_key, (length,)))

    return jax.vmap(one)(keys)


def sample(sampler, config, nets: Nets, keys, carry: Carry, mask_ratio: float, fewest: int | None = None, keep=None):
    """Run all steps. Call it under `jax.jit`: the whole loop is one program.

    Args:
      sampler: a sampler module.
      keys: typed PRNG keys `[B]`.
      carry: the start; each row of its mask has `diffusion.start_num_masked(L, mask_ratio)` True entries.
      fewest: each row has its own number of True entries instead, none fewer than this, and its own schedule: the
        sampler's `num_masked` at a step is a table `[L+1]` over that number.
      keep: what to keep of the carry after each step.
    Returns:
      the last carry, and what was kept, with a leading axis of the steps that were run, <=T; None without `keep`.
    """
    length, num_codes = carry.mask.shape[1], nets.codebook.shape[0]
    unknown, kept = carry.mask.sum(-1, keepdims=True), []
    for static, at in sampler.segments(config, length, mask_ratio, fewest):

        def body(carry, at, static=static):
            noise = draw_noise(keys, at.step, length, num_codes)
            at = at if fewest is None else at._replace(num_masked=at.num_masked[unknown])
            carry = sampler.step(nets, config, static, carry, at, noise)
            return carry, keep(carry) if keep else None

        carry, parts = jax.lax.scan(body, carry, jax.tree.map(jnp.asarray, at))
        kept.append(parts)
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *kept) if keep else None


def start(nets: Nets, keys, image, mask_ratio: float) -> Carry:
    """The first carry: tokens of `image` [B,H,W,3], of which a random `mask_ratio` is hidden (1 = all, the image counts for nothing).

    As in the release, the encoder sees the whole image in the first step.
    """
    shape = jax.eval_shape(nets.encode, image).shape
    token_ids = nets.encode(image) if mask_ratio < 1 else jnp.zeros(shape, jnp.int32)
    num_masked = diffusion.start_num_masked(shape[1], mask_ratio)
    mask_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, jnp.uint32(2**32 - 1))  # steps use 0..T-1
    return Carry(image, token_ids, diffusion.draw_masks(mask_keys, shape[1], num_masked))


def start_with(nets: Nets, image, mask) -> Carry:
    """The first carry: tokens of `image` [B,H,W,3], of which `mask` [B,L] are hidden.

    The pixels under the mask are hidden from the encoder as well: it sees what is expected there when nothing is known.
    """
    token_ids = nets.encode(image)
    expected = jax.nn.softmax(nets.predict(image, token_ids, jnp.ones_like(mask), 0))
    return Carry(nets.decode(diffusion.mix_latents(expected, token_ids, mask, nets.codebook)), token_ids, mask)


def reconstruct(nets: Nets, image):
    """Encode and decode: `image` [B,H,W,3] -> [B,H,W,3], not clipped."""
    return nets.decode(nets.codebook[nets.encode(image)])


def unconditional(task, count: int):
    """Jitted `(params, frozen, key) -> [N,H,W,3]`: `count` samples, clipped to [0,1]. Make it once: it is compiled once.

    task: a `tasks.Generator`.
    """

    @jax.jit
    def run(params, frozen, key):
        nets, keys = task.nets(params, frozen), jax.random.split(key, count)
        carry = start(nets, keys, jnp.zeros((count, task.image_size, task.image_size, 3)), 1.0)
        carry, _ = sample(task.sampler, task.sampler_config, nets, keys, carry, 1.0)
        return partition.replicate(jnp.clip(carry.image, 0, 1))

    return run


def drawing(task, mesh, mask_ratio: float = 1.0, fewest: int | None = None, frames: bool = False):
    """Jitted `((params, frozen, key), batch) -> uint8 [B,H,W,3]`, or [B,<=T,H,W,3], the images after each step.

    Each device draws its own images. A batch holds `number` [B]: the draws of an image depend on it and on the key. Images
    that start from others have these as `image` uint8 [B,H,W,3], and if it is given what of them is hidden, `mask` [B,L].

    task: a `tasks.Generator`. mask_ratio, fewest: of `sample`; a ratio of 0 gives reconstructions.
    """

    def run(networks, batch):
        *networks, key = networks
        nets, size = task.nets(*networks), task.image_size
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["number"])
        image = images.to_unit(batch["image"]) if "image" in batch else jnp.zeros((len(keys), size, size, 3))
        if mask_ratio == 0:
            done = images.to_uint8(reconstruct(nets, image))
            return done[:, None] if frames else done
        carry = start_with(nets, image, batch["mask"]) if "mask" in batch else start(nets, keys, image, mask_ratio)
        keep = (lambda carry: images.to_uint8(carry.image)) if frames else None
        carry, steps = sample(task.sampler, task.sampler_config, nets, keys, carry, mask_ratio, fewest, keep)
        return steps.swapaxes(0, 1) if frames else images.to_uint8(carry.image)

    return jax.jit(partition.per_device(run, mesh))


def with_sampler(task, changes: dict):
    """`task` with other fields of its sampler; with another `name`, another sampler. Raises UserError naming a wrong one."""
    task, fields = copy.copy(task), schema.fields(task.sampler_config) | changes
    task.sampler_config = schema.build(Config, fields, "config.model.sampler")
    task.sampler = schema.module_of(task.sampler_config)
    return task

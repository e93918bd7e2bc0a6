"""What the rest of the program knows of a sampler. Adding a sampler adds one file here and edits none.

A sampler file has a frozen, hashable `Config`, derived from the one below, whose `name` is the file's, and the functions of
`Sampler`.

`sample` below is the loop, the same for all. Every image has its own key: its draws do not depend on the batch it is in.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any, Callable, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from addp_jax import codecs, diffusion, files, partition, schema
from addp_jax.ops import images, unmasking

PER_STEP = ("schedule", "temperature", "token_temperature", "guidance", "remask")  # fields that may be lists
VALUES = ("steps", "annealed", "schedule_file", *PER_STEP)  # what a compiled sampler takes as arrays
START, ROLL = 2**32 - 1, 2**32 - 2  # folded into an image's key for what belongs to no step; steps use 0..T-1


class Nets(NamedTuple):
    """The networks as functions, parameters bound."""

    encode: Callable  # image [B,H,W,3] -> token_ids [B,L]
    predict: Callable  # (image [B,H,W,3], token_ids [B,L], mask bool [B,L], capacity) -> logits [B,L,K]
    decode: Callable  # latents [B,L,Z] -> image [B,H,W,3]
    codebook: jax.Array  # [K,Z]
    mapping: str = "expected"  # what the next image shows of unknown tokens, of `diffusion.MAPPINGS`
    prior: Any = None  # logits [1,L,K] when nothing is known, where the sampler asks for them


class Sampler(Protocol):
    """A sampler's module."""

    def segments(self, config: Config, length: int, mask_ratio: float, fewest: int | None = None) -> list[tuple[Any, Any]]:
        """[(static, at), ...]: schedules as numpy arrays, made before tracing.

        `static` is compiled in, `at` a NamedTuple of arrays with a leading step axis, among them `step` and `num_masked`.
        """
        ...

    def step(self, nets: Nets, config: Config, static: Any, carry: Carry, at: Any, noise: Noise) -> Carry:
        """One step, deterministic given its noise. What `config` holds of VALUES, it reads from `at`."""
        ...


class Noise(NamedTuple):
    """Standard Gumbel noise of one step."""

    tokens: jax.Array  # [B,L,K]: the argmax of logits + noise is a draw from their softmax
    confidence: jax.Array  # [B,L]
    roll: Any = None  # int32 [B,1], 0..L-1, uniform and the same in every step


class Carry(NamedTuple):
    """What one step hands to the next."""

    image: jax.Array  # float32 [B,H,W,3], decoded from the tokens, not clipped
    token_ids: jax.Array  # int32 [B,L]; final where mask is False
    mask: jax.Array  # bool [B,L], True = still unknown
    drawn: Any = None  # bool [B,L], True = unknown at the start: what `remask` may hide again; None without it


class At(NamedTuple):
    """The schedule at one step."""

    step: np.ndarray  # 0..T-1
    num_masked: np.ndarray  # after the step; see `sample`
    temperature: np.ndarray
    token_temperature: Any = None  # None = 1
    guidance: Any = None  # None = 0, as
    remask: Any = None


@schema.config
class Config(schema.Named):
    """How tokens are drawn."""

    PACKAGE = __name__

    # What may be a number or a text: T numbers, or a rule; "linear 2 0.5" falls from 2 to 0.5 as that schedule does.
    steps: int = schema.field(20, least=1)  # T
    # How the masked tokens become fewer, r the share of the steps done. cosine: cos(pi/2 r) | linear: 1 - r |
    # sqrt: 1 - sqrt(r) | arccos: 2/pi arccos(r) | constant: L^-r, the same share of what is left in each step.
    # Or T numbers: how many of the L tokens are masked after each step; the last one is 0 or, as by the rules, 1.
    schedule: str | tuple[int, ...] = schema.field("cosine", least=0)
    temperature: float | str | tuple[float, ...] = schema.field(6.0, least=0)  # of the noise on the confidence
    annealed: bool = True  # a temperature that is one number falls linearly to 0 (the release's "dynamic"); else constant
    top_p: float = schema.field(1.0, above=0, most=1)  # nucleus of the token draw; 1 = all codes
    top_k: int = schema.field(0, least=0)  # most probable codes that are drawn from, before the nucleus; 0 = all codes
    order: str = schema.field("confidence", choices=unmasking.ORDERS)  # in which tokens become known
    token_temperature: float | str | tuple[float, ...] = schema.field(1.0, least=0)  # of the token draw; 0 = the likeliest
    guidance: float | str | tuple[float, ...] = schema.field(0.0, least=0)  # w of l + w (l - l_0), l_0: nothing is known
    remask: float | str | tuple[float, ...] = schema.field(0.0, least=0, most=1)  # ReMDM's cap: drawn tokens hidden again
    schedule_file: str = ""  # of mode `search`; its fields come before those here
    name: str = "alternating"  # a file in addp_jax/samplers

    def __post_init__(self):
        for entry in dataclasses.fields(self):
            if entry.name in PER_STEP[1:]:
                try:
                    values = diffusion.per_step(getattr(self, entry.name), self.steps)
                except ValueError as error:
                    raise ValueError(f"{entry.name}: {error}") from error
                schema.check_range(tuple(values.tolist()), entry)
        unmasking.check_schedule(self.schedule, self.steps)


def bind(predict: Callable, codec: codecs.Codec, mapping: str = "expected") -> Nets:
    """The nets of a network's `predict` and its tokenizer."""
    return Nets(codec.encode, predict, codec.decode, codec.codebook, mapping)


def allowed(logits: jax.Array, config: Config) -> jax.Array:
    """`logits` [B,L,K] with those of the codes that may not be drawn at -inf."""
    return diffusion.keep_nucleus(diffusion.keep_top(logits, config.top_k), config.top_p)


def guided(nets: Nets, logits: jax.Array, at: At) -> jax.Array:
    return logits if at.guidance is None else logits + at.guidance * (logits - nets.prior)


def draw_tokens(config: Config, logits: jax.Array, carry: Carry, at: At, noise: Noise) -> jax.Array:
    """Tokens [B,L] where they are unknown from softmax(logits / temperature), of the codes that are `allowed`."""
    scaled = noise.tokens if at.token_temperature is None else at.token_temperature * noise.tokens
    return jnp.where(carry.mask, jnp.argmax(allowed(logits, config) + scaled, axis=-1), carry.token_ids)


def next_mask(config: Config, logits: jax.Array, token_ids: jax.Array, carry: Carry, at: At, noise: Noise) -> jax.Array:
    """bool [B,L]: what stays unknown, by the order; with `remask` as many of the tokens drawn in earlier steps are hidden
    again, at random, as more of the others become known."""
    scores = unmasking.ORDERS[config.order](logits, token_ids, at.temperature, noise.confidence, noise.roll)
    if at.remask is None:
        return diffusion.hide_lowest(scores, carry.mask, at.num_masked)
    return unmasking.hide_again(scores, carry.mask, at.num_masked, carry.drawn & ~carry.mask, at.remask, noise.confidence)


def schedule(config: Config, num_masked: np.ndarray) -> At:
    """All steps: [T,...] each. num_masked: after them."""
    if isinstance(config.temperature, (int, float)):
        temperature = diffusion.annealing(config.temperature, config.steps, config.annealed)
    else:
        temperature = diffusion.per_step(config.temperature, config.steps)
    option = lambda value, neutral: None if value == neutral else diffusion.per_step(value, config.steps)
    options = option(config.token_temperature, 1), option(config.guidance, 0), option(config.remask, 0)
    return At(np.arange(config.steps), num_masked, temperature, *options)


def draw_noise(keys: jax.Array, at_step: jax.Array, length: int, num_codes: int) -> Noise:
    """Each image's own noise for this step: a function of its key and the step's number alone."""

    def one(key):
        token_key, confidence_key = jax.random.split(jax.random.fold_in(key, at_step))
        roll = jax.random.randint(jax.random.fold_in(key, jnp.uint32(ROLL)), (1,), 0, length)
        return Noise(jax.random.gumbel(token_key, (length, num_codes)), jax.random.gumbel(confidence_key, (length,)), roll)

    return jax.vmap(one)(keys)


def prepared(nets: Nets, carry: Carry, at) -> tuple[Nets, Carry]:
    """`nets` and the first carry with what the options in the schedule `at` ask for."""
    if not isinstance(at, At) or at.guidance is at.remask is None:
        return nets, carry
    prior = nets.predict(carry.image[:1], carry.token_ids[:1], jnp.ones_like(carry.mask[:1]), 0)
    return nets._replace(prior=prior), carry if at.remask is None else carry._replace(drawn=carry.mask)


def sample(
    sampler, config, nets: Nets, keys, carry: Carry, mask_ratio: float, fewest: int | None = None, keep=None, segments=None
):
    """Run all steps. Call it under `jax.jit`: the whole loop is one program.

    Args:
      sampler: a sampler module.
      keys: typed PRNG keys `[B]`.
      carry: the start; each row of its mask has `diffusion.start_num_masked(L, mask_ratio)` True entries.
      fewest: each row has its own number of True entries instead, none fewer than this, and its own schedule: the
        sampler's `num_masked` at a step is a table `[L+1]` over that number.
      keep: what to keep of the carry after each step.
      segments: the sampler's, if they were made before.
    Returns:
      the last carry, and what was kept, with a leading axis of the steps that were run, <=T; None without `keep`.
    """
    length, num_codes = carry.mask.shape[1], nets.codebook.shape[0]
    unknown, kept = carry.mask.sum(-1, keepdims=True), []
    segments = segments or sampler.segments(config, length, mask_ratio, fewest)
    nets, carry = prepared(nets, carry, segments[0][1])
    for static, at in segments:

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
    mask_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, jnp.uint32(START))
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
    """Compiled `((params, frozen, key), batch) -> uint8 [B,H,W,3]`, or [B,<=T,H,W,3], the images after each step.

    A third argument is another `config` of the sampler, which differs from the task's in VALUES only. Each device draws its own images. A batch holds `number` [B]: the draws of an image depend on it and on the key. Images
    that start from others have these as `image` uint8 [B,H,W,3], and if it is given what of them is hidden, `mask` [B,L].

    task: a `tasks.Generator`. mask_ratio, fewest: of `sample`; a ratio of 0 gives reconstructions.
    """

    def run(statics, networks, batch):
        *networks, key, schedules = networks
        nets, size = task.nets(*networks), task.image_size
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["number"])
        image = images.to_unit(batch["image"]) if "image" in batch else jnp.zeros((len(keys), size, size, 3))
        if mask_ratio == 0:
            done = images.to_uint8(reconstruct(nets, image))
            return done[:, None] if frames else done
        carry = start_with(nets, image, batch["mask"]) if "mask" in batch else start(nets, keys, image, mask_ratio)
        keep = (lambda carry: images.to_uint8(carry.image)) if frames else None
        parts = list(zip(statics, schedules))
        carry, steps = sample(task.sampler, task.sampler_config, nets, keys, carry, mask_ratio, fewest, keep, parts)
        return steps.swapaxes(0, 1) if frames else images.to_uint8(carry.image)

    program = jax.jit(lambda statics, *args: partition.per_device(functools.partial(run, statics), mesh)(*args), static_argnums=0)
    length = task.config.tokenizer.length
    segments = functools.cache(lambda config: tuple(zip(*task.sampler.segments(config, length, mask_ratio, fewest))))

    def draw(networks, batch, config=task.sampler_config):
        statics, schedules = segments(config)
        return program(statics, (*networks, schedules), batch)

    return draw


def with_sampler(task, changes: dict):
    """`task` with other fields of its sampler; with another `name`, another sampler. Raises UserError naming a wrong one."""
    task, fields = copy.copy(task), schema.fields(task.sampler_config) | changes
    task.sampler, task.sampler_config = chosen(schema.build(Config, fields, "config.model.sampler"))
    return task


def chosen(config: Config) -> tuple[Sampler, Config]:
    """The sampler, and its config with the fields of the `schedule_file`, if any. Raises UserError naming that file."""
    if path := config.schedule_file:
        with files.explain(f"config.model.sampler.schedule_file: cannot read {path}", OSError, ValueError, TypeError):
            fields = schema.fields(config) | dict(files.read_json(path)) | {"schedule_file": ""}
        config = schema.build(Config, fields, path)
    return schema.module_of(config), config

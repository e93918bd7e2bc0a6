"""MAGE / MaskGIT decoding: the token predictor alone, no pixels in the loop. The baseline of the alternating sampler."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from addp_jax import diffusion, samplers
from addp_jax.samplers import Carry, Nets, Noise


@dataclasses.dataclass(frozen=True)
class Config(samplers.Config):
    """The defaults are MAGE's (gen_img_uncond.py)."""

    name: str = "token_only"


class At(NamedTuple):
    """The schedule at one step."""

    step: np.ndarray  # 0..T-1
    num_masked: np.ndarray  # after the step; 0 after the last; see samplers.sample
    temperature: np.ndarray


def step(nets: Nets, config: Config, last: bool, carry: Carry, at: At, noise: Noise) -> Carry:
    """Predict all unknown tokens, keep the most confident. Pixels are decoded once, in the last step."""
    logits = nets.predict(carry.image, carry.token_ids, carry.mask, 0)
    drawn = jnp.argmax(samplers.allowed(logits, config) + noise.tokens, axis=-1)
    token_ids = jnp.where(carry.mask, drawn, carry.token_ids)
    confidence_noise = at.temperature * noise.confidence
    mask = diffusion.least_confident(logits, token_ids, carry.mask, confidence_noise, at.num_masked)
    image = nets.decode(nets.codebook[token_ids]) if last else carry.image
    return Carry(image, token_ids, mask)


def num_masked_after(config: Config, num_masked: int) -> np.ndarray:
    """Tokens masked after each step, int32 `[T]`: floor, but each step reveals at least one and leaves one; 0 at the end."""
    counts, unknown = [], num_masked
    for index in range(config.steps - 1):
        ratio = diffusion.SCHEDULES[config.schedule]((index + 1) / config.steps, max(num_masked, 1))
        unknown = max(1, min(unknown - 1, int(np.floor(num_masked * ratio))))
        counts.append(min(unknown, num_masked))
    return np.array(counts + [0], np.int32)


def segments(config: Config, length: int, mask_ratio: float, fewest: int | None = None) -> list[tuple[bool, At]]:
    """All steps but the last, then the last: `[(False, At), (True, At)]`. `mask_ratio`, `fewest`: see `samplers.sample`."""
    if fewest is None:
        after = num_masked_after(config, diffusion.start_num_masked(length, mask_ratio))
    else:
        after = np.stack([num_masked_after(config, unknown) for unknown in range(length + 1)], axis=1)
    at = At(np.arange(config.steps), after, diffusion.annealing(config.temperature, config.steps, config.annealed))
    parts = [(False, At(*(entry[:-1] for entry in at))), (True, At(*(entry[-1:] for entry in at)))]
    return [(last, part) for last, part in parts if len(part.step)]

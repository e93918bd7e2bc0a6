"""MAGE / MaskGIT decoding: the token predictor alone, no pixels in the loop. The baseline of the alternating sampler."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from addp_jax import diffusion, samplers
from addp_jax.ops import unmasking
from addp_jax.samplers import At, Carry, Nets, Noise


@dataclasses.dataclass(frozen=True)
class Config(samplers.Config):
    """The defaults are MAGE's (gen_img_uncond.py)."""

    name: str = "token_only"


def step(nets: Nets, config: Config, last: bool, carry: Carry, at: At, noise: Noise) -> Carry:
    """Predict all unknown tokens, keep the first of the order. Pixels are decoded once, in the last step."""
    logits = samplers.guided(nets, nets.predict(carry.image, carry.token_ids, carry.mask, 0), at)
    token_ids = samplers.draw_tokens(config, logits, carry, at, noise)
    mask = samplers.next_mask(config, logits, token_ids, carry, at, noise)
    image = nets.decode(nets.codebook[token_ids]) if last else carry.image
    return carry._replace(image=image, token_ids=token_ids, mask=mask)


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
    start = diffusion.start_num_masked(length, mask_ratio)
    if isinstance(config.schedule, tuple):
        after = unmasking.listed_num_masked(config.schedule, length, start if fewest is None else np.arange(length + 1))
        after[-1] = 0
    elif fewest is None:
        after = num_masked_after(config, start)
    else:
        after = np.stack([num_masked_after(config, unknown) for unknown in range(length + 1)], axis=1)
    at = samplers.schedule(config, after)
    parts = [(last, jax.tree.map(lambda entry: entry[part], at)) for last, part in ((False, slice(-1)), (True, slice(-1, None)))]
    return [(last, part) for last, part in parts if len(part.step)]

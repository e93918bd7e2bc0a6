"""The alternating sampler: pixels -> token distribution -> tokens and pixels, T times (paper, Figure 5a).

`step` is the paper's algorithm; everything else is schedule.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from addp_jax import diffusion, samplers
from addp_jax.samplers import Carry, Nets, Noise

MAX_SEGMENTS = 4  # the scan is cut where a smaller decoder capacity suffices; each cut is one more compilation


@dataclasses.dataclass(frozen=True)
class Config(samplers.Config):
    """The defaults are the release's (main_generate.py)."""

    name: str = "alternating"


class At(NamedTuple):
    """The schedule at one step."""

    step: np.ndarray  # 0..T-1
    num_masked: np.ndarray  # after the step; see samplers.sample
    temperature: np.ndarray


def step(nets: Nets, config: Config, capacity: int, carry: Carry, at: At, noise: Noise) -> Carry:
    """One alternation. `capacity`: decoder slots for known tokens; 0 = everything is masked, the image is not read."""
    # pixels -> tokens
    logits = nets.predict(carry.image, carry.token_ids, carry.mask, capacity)
    drawn = jnp.argmax(samplers.allowed(logits, config) + noise.tokens, axis=-1)
    token_ids = jnp.where(carry.mask, drawn, carry.token_ids)

    # keep the most confident tokens
    confidence_noise = at.temperature * noise.confidence
    mask = diffusion.least_confident(logits, token_ids, carry.mask, confidence_noise, at.num_masked)

    # tokens -> pixels: expected code where still masked, hard code elsewhere
    latents = diffusion.mix_latents(jax.nn.softmax(logits), token_ids, mask, nets.codebook)
    return Carry(nets.decode(latents), token_ids, mask)


def segments(config: Config, length: int, mask_ratio: float, fewest: int | None = None) -> list[tuple[int, At]]:
    """The steps, grouped by decoder capacity: `[(capacity, At with a leading step axis), ...]`.

    Leading steps after which everything is still masked leave no trace (their draws are made anew), so they are left out.
    `mask_ratio`, `fewest`: of the start; see `samplers.sample`.
    """
    if fewest is None:
        after = counts = diffusion.sampling_num_masked(config.schedule, config.steps, length, mask_ratio)
        fewest = diffusion.start_num_masked(length, mask_ratio)
    else:
        counts = diffusion.num_masked_by_start(config.schedule, config.steps, length)
        after = counts[:, fewest]  # of the image of which most is known
    at = At(np.arange(config.steps), counts, diffusion.annealing(config.temperature, config.steps, config.annealed))
    known = length - np.concatenate([[fewest], after[:-1]])
    first = int(np.sum(after == length))
    at, known = At(*(entry[first:] for entry in at)), known[first:]
    groups = [part for part in np.array_split(np.flatnonzero(known), MAX_SEGMENTS - 1) if len(part)]
    groups = [part for part in (np.flatnonzero(known == 0),) if len(part)] + groups
    return [(int(known[part].max()), At(*(entry[part] for entry in at))) for part in groups]

"""The alternating sampler: pixels -> token distribution -> tokens and pixels, T times (paper, Figure 5a).

`step` is the paper's algorithm; everything else is schedule.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from addp_jax import diffusion, samplers
from addp_jax.ops import unmasking
from addp_jax.samplers import At, Carry, Nets, Noise

MAX_SEGMENTS = 4  # the scan is cut where a smaller decoder capacity suffices; each cut is one more compilation
ROOMS = 4  # so many capacities there are where the schedule is a list: most lists share a program


@dataclasses.dataclass(frozen=True)
class Config(samplers.Config):
    """The defaults are the release's (main_generate.py)."""

    name: str = "alternating"


def step(nets: Nets, config: Config, capacity: int, carry: Carry, at: At, noise: Noise) -> Carry:
    """One alternation. `capacity`: decoder slots for known tokens; 0 = everything is masked, the image is not read."""
    # pixels -> tokens
    logits = samplers.guided(nets, nets.predict(carry.image, carry.token_ids, carry.mask, capacity), at)
    token_ids = samplers.draw_tokens(config, logits, carry, at, noise)

    # keep the first tokens of the order, by default the most confident ones
    mask = samplers.next_mask(config, logits, token_ids, carry, at, noise)

    # tokens -> pixels: expected code where still masked, hard code elsewhere
    if at.remask is not None:  # the network was not trained to predict tokens that it is told
        logits = jnp.where(carry.mask[..., None], logits, nets.prior)
    shown = mask if nets.mapping == "expected" else jnp.zeros_like(mask)  # as expected codes
    latents = diffusion.mix_latents(jax.nn.softmax(logits), token_ids, shown, nets.codebook)
    return carry._replace(image=nets.decode(latents), token_ids=token_ids, mask=mask)


def segments(config: Config, length: int, mask_ratio: float, fewest: int | None = None) -> list[tuple[int, At]]:
    """The steps, grouped by decoder capacity: `[(capacity, At with a leading step axis), ...]`.

    Leading steps after which everything is still masked leave no trace (their draws are made anew), so they are left out.
    `mask_ratio`, `fewest`: of the start; see `samplers.sample`.
    """
    start, listed = diffusion.start_num_masked(length, mask_ratio), isinstance(config.schedule, tuple)
    unknown = start if fewest is None else np.arange(length + 1)
    if listed:
        counts = unmasking.listed_num_masked(config.schedule, length, unknown)
    elif fewest is None:
        counts = diffusion.sampling_num_masked(config.schedule, config.steps, length, mask_ratio)
    else:
        counts = diffusion.num_masked_by_start(config.schedule, config.steps, length)
    after = counts if fewest is None else counts[:, fewest]  # of the image of which most is known
    known = length - np.concatenate([[start if fewest is None else fewest], after[:-1]])
    if listed:
        room = -(-length // ROOMS)
        known = np.minimum(-(-known // room) * room, length)
    first = int(np.sum(after == length))
    at, known = jax.tree.map(lambda entry: entry[first:], samplers.schedule(config, counts)), known[first:]
    groups = [part for part in np.array_split(np.flatnonzero(known), MAX_SEGMENTS - 1) if len(part)]
    groups = [part for part in (np.flatnonzero(known == 0),) if len(part)] + groups
    return [(int(known[part].max()), jax.tree.map(lambda entry, part=part: entry[part], at)) for part in groups]

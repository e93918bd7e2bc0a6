"""Which tokens become known in a sampling step, and which are hidden again."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from addp_jax import diffusion, errors


def by_confidence(logits, token_ids, temperature, noise, roll) -> jax.Array:
    """The likeliest first, their log probability blurred by noise."""
    return diffusion.confidence(logits, token_ids) + temperature * noise


def by_halton(logits, token_ids, temperature, noise, roll) -> jax.Array:
    """Spread evenly: Halton-MaskGIT's order (arXiv:2503.17076), which each image begins at a place of its own."""
    length = token_ids.shape[1]
    return -((halton_places(math.isqrt(length))[None] + roll) % length).astype(jnp.float32)


def by_chance(logits, token_ids, temperature, noise, roll) -> jax.Array:
    return noise


# (logits [B,L,K], token_ids [B,L], temperature, noise [B,L], roll [B,1]) -> scores [B,L]: of the unknown tokens those
# with the lowest stay unknown. noise: standard Gumbel, new in each step; roll: 0..L-1, the same in all of an image.
ORDERS = {"confidence": by_confidence, "halton": by_halton, "random": by_chance}


def halton_places(side: int) -> np.ndarray:
    """Place of each cell of a grid, in raster order, in the Halton sequence: int `[side*side]` (arXiv:2503.17076).

    Point n = 1, 2, ... has the radical inverse of n in base 2 as its row and in base 3 as its column; cells that came
    before are skipped.
    """
    places, n = {}, 0
    while len(places) < side**2:
        n += 1
        row, column = (radical_inverse(n, base, side) for base in (2, 3))
        places.setdefault(row * side + column, len(places))
    return np.array([places[cell] for cell in range(side**2)])


def radical_inverse(n: int, base: int, side: int) -> int:
    """The digits of n mirrored at the point, a fraction, as a cell of 0..side-1."""
    mirrored, unit = 0, 1
    while n:
        n, digit = divmod(n, base)
        mirrored, unit = mirrored * base + digit, unit * base
    return side * mirrored // unit


def hide_again(scores, mask, num_masked, known, share, noise) -> jax.Array:
    """The next mask with ReMDM's capped remasking (arXiv:2503.00307), `num_masked` tokens as without: bool [B,L].

    Of the tokens drawn in earlier steps, `known` bool [B,L], `share` is hidden again, at random by `noise` [B,L]; this
    number is rounded down, and at most `num_masked`. The others hidden are those of `mask` with the lowest `scores`.
    """
    again = jnp.minimum(share * known.sum(-1, keepdims=True), num_masked).astype(jnp.int32)
    hidden = diffusion.hide_lowest(scores, mask, num_masked - again)
    return hidden | diffusion.hide_lowest(noise, known, again)


def check_schedule(schedule: str | tuple[int, ...], steps: int) -> None:
    """Raises ValueError unless it is the name of one, or T numbers that do not rise and end at 0 or 1."""
    if isinstance(schedule, str):
        if schedule not in diffusion.SCHEDULES:
            raise ValueError(f"schedule: {schedule!r}; use {' or '.join(diffusion.SCHEDULES)}, or a list")
    elif len(schedule) != steps:
        raise ValueError(f"schedule: {len(schedule)} numbers; give {steps}, one for each step")
    elif any(after > before for before, after in zip(schedule, schedule[1:])) or schedule[-1] > 1:
        raise ValueError(f"schedule: {schedule}; use numbers that never rise, the last one 0 or 1")


def listed_num_masked(schedule: tuple[int, ...], length: int, unknown) -> np.ndarray:
    """int32 [T,...]: a `schedule` of L tokens where `unknown` of them, an int or an array, are masked at the start.

    Rounded up. Raises UserError if it masks more than L.
    """
    if schedule[0] > length:
        raise errors.UserError(f"config.model.sampler.schedule: {schedule[0]} masked tokens, but an image has {length}")
    return (-(-np.multiply.outer(schedule, unknown) // length)).astype(np.int32)

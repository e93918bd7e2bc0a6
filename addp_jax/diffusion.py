"""Masked-token diffusion: the vocabulary, the schedules and the corruption. JAX and numpy only.

| code | meaning, shape, dtype | unit / range | paper |
|---|---|---|---|
| `image` | float32 `[B,H,W,3]` (uint8 in the pipeline) | RGB in [0,1] | x |
| `token_ids` | int32 `[B,L]` | 0..K-1 | z (hard) |
| `mask` | bool `[B,L]` | True = masked / unknown | m |
| `mask_t`, `mask_s` | as above, `mask_s` inside `mask_t` | s is a step *cleaner* than t | m_t, m_(t-1) |
| `probs`, `logits` | float32 `[B,L,K]` | over the K codes only | z-bar |
| `codebook` | float32 `[K,Z]` | | e |
| `latents` | float32 `[B,L,Z]` | codebook space, raster order | |
| `mask_ratio` / `num_masked` | fraction (0,1] / int 1..L | of the L tokens | gamma |
| `t` / `step` | diffusion index / optimizer step | never interchanged | |

Axis letters: B batch, H W pixels, h w token grid, L = h*w, D width, N heads, K codes, Z code width,
T sampling steps, C classes. A mask is cleaner when fewer tokens are masked.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

GRID_POINTS = 100  # the cosine grid of the training schedule has points i = 0..100


@dataclasses.dataclass(frozen=True)
class MaskSchedule:
    """Training-time mask ratios: a normal density evaluated on a cosine grid (release's recipe)."""

    low: float = 0.5  # smallest mask ratio, inclusive
    high: float = 1.0  # largest mask ratio, exclusive
    mean: float = 0.55  # of the density before it is cut to [low, high)
    std: float = 0.25
    max_jump: int = 5  # mask_t lies 1..max_jump grid points beyond mask_s
    group: int = 1  # examples that share one ratio (the release: the whole batch of a device)

    def __post_init__(self):
        for name, good, advice in (
            ("low", 0 <= self.low < self.high, "use a fraction below high"),
            ("high", self.high <= 1, "use a fraction, at most 1"),
            ("std", self.std > 0, "use a number above 0"),
            ("max_jump", self.max_jump >= 1, "use at least 1"),
            ("group", self.group >= 1, "use at least 1"),
        ):
            if not good:
                raise ValueError(f"{name}: {getattr(self, name)}; {advice}")


def mask_ratio_grid(schedule: MaskSchedule) -> tuple[np.ndarray, np.ndarray]:
    """Mask ratios `[R]` float32, ascending, and the probability of each `[R]` float64.

    ratio_i = cos(pi/2 * i/100) where low <= ratio < high. The density is evaluated at the grid
    points and normalised, not integrated, which tilts the mean towards high ratios.
    """
    points = np.float32(math.pi / 2) * (np.arange(GRID_POINTS + 1, dtype=np.float32) / np.float32(GRID_POINTS))
    ratios = np.cos(points)[::-1]
    ratios = ratios[(ratios >= schedule.low) & (ratios < schedule.high)]
    density = np.exp(-0.5 * ((ratios.astype(np.float64) - schedule.mean) / schedule.std) ** 2)
    return ratios, density / density.sum()


def grid_num_masked(schedule: MaskSchedule, length: int) -> np.ndarray:
    """Number of masked tokens at each grid point, int32 `[R]`: ceil(L * ratio)."""
    return np.ceil(np.float32(length) * mask_ratio_grid(schedule)[0]).astype(np.int32)


def rank(scores: jax.Array) -> jax.Array:
    """Position of each entry in the ascending order of its row, int32 `[B,L]`; ties by index."""
    return jnp.argsort(jnp.argsort(scores, axis=-1), axis=-1)


def draw_nested_masks(key: jax.Array, schedule: MaskSchedule, batch: int, length: int):
    """Draw `(mask_t, mask_s)`, bool `[B,L]`, with mask_s inside mask_t: one noise, two counts.

    Raises ValueError when `schedule.group` does not divide the batch.
    """
    if batch % schedule.group:
        raise ValueError(f"a group of {schedule.group} does not divide the batch of {batch}")
    index_key, jump_key, noise_key = jax.random.split(key, 3)
    _, probs = mask_ratio_grid(schedule)
    counts = jnp.asarray(grid_num_masked(schedule, length))
    groups = (batch // schedule.group,)
    index_s = jax.random.categorical(index_key, jnp.log(jnp.asarray(probs, jnp.float32)), shape=groups)
    jump = jax.random.randint(jump_key, groups, 1, schedule.max_jump + 1)
    index_t = jnp.minimum(index_s + jump, len(probs) - 1)
    order = rank(jax.random.uniform(noise_key, (batch, length)))
    num_t, num_s = (jnp.repeat(counts[i], schedule.group)[:, None] for i in (index_t, index_s))
    return order < num_t, order < num_s


def mix_latents(probs: jax.Array, token_ids: jax.Array, mask: jax.Array, codebook: jax.Array) -> jax.Array:
    """Expected code where masked, hard code elsewhere: float32 `[B,L,Z]` (paper section 3.1, f = weighted sum)."""
    soft = jnp.einsum("blk,kz->blz", probs, codebook, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(mask[..., None], soft, codebook[token_ids])


MAPPINGS, TARGETS = ("expected", "drawn"), ("teacher", "tokens")  # the paper's choice first


def corrupt(teach, token_ids, mask_t, mask_s, codebook, rng, mapping: str = "expected", target: str = "teacher"):
    """The training pair of one step t -> s (paper sections 3.1 and 3.2).

    Args:
      teach: `(mask, rng) -> probs [B,L,K]`, the frozen predictor's distribution given the tokens outside the mask.
      token_ids: int32 `[B,L]`.
      mask_t, mask_s: bool `[B,L]`, mask_s inside mask_t.
      codebook: float32 `[K,Z]`.
      mapping: drawn = a code of the predictor's distribution instead of their expectation.
      target: tokens = the image's own instead of the predictor's distribution.
    Returns:
      latents `[B,L,Z]`: true codes outside mask_s, the expectation of what mask_t lets the predictor know inside;
      target `[B,L,K]`: the predictor's distribution given the tokens outside mask_s.
    """
    key_t, key_s = jax.random.split(rng)
    probs = teach(mask_t, key_t)
    if mapping == "drawn":
        probs = jax.nn.one_hot(jax.random.categorical(jax.random.fold_in(rng, 2), jnp.log(probs)), len(codebook))
    latents = mix_latents(probs, token_ids, mask_s, codebook)
    return latents, jax.nn.one_hot(token_ids, len(codebook)) if target == "tokens" else teach(mask_s, key_s)


def soft_cross_entropy(target: jax.Array, logits: jax.Array, mask: jax.Array, label_smoothing: float) -> jax.Array:
    """Cross entropy to soft targets, averaged over each example's masked positions: float32 `[B]`.

    Args:
      target: probabilities `[B,L,K]`.
      logits: `[B,L,V]` with V >= K; the classes beyond K are real classes of the softmax that
        never are a target, and label smoothing spreads over all V (as in the release).
      mask: `[B,L]`; every example must have a masked position.
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    codes = target.shape[-1]
    hit = (target * log_probs[..., :codes]).sum(-1)
    loss = -(1 - label_smoothing) * hit - label_smoothing * log_probs.mean(-1)
    return (loss * mask).sum(-1) / mask.sum(-1)


def least_cross_entropy(target: jax.Array, mask: jax.Array, label_smoothing: float, vocab_size: int) -> jax.Array:
    """The entropy of the smoothed target: no logits `[B,L,V]` take `soft_cross_entropy` below it: float32 `[B]`."""
    smoothed = (1 - label_smoothing) * jnp.pad(target, ((0, 0), (0, 0), (0, vocab_size - target.shape[-1])))
    entropy = jax.scipy.special.entr(smoothed + label_smoothing / vocab_size).sum(-1)
    return (entropy * mask).sum(-1) / mask.sum(-1)


# --- sampling -------------------------------------------------------------------------------------

# Share of `count` tokens that is still masked once the share `done` of the steps is done; what the steps reveal:
SCHEDULES = {
    "cosine": lambda done, count: math.cos(math.pi / 2.0 * done),  # few tokens first, many at the end
    "linear": lambda done, count: 1.0 - done,  # as many in each step (MaskGIT's code: "uniform")
    "sqrt": lambda done, count: 1.0 - math.sqrt(done),  # many first, few at the end (MaskGIT's square root)
    "constant": lambda done, count: count**-done if done < 1 else 0.0,  # the same share of what is left, down to one
    "arccos": lambda done, count: math.acos(done) * 2.0 / math.pi,  # Halton-MaskGIT's: most in the last step
}
RULES = [name for name in SCHEDULES if name != "constant"]  # those that do not count tokens, for `per_step`


def start_num_masked(length: int, mask_ratio: float) -> int:
    """Masked tokens at the start of sampling with this mask ratio (the release's rounding)."""
    return length - int(length * (1 - mask_ratio))


def draw_masks(keys: jax.Array, length: int, num_masked: int) -> jax.Array:
    """One random mask per key, bool `[B,L]`, with exactly `num_masked` masked tokens each."""
    return rank(jax.vmap(lambda key: jax.random.uniform(key, (length,)))(keys)) < num_masked


def sampling_num_masked(schedule: str, steps: int, length: int, mask_ratio: float = 1.0) -> np.ndarray:
    """Tokens that stay masked after each of the T steps, int32 `[T]`: ceil, never below 1.

    The order of the floating-point operations is the release's: with fractional mask ratios it decides the ceil.
    """
    most = int(length * mask_ratio)
    left = [SCHEDULES[schedule](1.0 * (step + 1) / steps, length) for step in range(steps)]
    return np.array([min(max(math.ceil(length * ratio * mask_ratio), 1), most) for ratio in left], np.int32)


def num_masked_by_start(schedule: str, steps: int, length: int) -> np.ndarray:
    """`sampling_num_masked` of images with 0..L unknown tokens at the start, int32 `[T,L+1]`."""
    columns = [sampling_num_masked(schedule, steps, unknown) for unknown in range(1, length + 1)]
    return np.stack([np.zeros(steps, np.int32), *columns], axis=1)


def annealing(temperature: float, steps: int, annealed: bool) -> np.ndarray:
    """Temperature of the confidence noise at each step, float32 `[T]`; annealed ends at 0."""
    done = (np.arange(steps) + 1) / steps
    return np.float32(temperature * (1 - done) if annealed else np.full(steps, temperature))


def per_step(value: float | str | tuple, steps: int) -> np.ndarray:
    """What a number, a rule or a list stands for at each of the T steps, float32 `[T]`.

    A rule is a text such as "linear 6 0": from the first number to the second, as that schedule of `RULES` falls; the
    second is reached in the last step. Raises ValueError for a text that is none, and for a list of another length.
    """
    if isinstance(value, (int, float)):
        return np.full(steps, value, np.float32)
    if not isinstance(value, str):
        if len(value) != steps:
            raise ValueError(f"{len(value)} numbers; give {steps}, one for each step")
        return np.array(value, np.float32)
    try:
        name, *ends = value.split()
        start, end = map(float, ends)
        left = np.array([SCHEDULES[RULES[RULES.index(name)]]((step + 1) / steps, 1) for step in range(steps)])
    except ValueError as error:
        advice = f'a number, one for each step, or a rule of {", ".join(RULES)} with its ends, such as "linear 2 0"'
        raise ValueError(f"{value!r}; use {advice}") from error
    return np.float32(end + (start - end) * left)


def keep_nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    """Set the logits outside the nucleus to -inf: tokens are kept while the mass *before* them is below top_p."""
    if top_p >= 1.0:
        return logits
    order = jnp.argsort(-logits, axis=-1)
    probs = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    kept_sorted = (jnp.cumsum(probs, axis=-1) - probs) < top_p
    kept = jnp.take_along_axis(kept_sorted.at[..., 0].set(True), jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(kept, logits, -jnp.inf)


def keep_top(logits: jax.Array, top_k: int) -> jax.Array:
    """Set all logits but the `top_k` largest to -inf, where several are level all of them are kept; 0 = keep all."""
    if not 0 < top_k < logits.shape[-1]:
        return logits
    return jnp.where(logits >= jax.lax.top_k(logits, top_k)[0][..., -1:], logits, -jnp.inf)


def hide_lowest(scores: jax.Array, mask: jax.Array, num_masked) -> jax.Array:
    """The mask of the `num_masked` entries with the lowest scores, by rank; those outside `mask` come last.

    Args:
      scores: `[B,L]`. mask: bool `[B,L]`.
      num_masked: int, or `[B,1]` where each image has its own number.
    """
    return rank(jnp.where(mask, scores, jnp.inf)) < num_masked


def least_confident(logits, token_ids, mask, noise, num_masked) -> jax.Array:
    """The mask of the `num_masked` least confident tokens, by rank; known tokens have infinite confidence.

    Args:
      logits: `[B,L,K]`; the confidence is the log probability of `token_ids` `[B,L]` plus `noise` `[B,L]`.
      mask: `[B,L]` tokens that were unknown before this step.
      num_masked: how many stay masked; see `hide_lowest`.
    """
    return hide_lowest(confidence(logits, token_ids) + noise, mask, num_masked)


def confidence(logits: jax.Array, token_ids: jax.Array) -> jax.Array:
    """Log probability of `token_ids` `[B,L]`: float32 `[B,L]`."""
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    return jnp.take_along_axis(log_probs, token_ids[..., None], axis=-1)[..., 0]

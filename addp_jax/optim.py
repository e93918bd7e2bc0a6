"""The optimizer from its config: schedule, weight decay, clipping. The one place that turns batch and epochs into steps."""

from __future__ import annotations

import dataclasses
import re

import jax
import optax

from addp_jax import errors, partition

# Not decayed: what the release's rule (one dimension, or a name that ends in ".bias") leaves out. Judged by name,
# since scanned parameters have a layer axis more than the release's.
NOT_DECAYED = r".*(bias|scale)"


@dataclasses.dataclass(frozen=True)
class Config:
    """AdamW with linear warm-up and half-cosine decay, per step."""

    base_lr: float = 1e-4  # learning rate at a batch of 256; the real one is base_lr * batch / 256
    min_lr: float = 0.0
    warmup_epochs: float = 40.0  # or warmup_steps, where config.epochs is 0
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    clip_norm: float = 3.0  # global gradient norm; 0 = no clipping
    accumulate: int = 1  # micro-batches per optimizer step
    ema_decay: float = 0.0  # of the parameter average; 0 = none

    def __post_init__(self):
        for name, least in (("base_lr", 1e-30), ("accumulate", 1), ("clip_norm", 0), ("warmup_steps", 0)):
            if getattr(self, name) < least:
                raise errors.UserError(f"config.optim.{name}: {getattr(self, name)} is too small")


@dataclasses.dataclass(frozen=True)
class Length:
    """How long a run is, in optimizer steps."""

    total: int
    warmup: int


def length(config: Config, *, epochs: float, steps: int, num_train: int, batch_size: int) -> Length:
    """Epochs (or steps) -> optimizer steps; an epoch drops its last incomplete batch, as the release's loader does."""
    if bool(epochs) == bool(steps):
        raise errors.UserError("config.epochs and config.steps: set exactly one of them (the other to 0)")
    if steps:
        return Length(steps, config.warmup_steps)
    per_epoch = num_train // batch_size
    return Length(int(epochs * per_epoch), int(config.warmup_epochs * per_epoch))


def schedule(config: Config, run: Length, batch_size: int) -> optax.Schedule:
    """Learning rate at an optimizer step: linear from 0, then half cosine to `min_lr`."""
    peak = config.base_lr * batch_size / 256
    if run.warmup >= run.total:
        raise errors.UserError(f"config.optim: warm-up of {run.warmup} steps in a run of {run.total} steps")
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, max(run.warmup, 1)),
            optax.cosine_decay_schedule(peak, run.total - run.warmup, config.min_lr / peak),
        ],
        [run.warmup],
    )


def decay_mask(params):
    """True where weight decay applies."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: re.fullmatch(NOT_DECAYED, "/" + partition.path_name(path)) is None, params
    )


def build(config: Config, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """Clip, then AdamW with decoupled decay on everything but biases and norm scales."""
    adamw = optax.adamw(learning_rate, *config.betas, config.eps, weight_decay=config.weight_decay, mask=decay_mask)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, adamw)

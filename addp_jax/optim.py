"""The optimizer from its config: schedule, weight decay, clipping. The one place that turns batch and epochs into steps.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import optax

from addp_jax import errors, parameters, partition, schema

# Not decayed: what the release's rule (one dimension, or a name that ends in ".bias") leaves out. Judged by name,
# since scanned parameters have a layer axis more than the release's.
NOT_DECAYED = ("bias", "scale")
LARS_TRUST, LARS_MOMENTUM = 1e-3, 0.9  # MAE's linear probe


@schema.config
class Config:
    """AdamW or LARS with linear warm-up, then a schedule, per step.

    Departs from MAE's LARS: optax multiplies by the learning rate before the momentum is added up, MAE after; the two
    differ while the learning rate changes.
    """

    optimizer: str = schema.field("adamw", choices=("adamw", "lars"))  # betas and eps do not count for lars
    base_lr: float = schema.field(1e-4, above=0, tiny=1e-2)  # at a batch of 256; the learning rate is base_lr * batch / 256
    schedule: str = schema.field("cosine", choices=("cosine", "linear", "drops"))  # after the warm-up
    min_lr: float = schema.field(0.0, least=0)  # at the end of the half cosine
    drops: tuple[float, ...] = schema.field((8 / 9, 26 / 27), above=0, below=1)  # of the run, where the rate falls to a tenth
    warmup_epochs: float = schema.field(40.0, least=0)  # linear; counts where epochs is set
    warmup_steps: int = schema.field(0, least=0, tiny=1)  # counts where steps is set
    warmup_from: float = schema.field(0.0, least=0, most=1)  # of the learning rate, at step 0
    betas: tuple[float, float] = schema.field((0.9, 0.95), least=0, below=1)
    eps: float = schema.field(1e-8, above=0)
    weight_decay: float = schema.field(0.05, least=0)
    not_decayed: tuple[str, ...] = NOT_DECAYED  # ends of the names of parameters without weight decay
    layer_decay: float = schema.field(1.0, above=0, most=1)  # learning rate of each encoder layer relative to the one above it
    clip_norm: float = schema.field(3.0, least=0)  # global gradient norm; 0 = no clipping
    accumulate: int = schema.field(1, least=1)  # micro-batches per optimizer step
    ema_decay: float = schema.field(0.0, least=0, below=1)  # of the averaged parameters; 0 = no average


@dataclasses.dataclass(frozen=True)
class Length:
    """How long a run is, in optimizer steps."""

    total: int
    warmup: int


def length(config: Config, *, epochs: float, steps: int, num_train: int, batch_size: int) -> Length:
    """Epochs (or steps) -> optimizer steps.

    An epoch counts as many steps as there are whole batches in `num_train` examples, as in the release. Its loader drops
    the rest of every epoch; `data.pipeline` drops nothing: it shuffles each pass anew and cuts the endless row of passes
    into batches, so that a batch may hold the end of one pass and the beginning of the next.
    """
    require_batch(num_train, batch_size)
    if bool(epochs) == bool(steps):
        raise errors.UserError("config.epochs and config.steps: set exactly one of them (the other to 0)")
    if steps:
        return Length(steps, config.warmup_steps)
    per_epoch = num_train // batch_size
    if int(epochs * per_epoch) < 1:
        raise errors.UserError(f"config.epochs: {epochs} of {per_epoch} steps each are not one step; train longer")
    return Length(int(epochs * per_epoch), int(config.warmup_epochs * per_epoch))


def require_batch(num_examples: int, batch_size: int) -> None:
    """Raises UserError unless the training split fills a batch."""
    if batch_size < 1:
        raise errors.UserError(f"config.batch_size: {batch_size}; use at least 1")
    if num_examples < batch_size:
        raise errors.UserError(
            f"config.data: the training split has {num_examples} examples, fewer than config.batch_size = {batch_size}; "
            "lower config.batch_size or add images"
        )


def schedule(config: Config, run: Length, batch_size: int) -> optax.Schedule:
    """Learning rate at an optimizer step: a linear warm-up, then

    cosine  half a cosine to `min_lr`, as in MAE's and ADDP's release
    linear  a line to 0 at the last step; as mmengine counts, the warm-up ends one step earlier and waits there
    drops   a tenth of it from each of `drops` on, as in detectron2
    """
    peak = config.base_lr * batch_size / 256
    if config.min_lr > peak:
        raise errors.UserError(
            f"config.optim.min_lr: {config.min_lr} is above the learning rate {peak:g} "
            "(config.optim.base_lr x config.batch_size / 256); lower it"
        )
    if run.warmup >= run.total:
        raise errors.UserError(
            f"config.optim: warm-up of {run.warmup} steps in a run of {run.total} steps; lower warmup_epochs or warmup_steps"
        )
    warmup, left = run.warmup, run.total - run.warmup
    if config.schedule == "linear":
        warmup, after = run.warmup - 1, optax.linear_schedule(peak, 0.0, max(left - 1, 1))
    elif config.schedule == "drops":
        places = {round(share * run.total) - run.warmup: 0.1 for share in config.drops}
        after = optax.piecewise_constant_schedule(peak, places)
    else:
        after = optax.cosine_decay_schedule(peak, left, config.min_lr / peak)
    start = optax.linear_schedule(config.warmup_from * peak, peak, max(warmup, 1))
    return optax.join_schedules([start, after], [run.warmup])


def decay_mask(params, not_decayed: tuple[str, ...] = NOT_DECAYED):
    """True where weight decay applies: never to statistics, which no gradient would bring back."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: not partition.path_name(path).endswith((*not_decayed, *parameters.STATISTICS)), params
    )


def layer_scales(params, decay: float):
    """What each parameter's learning rate is multiplied by, as arrays that broadcast against the parameters.

    `decay` to the power of the layers above it: 0 for the head, 1 for the last block, depth + 1 for the embeddings
    of an encoder (MAE's layer-wise decay). Blocks are stacked on a leading axis, so theirs has one entry per layer.
    """
    named = {name: leaf.shape for name, leaf in parameters.named_leaves(params).items()}
    depth = max((shape[0] for name, shape in named.items() if "encoder/blocks/" in name), default=0)

    def one(path, leaf):
        name = partition.path_name(path)
        if "encoder/" not in name or "final_norm" in name:
            return np.float32(1)
        if "encoder/blocks/" not in name:
            return np.float32(decay ** (depth + 1))
        above = np.arange(depth, 0, -1).reshape(-1, *[1] * (leaf.ndim - 1))
        return (decay**above).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, params)


def build(config: Config, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """Clip, then AdamW (decoupled decay) or LARS, then the layer-wise decay of the learning rate."""
    mask = functools.partial(decay_mask, not_decayed=config.not_decayed)
    if config.optimizer == "adamw":
        core = optax.adamw(learning_rate, *config.betas, config.eps, weight_decay=config.weight_decay, mask=mask)
    else:
        core = optax.lars(learning_rate, config.weight_decay, mask, LARS_TRUST, trust_ratio_mask=mask, momentum=LARS_MOMENTUM)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()

    def by_layer(updates, params):
        return jax.tree.map(lambda update, scale: update * scale, updates, layer_scales(params, config.layer_decay))

    return optax.chain(clip, core, optax.stateless(by_layer) if config.layer_decay < 1 else optax.identity())

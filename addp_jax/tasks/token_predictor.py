"""Stage 2: train the token predictor on the tokens of a frozen tokenizer (MAGE's recipe)."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from addp_jax import codecs, diffusion, partition, pictures, samplers, schema, tasks, weights
from addp_jax.codecs import vqgan
from addp_jax.metrics import averages, classification
from addp_jax.models import token_predictor
from addp_jax.ops import images, keys
from addp_jax.samplers import token_only


@schema.config
class Config:
    """Fields of `config.model`."""

    net: token_predictor.Config = token_predictor.Config()
    tokenizer: codecs.Config = vqgan.Config()
    # Run folder or weight file of the frozen tokenizer, "random" for benchmarks. Its content matters, not its path.
    tokenizer_weights: str = schema.frozen_weights()
    # Mask ratio ~ normal(mask_mean, mask_std) cut to [mask_low, mask_high].
    mask_low: float = schema.field(0.5, least=0, below=1, matters=schema.TRAINING)
    mask_high: float = schema.field(1.0, above=0, most=1, matters=schema.TRAINING)
    mask_mean: float = schema.field(0.55, matters=schema.TRAINING)
    mask_std: float = schema.field(0.25, above=0, matters=schema.TRAINING)
    label_smoothing: float = schema.field(0.1, least=0, below=1, matters=schema.TRAINING)
    sampler: samplers.Config = schema.field(token_only.Config(), matters=schema.NOTHING)
    num_samples: int = schema.field(16, least=1, matters=schema.NOTHING, tiny=4)  # in the evaluation's picture

    def __post_init__(self):
        if self.mask_low > self.mask_high:
            raise ValueError(f"mask_low: {self.mask_low} is above mask_high = {self.mask_high}")


class Task(tasks.Generator):
    """See `addp_jax.tasks`."""

    compact = ("tokenizer", "token_predictor")
    layout = token_predictor.LAYOUT

    def __init__(self, config: Config, dtype):
        self.config = config
        self.image_size = config.tokenizer.image_size
        self.net = token_predictor.TokenPredictor(config.net, dtype)
        self.tokenizer = codecs.create(config.tokenizer, dtype)
        self.sampler, self.sampler_config = samplers.chosen(config.sampler)
        # Made here so that the second evaluation compiles nothing.
        self._values = jax.jit(functools.partial(self._per_example, train=False))
        self._samples = samplers.unconditional(self, config.num_samples)
        codecs.check_pair(config.tokenizer, config.net.length, config.net.num_codes, "config.model.net")

    def init(self, rng):
        return {"token_predictor": token_predictor.init(self.net, rng)}

    def load_frozen(self):
        init, path = functools.partial(codecs.init, self.tokenizer), self.config.tokenizer_weights
        field = "config.model.tokenizer_weights"
        return {"tokenizer": weights.load(path, "tokenizer", init, self.config.tokenizer, field)}

    def loss(self, params, frozen, batch, rng, train: bool):
        values = self._per_example(params, frozen, batch, rng, train)
        return values["loss"].mean(), {name: value.mean() for name, value in values.items()}

    def _per_example(self, params, frozen, batch, rng, train: bool):
        """Loss and accuracy at masked positions, and the masked share of them, each [B]."""
        mask_key, dropout_key = jax.random.split(rng)
        token_ids = self.codec(frozen).encode(images.to_unit(batch["image"]))
        mask, kept = self._draw_masks(mask_key, *token_ids.shape)
        logits = self.net.apply(
            {"params": params["token_predictor"]}, token_ids, mask, kept, train, rngs={"dropout": dropout_key}
        )[..., : self.config.net.num_codes]
        target = jax.nn.one_hot(token_ids, self.config.net.num_codes)
        right = classification.in_top(logits, token_ids, 1, jnp) & mask
        return {
            "loss": diffusion.soft_cross_entropy(target, logits, mask, self.config.label_smoothing),
            "accuracy": right.sum(-1) / mask.sum(-1),
            "mask_ratio": mask.mean(-1),
        }

    def _draw_masks(self, key, batch: int, length: int):
        """`mask` bool [B,L] and the positions `kept` [B,k]: the encoder never sees the first ceil(L * mask_low) masked ones."""
        config = self.config
        ratio_key, noise_key = jax.random.split(key)
        low, high = ((bound - config.mask_mean) / config.mask_std for bound in (config.mask_low, config.mask_high))
        ratio = config.mask_mean + config.mask_std * jax.random.truncated_normal(ratio_key, low, high, (batch, 1))
        num_dropped = math.ceil(length * config.mask_low)
        num_masked = jnp.clip(jnp.ceil(length * ratio), num_dropped, length)
        order = diffusion.rank(jax.random.uniform(noise_key, (batch, length)))
        kept = jnp.argsort(order < num_dropped, axis=-1, stable=True)[:, : length - num_dropped]
        return order < num_masked, kept

    def evaluate(self, params, frozen, batches, source):
        """Loss, also by mask ratio, and accuracy over `batches`; a grid of samples from the predictor alone."""
        key, losses = keys.of(0, "evaluation"), averages.ByMaskRatio()

        def values():
            for index, batch in enumerate(batches):
                found = self._values(params, frozen, batch, jax.random.fold_in(key, index))
                found, valid = partition.whole((found, batch["valid"]))
                losses.add(found["mask_ratio"], found["loss"], valid)
                yield found, valid

        scalars = averages.mean_over(values()) | losses.means()
        samples = self._samples(params, frozen, keys.of(0, "samples"))
        return tasks.Results(scalars, {"samples": pictures.grid(samples, columns=math.isqrt(self.config.num_samples))})

    def codec(self, frozen) -> codecs.Codec:
        return codecs.bind(self.tokenizer, frozen["tokenizer"])

    def nets(self, params, frozen) -> samplers.Nets:
        return samplers.bind(token_predictor.bind(self.net, params["token_predictor"]), self.codec(frozen))

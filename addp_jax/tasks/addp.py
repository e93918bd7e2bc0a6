"""Stage 3: train ADDP. Frozen tokenizer and token predictor corrupt an image; the network predicts its cleaner tokens."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from addp_jax import codecs, diffusion, errors, partition, pictures, samplers, schema, tasks, weights
from addp_jax.codecs import vqgan
from addp_jax.metrics import averages
from addp_jax.models import alignment, heads, pixel_to_token, token_predictor, vit
from addp_jax.ops import images, keys
from addp_jax.samplers import alternating
from addp_jax.weights import encoder

COLUMNS = 8  # of the evaluation's denoising picture


@schema.config
class Config:
    """Fields of `config.model`."""

    net: pixel_to_token.Config = pixel_to_token.Config()
    predictor: token_predictor.Config = token_predictor.Config()
    tokenizer: codecs.Config = vqgan.Config()
    # Run folders or weight files of the frozen networks, "random" for benchmarks. Their content matters, not their paths.
    tokenizer_weights: str = schema.frozen_weights()
    predictor_weights: str = schema.frozen_weights()
    masks: diffusion.MaskSchedule = schema.field(diffusion.MaskSchedule(), matters=schema.TRAINING)
    # True: the token predictor's dropout stays on, as in the released training.
    teacher_dropout: bool = schema.field(False, matters=schema.TRAINING)
    label_smoothing: float = schema.field(0.1, least=0, below=1, matters=schema.TRAINING)
    # The paper's choices, for comparisons without them. With "drawn" or False the sampler does so too.
    mapping: str = schema.field("expected", choices=diffusion.MAPPINGS)  # what the corrupted image shows of unknown tokens
    known_tokens: bool = True  # the decoder is told the tokens outside the mask
    target: str = schema.field("teacher", choices=diffusion.TARGETS, matters=schema.TRAINING)  # what is predicted
    # Losses on the encoder's features, beside that of the tokens; the published recipe has none.
    alignment: alignment.Config = schema.field(alignment.Config(), matters=schema.TRAINING)
    # Run folder or weight file of the frozen network of alignment.target="network": ADDP's, MAE's, or one of its names.
    target_weights: str = schema.frozen_weights()
    sampler: samplers.Config = schema.field(alternating.Config(), matters=schema.NOTHING)
    num_samples: int = schema.field(16, least=1, matters=schema.NOTHING, tiny=4)  # in the evaluation's picture

    def __post_init__(self):
        try:
            self.alignment.check(self.net.encoder)
        except ValueError as error:
            raise ValueError(f"alignment.{error}") from error


class Task(tasks.Generator, tasks.Recogniser):
    """See `addp_jax.tasks`. Its features are the mean of the encoder's over the patches."""

    compact = ("tokenizer", "token_predictor", "pixel_to_token", "target")
    layout = (*alignment.LAYOUT, *pixel_to_token.LAYOUT)

    def __init__(self, config: Config, dtype):
        self.config, self.dtype = config, dtype
        self.image_size = config.tokenizer.image_size
        self.net = pixel_to_token.PixelToToken(config.net, dtype)
        self.predictor = token_predictor.TokenPredictor(config.predictor, dtype)
        self.tokenizer = codecs.create(config.tokenizer, dtype)
        self.sampler, self.sampler_config = samplers.chosen(config.sampler)
        # Made here so that the second evaluation compiles nothing.
        self._values = jax.jit(self._evaluated)
        self._samples = samplers.unconditional(self, config.num_samples)
        # Static room for known tokens: the cleanest mask of the schedule leaves the most.
        most_known = config.net.length - int(diffusion.grid_num_masked(config.masks, config.net.length).min())
        self.capacity = most_known if config.known_tokens else 0
        codecs.check_pair(config.tokenizer, config.net.length, config.net.num_codes, "config.model.net")
        codecs.check_pair(config.tokenizer, config.predictor.length, config.predictor.num_codes, "config.model.predictor")
        if config.net.encoder.image_size != config.tokenizer.image_size:
            raise errors.UserError("config.model.net.encoder.image_size differs from config.model.tokenizer.image_size")

        if config.alignment.weight and config.alignment.target == "average":
            self.average_for = "config.model.alignment.weight"
        self.target = config.alignment.target_config(config.net.encoder)
        self.head = alignment.Head(self.target.width, dtype)

    def init(self, rng):
        params = {"pixel_to_token": pixel_to_token.init(self.net, rng)}
        if self.config.alignment.weight:
            features = jnp.zeros((1, 1, self.config.net.encoder.width))
            params["alignment"] = self.head.init(jax.random.fold_in(rng, 1), features)["params"]
        return params

    def load_frozen(self):
        init, path = functools.partial(token_predictor.init, self.predictor), self.config.predictor_weights
        frozen, field = self.load_for_sampling(), "config.model.predictor_weights"
        predictor = weights.load(path, "token_predictor", init, self.config.predictor, field, frozen["tokenizer"])
        frozen |= {"token_predictor": predictor}
        if self.config.alignment.weight and self.config.alignment.target == "network":
            init, field = functools.partial(vit.init, self.target), "config.model.target_weights"
            frozen["target"] = encoder.load(self.config.target_weights, init, self.target, field)
        return frozen

    def load_for_sampling(self):
        """The token predictor only teaches: no sampler asks it."""
        init, path = functools.partial(codecs.init, self.tokenizer), self.config.tokenizer_weights
        field = "config.model.tokenizer_weights"
        return {"tokenizer": weights.load(path, "tokenizer", init, self.config.tokenizer, field)}

    def loss(self, params, frozen, batch, rng, train: bool):
        """The metric `loss` is that of the tokens alone, as in an evaluation."""
        config = self.config.alignment
        loss, (image, *_), features = self._per_example(params, frozen, batch, rng, train, config.tap)
        total, metrics = loss.mean(), {"loss": loss.mean()}
        if config.weight:
            predicted = self.head.apply({"params": params["alignment"]}, features[:, 1:])
            metrics["alignment"] = alignment.distance(predicted, self._targets(frozen, image), config.loss)
            total += config.weight * metrics["alignment"]
        if config.dispersive_weight:
            metrics["dispersion"] = alignment.dispersion(features[:, 1:])
            total += config.dispersive_weight * metrics["dispersion"]
        return total, metrics

    def _targets(self, frozen, image):
        """The target's features [B,L,D] of the clean `image`, in evaluation mode."""
        average = self.config.alignment.target == "average"
        params = frozen[tasks.AVERAGE]["pixel_to_token"]["encoder"] if average else frozen["target"]
        return heads.block_tokens(self.target, params, image, self.config.alignment.target_block, self.dtype)[:, 1:]

    def _per_example(self, params, frozen, batch, rng, train: bool, tap: int = 0):
        """Loss [B]; what an evaluation looks at, such as the corrupted image [B,H,W,3]; the output of the block `tap`."""
        mask_key, teacher_key, dropout_key = jax.random.split(rng, 3)
        if len(batch["image"]) % self.config.masks.group:
            raise errors.UserError(f"config.model.masks.group: does not divide config.batch_size={len(batch['image'])}")
        image = images.to_unit(batch["image"])
        codec = self.codec(frozen)

        token_ids = codec.encode(image)
        mask_t, mask_s = diffusion.draw_nested_masks(mask_key, self.config.masks, *token_ids.shape)
        teach = functools.partial(self._teach, frozen["token_predictor"], token_ids, train and self.config.teacher_dropout)
        latents, target = diffusion.corrupt(
            teach, token_ids, mask_t, mask_s, codec.codebook, teacher_key, self.config.mapping, self.config.target
        )
        corrupted = codec.decode(latents)
        logits = self.net.apply(
            {"params": params["pixel_to_token"]},
            corrupted, token_ids, mask_s, self.capacity, train, tap,
            rngs={"dropout": dropout_key},
        )  # fmt: skip
        logits, tapped = logits if tap else (logits, None)
        loss = diffusion.soft_cross_entropy(target, logits, mask_s, self.config.label_smoothing)
        return loss, (image, corrupted, logits, token_ids, mask_s, target), tapped

    def _teach(self, params, token_ids, dropout: bool, mask, rng):
        """The token predictor's distribution given the tokens outside `mask`: [B,L,K], no gradient."""
        logits = self.predictor.apply({"params": params}, token_ids, mask, train=dropout, rngs={"dropout": rng})
        return jax.lax.stop_gradient(jax.nn.softmax(logits[..., : self.config.predictor.num_codes]))

    def _evaluated(self, params, frozen, batch, rng):
        """Figures [B] of each image by name, and what the pictures show of it."""
        loss, (*shown, target), _ = self._per_example(params, frozen, batch, rng, train=False)
        *_, logits, token_ids, mask = shown
        smoothing, vocab_size = self.config.label_smoothing, self.config.net.vocab_size
        unseen = jnp.zeros((len(logits), 1 + mask.shape[1], self.config.net.encoder.width), self.dtype)
        blind = self.net.apply(
            {"params": params["pixel_to_token"]}, unseen, token_ids, mask, self.capacity, method="decode"
        )
        figures = {
            "loss": loss,
            "loss_floor": diffusion.least_cross_entropy(target, mask, smoothing, vocab_size),
            "loss_blind": diffusion.soft_cross_entropy(target, blind, mask, smoothing),
        }
        return figures, shown

    def evaluate(self, params, frozen, batches, source):
        """Loss over `batches`, also by mask ratio; the least it could be (`loss_floor`), what it is with the encoder's
        features at zero (`loss_blind`); pictures of original, corrupted and predicted images, and samples."""
        key, shown, by_ratio = keys.of(0, "evaluation"), [], averages.ByMaskRatio()

        def losses():
            for index, batch in enumerate(batches):
                figures, seen = self._values(params, frozen, batch, jax.random.fold_in(key, index))
                if index == 0:
                    shown.append(partition.whole([array[:COLUMNS] for array in seen]))
                figures, ratio, valid = partition.whole((figures, seen[-1].mean(-1), batch["valid"]))
                by_ratio.add(ratio, figures["loss"], valid)
                yield figures, valid

        scalars = averages.mean_over(losses()) | by_ratio.means()
        samples = self._samples(params, frozen, keys.of(0, "samples"))
        shown_images = {"samples": pictures.grid(samples, columns=math.isqrt(self.config.num_samples))}
        if shown:
            shown_images["denoising"] = self._denoising(frozen, *shown[0])
        return tasks.Results(scalars, shown_images)

    def _denoising(self, frozen, image, corrupted, logits, token_ids, mask):
        """Rows: original, corrupted input, the network's prediction."""
        probs, codec = jax.nn.softmax(logits[..., : self.config.net.num_codes]), self.codec(frozen)
        predicted = codec.decode(diffusion.mix_latents(probs, token_ids, mask, codec.codebook))
        rows = [jnp.clip(row, 0, 1) for row in (image, corrupted, predicted)]
        return pictures.grid(jnp.concatenate(rows), columns=len(rows[0]))

    def codec(self, frozen) -> codecs.Codec:
        return codecs.bind(self.tokenizer, frozen["tokenizer"])

    def nets(self, params, frozen) -> samplers.Nets:
        predict = pixel_to_token.bind(self.net, params["pixel_to_token"], self.config.known_tokens)
        return samplers.bind(predict, self.codec(frozen), self.config.mapping)

    def features(self, params, frozen, image):
        tokens = self.net.apply({"params": params["pixel_to_token"]}, images.to_unit(image), method="encode")
        return heads.pool(tokens, "mean")

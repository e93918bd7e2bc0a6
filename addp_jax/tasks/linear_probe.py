"""How much a linear classifier, or a look at the nearest neighbours, gets out of the frozen encoder's features.

The features of both splits are computed once, from centre crops, and cached; the loop then trains on them as it
trains on images.

Departs from MAGE's protocol (main_linprobe.py), which crops at random in every epoch: cached features do not change.
For the same reason the BatchNorm before the classifier has the statistics of the whole training set, not of a batch.
The features are pooled behind the encoder's own final LayerNorm, MAGE's in front of a fresh one.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from addp_jax import errors, files, parameters, partition, schema, tasks
from addp_jax.data import features, pipeline, transforms
from addp_jax.metrics import averages, nearest
from addp_jax.metrics import classification as metrics
from addp_jax.models import heads, vit
from addp_jax.ops import images
from addp_jax.tasks import classification
from addp_jax.weights import encoder

NORM_EPS = 1e-6  # of the BatchNorm's variance (MAGE)
BATCH_SIZE = 256  # images whose features are computed at a time


@schema.config
class Common:
    """Fields of `config.model`, whatever makes the features."""

    num_classes: int = schema.field(1000, least=1)  # C
    cache: str = schema.field("runs/features", matters=schema.NOTHING)  # folder of the computed features
    pooling: str = schema.field("mean", choices=heads.POOLINGS)  # mean (of the patches) | class (the class token)
    crop_pct: float = schema.field(1.0, above=0, most=1)  # of the resized short side that the centre crop keeps
    shots: int = schema.field(0, least=0, matters=schema.TRAINING)  # training examples per class; 0 = all
    shots_seed: int = schema.field(0, matters=schema.TRAINING)  # of their choice
    neighbours: int = schema.field(20, least=0, matters=schema.NOTHING, tiny=5)  # k of the k-NN classifier; 0 = none
    temperature: float = schema.field(0.07, above=0, matters=schema.NOTHING)  # of its weighted vote


@schema.config
class Config(Common):
    """Fields of `config.model`."""

    encoder: vit.Config = vit.Config()  # as pre-trained: with its input and final LayerNorm
    # Run folder or weight file of ADDP; "random" for the chance level. Its content matters, not its path.
    encoder_weights: str = schema.frozen_weights()
    block: int = -1  # whose output is taken, from 1; -1 = the last, after the final LayerNorm

    def __post_init__(self):
        if not (self.block == -1 or 1 <= self.block <= self.encoder.depth):
            raise ValueError(f"block: {self.block}; use 1 to {self.encoder.depth}, or -1")


class Probe(tasks.Classifier):
    """A task whose `features` come from `_encoder` alone, networks that are not trained."""

    layout = heads.PROBE_LAYOUT
    features_are_frozen = True
    _encoder: dict  # parameters

    def __init__(self, config: Common, dtype, image_size: int, width: int, settings: tuple):
        """width: D of the features. settings: whatever else they depend on, besides `_encoder` and the images."""
        self.config, self.dtype, self.image_size, self.width, self.settings = config, dtype, image_size, width, settings
        self.num_classes, self.crop_pct = config.num_classes, config.crop_pct
        self.net = heads.LinearProbe(config.num_classes)
        self.opened = {}  # {split: its features}; the k-NN classifier looks in those of "train"
        self._logits = jax.jit(lambda params, rows: self.net.apply({"params": params["linear_probe"]}, rows))

    @property
    def example(self):
        return {"features": jax.ShapeDtypeStruct((self.width,), np.float32), "label": jax.ShapeDtypeStruct((), np.int32)}

    def init(self, rng):
        return {"linear_probe": self.net.init(rng, jnp.zeros((1, self.width)))["params"]}

    def load_frozen(self):
        return {"encoder": self._encoder}

    def load_pretrained(self):
        """The statistics of the training features."""
        rows = self.opened["train"].features
        scale = 1 / np.sqrt(rows.var(0) + NORM_EPS)
        return {"linear_probe": {"norm_scale": scale, "norm_bias": -rows.mean(0) * scale}}

    def open_source(self, split: str, data: pipeline.Config) -> features.Features:
        """The features of a split, of "train" after the few-shot choice. Raises UserError as the images' source does."""
        for name in {"train", split} - self.opened.keys():
            with jax.set_mesh(self._mesh):  # the loop's is not there yet
                found = self._features(name, data)
            few = name == "train" and self.config.shots
            self.opened[name] = found.few(self.config.shots, self.config.shots_seed) if few else found
        return self.opened[split]

    @functools.cached_property
    def _mesh(self):
        return partition.make_mesh(partition.Config())

    def _features(self, split: str, data: pipeline.Config) -> features.Features:
        config = self.config
        source = pipeline.open_source(data, split, self.image_size)
        tasks.check_classes(source, self.num_classes, "config.model.num_classes")
        settings = *self.settings, config.pooling, config.crop_pct, jnp.dtype(self.dtype).name
        key = features.identity(parameters.content_hash(self._encoder), source.fingerprint(times=True), repr(settings))
        files.require_writable(config.cache, "config.model.cache")
        found = features.cached(config.cache, key, source, lambda: self._compute(source, data))
        if found.labels.max() >= self.num_classes:
            raise errors.UserError(
                f"config.model.num_classes = {self.num_classes}, but {source!r} has label {found.labels.max()}"
            )
        return found

    def _compute(self, source, data: pipeline.Config):
        print(f"computing the features of {source!r}")
        transform = transforms.eval_image(self.image_size, self.config.crop_pct)
        frozen = partition.put({"encoder": self._encoder}, partition.replicated(self._mesh))
        function = functools.partial(jax.jit(self.features), {}, frozen)
        size = partition.batch_size(BATCH_SIZE, self._mesh)
        for rows, labels, valid in features.batches_of(source, transform, function, data, size, self._mesh):
            yield rows[valid], labels[valid]

    def loss(self, params, frozen, batch, rng, train: bool):
        logits = self._logits(params, batch["features"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
        return loss, {"loss": loss}

    def logits(self, params, frozen, image):
        return self._logits(params, self.features(params, frozen, image))

    def evaluate(self, params, frozen, batches, source):
        """As the task `classification`; knn_top1 (weighted votes), knn_plain_top1 (one vote each)."""
        config, bank, found = self.config, self.opened["train"], []
        k = min(config.neighbours, len(bank))
        neighbours = functools.partial(
            nearest.votes, jnp.asarray(bank.features), jnp.asarray(bank.labels),
            k=k, temperature=config.temperature, num_classes=self.num_classes,
        )  # fmt: skip

        def each():
            for batch in batches:
                label, valid = partition.whole((batch["label"], batch["valid"]))
                if k:
                    voted = partition.whole(neighbours(batch["features"]))
                    names = ("knn_top1", "knn_plain_top1")
                    found.append(({n: metrics.in_top(v, label, 1) for n, v in zip(names, voted)}, valid))
                yield self._logits(params, batch["features"]), label, valid

        scalars, shown, _ = classification.report(each(), self.num_classes)
        return tasks.Results(scalars | averages.mean_over(found), shown)

    def transform(self, split: str, data: pipeline.Config):
        return as_it_is


class Task(Probe):
    """See `addp_jax.tasks`."""

    def __init__(self, config: Config, dtype):
        self.block = config.encoder.depth if config.block == -1 else config.block
        super().__init__(config, dtype, config.encoder.image_size, config.encoder.width, (config.encoder, self.block))

    @functools.cached_property
    def _encoder(self):
        config = self.config
        init = functools.partial(vit.init, config.encoder)
        return encoder.load(config.encoder_weights, init, config.encoder, "config.model.encoder_weights")

    def features(self, params, frozen, image):
        config = self.config
        return heads.block_features(config.encoder, frozen["encoder"], images.to_unit(image), self.block, config.pooling, self.dtype)


def as_it_is(example: dict, rng: np.random.Generator) -> dict:
    return example

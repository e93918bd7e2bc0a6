"""Fine-tune the encoder end to end as a classifier of images (Figure 5b of the paper; the release's main_finetune.py)."""

from __future__ import annotations

import functools

import jax
import numpy as np
import optax

from addp_jax import partition, pictures, schema, tasks
from addp_jax.data import augment, pipeline, transforms
from addp_jax.metrics import averages
from addp_jax.metrics import classification as metrics
from addp_jax.models import heads
from addp_jax.ops import images, mixup
from addp_jax.weights import encoder, encoder_input


@schema.config
class Config(encoder_input.Config):
    """Fields of `config.model`."""

    net: heads.Config = heads.Config()
    mixup: float = schema.field(0.8, least=0, matters=schema.TRAINING)  # alpha; 0 = off
    cutmix: float = schema.field(1.0, least=0, matters=schema.TRAINING)  # alpha; 0 = off
    label_smoothing: float = schema.field(0.1, least=0, below=1, matters=schema.TRAINING)
    augment: augment.Config = schema.field(augment.Config(), matters=schema.TRAINING)
    # Of the resized short side that the evaluation's centre crop keeps.
    crop_pct: float = schema.field(1.0, above=0, most=1, matters=schema.NOTHING)


class Task(tasks.Classifier):
    """See `addp_jax.tasks`."""

    compact = ("tokenizer",)
    layout = heads.LAYOUT

    def __init__(self, config: Config, dtype):
        self.config = config
        self.image_size = config.net.encoder.image_size
        self.num_classes, self.crop_pct = config.net.num_classes, config.crop_pct
        self.input = encoder_input.Input(config, config.net.encoder, dtype)
        self.net = heads.Classifier(config.net, dtype, self.input.num_codes)
        # Made here so that the second evaluation compiles nothing.
        self._logits = jax.jit(self.logits)

    def init(self, rng):
        return {"classifier": heads.init(self.net, rng)}

    def load_frozen(self):
        return self.input.frozen

    def load_pretrained(self):
        """The encoder that fine-tuning starts from. Everything else, and all of it without weights, starts at random."""
        init, path = functools.partial(heads.init, self.net), self.config.encoder_weights
        return encoder.pretrained(path, "classifier", init, self.config.net.encoder, self.input.frozen)

    def loss(self, params, frozen, batch, rng, train: bool):
        config = self.config
        mix_key, dropout_key = jax.random.split(rng)
        image, target = mixup.mix(
            mix_key, images.to_unit(batch["image"]), batch["label"], mixup=config.mixup, cutmix=config.cutmix,
            smoothing=config.label_smoothing, num_classes=self.num_classes,
        )  # fmt: skip
        inputs, rngs = self.input(frozen, image), {"dropout": dropout_key}
        logits = self.net.apply({"params": params["classifier"]}, inputs, train, rngs=rngs)
        loss = optax.softmax_cross_entropy(logits, target).mean()
        return loss, {"loss": loss}

    def logits(self, params, frozen, image):
        return self._apply(params, frozen, image)

    def features(self, params, frozen, image):
        """What the classes are read off."""
        return self._apply(params, frozen, image, method="features")

    def _apply(self, params, frozen, image, **settings):
        return self.net.apply({"params": params["classifier"]}, self.input(frozen, images.to_unit(image)), **settings)

    def evaluate(self, params, frozen, batches, source):
        """Loss, top-1 and top-5 accuracy and that of the classes; the confusion picture."""
        logits = functools.partial(self._logits, params, frozen)
        return report(((logits(batch["image"]), batch["label"], batch["valid"]) for batch in batches), self.num_classes)

    def transform(self, split: str, data: pipeline.Config):
        if split == "eval":
            return super().transform(split, data)
        crop = transforms.train_image(self.image_size, data.crop_scale, data.flip)
        return tasks.Labelled(augment.AugmentedImage(crop, self.config.augment), self.num_classes)


def report(batches, num_classes: int) -> tasks.Results:
    """Of an evaluation from (logits [B,C], labels [B], valid bool [B]) of its batches.

    top1, top5: accuracy over the examples; class_mean, class_worst: over the classes that have examples;
    class/0, class/1, ...: of each, where there are few. The picture shows those of all classes. All follow the one
    rule of `metrics.classification`: ties and scores that are not finite are never right.
    """
    tally = metrics.Tally(num_classes)

    def each():
        for batch in batches:
            logits, labels, valid = partition.whole(batch)
            tally.add(labels[valid], metrics.decisions(logits)[valid])
            values = {"loss": metrics.cross_entropy(logits, labels)}
            yield values | {f"top{k}": metrics.in_top(logits, labels, k) for k in (1, 5)}, valid

    scalars = averages.mean_over(each())
    if not scalars:
        return tasks.Results({}, {})
    of_classes = tally.accuracy()
    scalars |= {"class_mean": float(np.nanmean(of_classes)), "class_worst": float(np.nanmin(of_classes))}
    if num_classes <= pictures.NUMBERED_CLASSES:
        scalars |= {f"class/{n}": float(value) for n, value in enumerate(of_classes) if np.isfinite(value)}
    return tasks.Results(scalars, {"confusion": pictures.confusion(tally.examples, tally.hits, tally.matrix)})

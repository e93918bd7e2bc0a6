"""Train a small convolutional classifier: the judge of generated images (addp_jax/measuring/judge.py).

A classifier that has seen only good images is sure of its answer on noise, too. So a share of each training batch is
spoiled beyond recognition and has the uniform distribution as its target (outlier exposure, arXiv:1812.04606).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax
from einops import rearrange

from addp_jax import partition, pictures, schema, tasks
from addp_jax.metrics import averages
from addp_jax.metrics import classification as metrics
from addp_jax.models import convnet
from addp_jax.ops import images

NUM_PICTURES = 32  # of the evaluation's grid
BLUR = (0.06, 0.16)  # standard deviation of the blur that spoils an image, fraction of its side
NOISE_SCALE = (0.005, 0.1)  # of the coloured noise that replaces an image, fraction of its side
BLOCKS = 4  # along each side, for an image whose blocks are shuffled


@schema.config
class Config:
    """Fields of `config.model`."""

    net: convnet.Config = convnet.Config()
    label_smoothing: float = schema.field(0.05, least=0, below=1, matters=schema.TRAINING)
    # Standard deviation of the pixel noise on training images, at most; drawn per image.
    noise: float = schema.field(0.08, least=0, matters=schema.TRAINING)
    # Share of the training images that are spoiled and belong to no class.
    outliers: float = schema.field(0.25, least=0, below=1, matters=schema.TRAINING)


class Task(tasks.Classifier):
    """See `addp_jax.tasks`."""

    layout = convnet.LAYOUT

    def __init__(self, config: Config, dtype):
        self.config = config
        self.image_size, self.num_classes = config.net.image_size, config.net.num_classes
        self.net = convnet.ConvNet(config.net, dtype)

    def init(self, rng):
        return {"convnet": convnet.init(self.net, rng)}

    def loss(self, params, frozen, batch, rng, train: bool):
        """Cross-entropy; `accuracy` is that of the images which were not spoiled."""
        values, kept = self._per_example(params, batch, rng, train)
        accuracy = (values["accuracy"] * kept).sum() / jnp.maximum(kept.sum(), 1)
        return values["loss"].mean(), {"loss": values["loss"].mean(), "accuracy": accuracy}

    def _per_example(self, params, batch, rng, train: bool):
        """Loss, accuracy and top class with its probability, each [B], and `kept` bool [B]: not spoiled."""
        config, num_classes = self.config, self.config.net.num_classes
        image = images.to_unit(batch["image"])
        target = optax.smooth_labels(jax.nn.one_hot(batch["label"], num_classes), config.label_smoothing)
        kept = jnp.ones(len(image), bool)
        if train:
            noise_key, share_key, spoil_key = jax.random.split(rng, 3)
            kept = jax.random.uniform(share_key, kept.shape) >= config.outliers
            image = jnp.where(kept[:, None, None, None], add_noise(noise_key, image, config.noise), spoil(spoil_key, image))
            target = jnp.where(kept[:, None], target, 1 / num_classes)
        logits = self.net.apply({"params": params["convnet"]}, image)
        top = logits.argmax(-1)
        values = {
            "loss": optax.softmax_cross_entropy(logits, target),
            "accuracy": metrics.in_top(logits, batch["label"], 1, jnp).astype(jnp.float32),
            "top": top,
            "confidence": jax.nn.softmax(logits).max(-1),
        }
        return values, kept

    def evaluate(self, params, frozen, batches, source):
        """Loss, accuracy and mean probability of the top class; the first images with their predicted class number."""
        predict = jax.jit(functools.partial(self._per_example, rng=None, train=False))
        shown = {}

        def each():
            for batch in batches:
                found = predict(params, {name: batch[name] for name in ("image", "label")})
                (values, _), valid = partition.whole((found, batch["valid"]))
                top = values.pop("top")
                if not shown:
                    captions = [f"{n} {p:.0%}" for n, p in zip(top, values["confidence"])][:NUM_PICTURES]
                    shown["predictions"] = pictures.contact_sheet(captions, partition.whole(batch["image"])[:NUM_PICTURES])
                yield values, valid

        return tasks.Results(averages.mean_over(each()), shown)

    def logits(self, params, frozen, image):
        return self.net.apply({"params": params["convnet"]}, images.to_unit(image))

    def features(self, params, frozen, image):
        """What the classes are read off."""
        return self.net.apply({"params": params["convnet"]}, images.to_unit(image), method="features")


def add_noise(rng, image, most: float):
    """Gaussian noise on `image` [B,H,W,3], its standard deviation uniform in [0, most] for each image."""
    scale_key, noise_key = jax.random.split(rng)
    scale = jax.random.uniform(scale_key, (len(image), 1, 1, 1), maxval=most)
    return image + scale * jax.random.normal(noise_key, image.shape)


def spoil(rng, image):
    """Each of `image` [B,H,W,3] heavily blurred, cut into shuffled blocks, or replaced by noise of some scale."""
    kind_key, blur_key, shuffle_key, scale_key, noise_key = jax.random.split(rng, 5)
    count, size = image.shape[:2]
    blurred = blur(image, size * jax.random.uniform(blur_key, (count,), minval=BLUR[0], maxval=BLUR[1]))
    scale = size * jax.random.uniform(scale_key, (count,), minval=NOISE_SCALE[0], maxval=NOISE_SCALE[1])
    noise = blur(jax.random.normal(noise_key, image.shape), scale)
    noise = jax.nn.sigmoid(2 * noise / noise.std((1, 2, 3), keepdims=True))
    kind = jax.random.randint(kind_key, (count, 1, 1, 1), 0, 3)
    return jnp.select([kind == 0, kind == 1], [blurred, shuffle_blocks(shuffle_key, image)], noise)


def blur(image, sigma):
    """Gaussian blur of `image` [B,S,S,3] with standard deviation `sigma` [B] in pixels."""
    places = jnp.arange(image.shape[1])
    distance = (places[:, None] - places[None]) ** 2
    weights = jax.nn.softmax(-distance[None] / (2 * sigma[:, None, None] ** 2))
    return jnp.einsum("bip,bjq,bpqc->bijc", weights, weights, image)


def shuffle_blocks(rng, image):
    """Each of `image` [B,S,S,3] cut into blocks, put together in random order."""
    blocks = rearrange(image, "b (n h) (m w) c -> b (n m) h w c", n=BLOCKS, m=BLOCKS)
    order = jnp.argsort(jax.random.uniform(rng, blocks.shape[:2]), axis=1)
    blocks = jnp.take_along_axis(blocks, order[:, :, None, None, None], axis=1)
    return rearrange(blocks, "b (n m) h w c -> b (n h) (m w) c", n=BLOCKS)

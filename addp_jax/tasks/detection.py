"""Boxes and masks of objects: Mask R-CNN on a plain vision transformer (ViTDet), fine-tuned end to end.

Losses, samples and proposals are detectron2's (projects/ViTDet). All shapes are fixed: images are padded to a square,
objects to `max_objects`, regions to their number. Padding changes no loss.
"""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from addp_jax import errors, partition, pictures, processes, schema, tasks
from addp_jax.data import coco, pipeline
from addp_jax.metrics import detection as metrics
from addp_jax.models import detector
from addp_jax.ops import boxes, detection_losses, images, masks, matching, proposals, roi_align
from addp_jax.weights import encoder, encoder_input

SHOWN = 4  # images in the evaluation's picture
SHOWN_FROM = 0.5  # score of a detection there


@schema.config
class Config(encoder_input.Config):
    """Fields of `config.model`. The defaults are ViTDet's."""

    net: detector.Config = detector.Config()
    max_objects: int = schema.field(100, least=1, matters=schema.TRAINING, tiny=8)  # of more the largest are kept
    mask_size: int = schema.field(112, least=8, matters=schema.TRAINING, tiny=32)  # cells a side in which masks travel
    jitter: tuple[float, float] = schema.field((0.1, 2.0), above=0, matters=schema.TRAINING)  # of the size that fits
    anchor_sizes: tuple[float, float, float, float, float] = schema.field((32.0, 64.0, 128.0, 256.0, 512.0), above=0)
    rpn_samples: int = schema.field(256, least=2, matters=schema.TRAINING, tiny=16)  # anchors of an image
    # Regions of an image for the box head; a quarter of them, at most, are positive and go to the mask head.
    roi_samples: int = schema.field(512, least=4, matters=schema.TRAINING, tiny=16)
    # The heads' losses are means over an image's regions, then over images, as on devices of one image each.
    mean_per_image: bool = schema.field(True, matters=schema.TRAINING)
    train_best: int = schema.field(2000, least=1, matters=schema.TRAINING, tiny=32)  # boxes of a level before NMS
    train_proposals: int = schema.field(1000, least=1, matters=schema.TRAINING, tiny=16)
    best: int = schema.field(1000, least=1, matters=schema.NOTHING, tiny=32)
    proposals: int = schema.field(1000, least=1, matters=schema.NOTHING, tiny=16)
    detections: int = schema.field(100, least=1, matters=schema.NOTHING, tiny=8)  # of an image, at most
    score_above: float = schema.field(0.05, least=0, below=1, matters=schema.NOTHING)

    def __post_init__(self):
        if self.net.encoder.patch_size % 4:
            raise ValueError(f"net.encoder.patch_size: {self.net.encoder.patch_size} is not a multiple of 4")
        if self.mask_size % 8:
            raise ValueError(f"mask_size: {self.mask_size} is not a multiple of 8")
        if self.jitter[0] > self.jitter[1]:
            raise ValueError(f"jitter: {self.jitter}; use two rising factors")


class Task(tasks.Detector):
    """See `addp_jax.tasks`."""

    compact = ("tokenizer",)
    layout = detector.LAYOUT

    def __init__(self, config: Config, dtype):
        self.config = config
        self.image_size = config.net.encoder.image_size
        self.num_classes = config.net.num_classes
        self.input = encoder_input.Input(config, config.net.encoder, dtype)
        self.net = detector.Detector(config.net, dtype, self.input.num_codes)
        self.strides = tuple(config.net.encoder.patch_size * k // 4 for k in (1, 2, 4, 8, 16))
        self._detect = jax.jit(self.detect)

    @property
    def example(self):
        size, count, bits = self.image_size, self.config.max_objects, self.config.mask_size
        shapes = {
            "image": ((size, size, 3), np.uint8), "size": ((2,), np.int32), "boxes": ((count, 4), np.float32),
            "classes": ((count,), np.int32), "masks": ((count, bits, bits // 8), np.uint8),
        }  # fmt: skip
        return {name: jax.ShapeDtypeStruct(*spec) for name, spec in shapes.items()}

    @property
    def evaluation_fields(self):
        return *self.example, "image_id", "scale", "original_size"

    def init(self, rng):
        return {"detector": detector.init(self.net, rng)}

    def load_frozen(self):
        return self.input.frozen

    def load_pretrained(self):
        """The encoder that fine-tuning starts from; its relative positions, and all else, start anew."""
        init, path = functools.partial(detector.init, self.net), self.config.encoder_weights
        return encoder.pretrained(path, "detector", init, self.config.net.encoder, self.input.frozen)

    def open_source(self, split, data):
        source = pipeline.open_source(data, split, self.image_size)
        if not source.has_objects:
            raise errors.UserError(f"config.data.source: {data.source} has no boxes of objects; use coco or shapes")
        tasks.check_classes(source, self.num_classes, of_images=False)
        return source

    def transform(self, split, data):
        shared = self.image_size, self.config.max_objects, self.config.mask_size
        train = coco.TrainDetection(*shared, self.config.jitter, data.flip)
        return train if split == "train" else coco.EvalDetection(*shared)

    def fit(self, image):
        example = self.transform("eval", pipeline.Config())({"image": image, "index": 0}, np.random.default_rng(0))
        return {name: example[name] for name in ("image", "size", "scale", "original_size")}

    def loss(self, params, frozen, batch, rng, train: bool):
        rngs = jax.random.split(rng, 3)
        apply = functools.partial(self.net.apply, {"params": params["detector"]})
        image = self.input(frozen, images.to_unit(batch["image"]), batch["size"])
        levels = apply(image, batch["size"], train, method="features", rngs={"dropout": rngs[0]})
        logits, deltas = zip(*apply(levels, method="propose"))
        priorities = self._priorities(rngs[1], batch, sum(level.shape[1] for level in logits))
        losses = self._rpn_losses(logits, deltas, batch, priorities)
        config, objects, classes = self.config, batch["boxes"], batch["classes"]
        found = self._propose(logits, deltas, batch["size"], config.train_best, config.train_proposals)
        priorities = self._priorities(rngs[2], batch, config.train_proposals + objects.shape[1])
        sample = functools.partial(
            detection_losses.sample_regions, num=config.roi_samples, positive_fraction=0.25, background=self.num_classes
        )
        regions = partition.each(sample, found, objects, classes, priorities)
        logits, deltas = self._boxes(apply, levels, regions.boxes)
        cls, box = partition.each(detection_losses.boxes, regions, objects, logits, deltas)
        positives = jax.tree.map(lambda leaf: leaf[:, : config.roi_samples // 4], regions)
        logits = self._masks(apply, levels, positives.boxes, jnp.where(positives.positive, positives.classes, 0))
        mask = partition.each(detection_losses.masks, positives, objects, batch["masks"], logits)
        sums = {"loss_cls": cls, "loss_box_reg": box, "loss_mask": mask}
        losses |= {name: detection_losses.mean(each, config.mean_per_image) for name, each in sums.items()}
        loss = sum(losses.values())
        return loss, {"loss": loss, **losses}

    def _priorities(self, rng, batch, num: int):
        """int32 [B,num]: in which order boxes of each image are taken; see `matching.sample`."""
        return jax.vmap(lambda key: matching.random_priority(key, num))(jax.random.split(rng, len(batch["image"])))

    def _rpn_losses(self, logits, deltas, batch, priorities):
        num, anchors = self.config.rpn_samples, np.concatenate(self._anchors(logits))
        one = lambda *example: detection_losses.rpn(anchors, *example, num=num)
        logits, deltas = (jnp.concatenate(levels, 1) for levels in (logits, deltas))
        classes, boxes = partition.each(one, logits, deltas, batch["boxes"], batch["classes"] >= 0, priorities)
        return {"loss_rpn_cls": classes.mean(), "loss_rpn_loc": boxes.mean()}

    def _anchors(self, logits):
        """Of each level [A,4]; images are square."""
        sides = [round((level.shape[1] / detector.ASPECT_RATIOS) ** 0.5) for level in logits]
        return boxes.anchors([(side, side) for side in sides], self.strides, self.config.anchor_sizes)

    def _propose(self, logits, deltas, size, best: int, num: int) -> proposals.Proposals:
        anchors = self._anchors(logits)
        one = lambda logits, deltas, size: proposals.propose(anchors, logits, deltas, size, per_level=best, num=num)
        return partition.each(one, logits, deltas, size)

    def _pooled(self, levels, regions, bins: int):
        """Features [B*R,bins,bins,channels] of regions [B,R,4]."""
        pooled = roi_align.pool(levels[:4], regions, bins, strides=self.strides[:4])
        return pooled.reshape(-1, *pooled.shape[2:])

    def _boxes(self, apply, levels, regions):
        """Logits [B,R,C+1] and deltas [B,R,C,4] of regions [B,R,4]."""
        outputs = apply(self._pooled(levels, regions, detector.BOX_POOL), method="boxes")
        return [output.reshape(*regions.shape[:2], *output.shape[1:]) for output in outputs]

    def _masks(self, apply, levels, regions, classes):
        """Logits [B,R,28,28] of the `classes` [B,R] of regions [B,R,4]."""
        logits = apply(self._pooled(levels, regions, detector.MASK_POOL), method="masks")
        logits = detector.of_class(logits, classes.reshape(-1))
        return logits.reshape(*regions.shape[:2], *logits.shape[1:])

    def detect(self, params, frozen, image, size):
        config, apply = self.config, functools.partial(self.net.apply, {"params": params["detector"]})
        levels = apply(self.input(frozen, images.to_unit(image), size), size, method="features")
        logits, deltas = zip(*apply(levels, method="propose"))
        found = self._propose(logits, deltas, size, config.best, config.proposals)
        logits, deltas = self._boxes(apply, levels, found.boxes)
        detect = functools.partial(proposals.detect, num=config.detections, score_above=config.score_above)
        detections = partition.each(detect, logits, deltas, found.boxes, found.valid, size)
        return detections, jax.nn.sigmoid(self._masks(apply, levels, detections.boxes, detections.classes))

    def evaluate(self, params, frozen, batches, source):
        """COCO's 12 figures of boxes and of masks, each class's AP; the first images beside the truth; the results.

        Each process handles the images of its own devices. A figure is -1 where the truth has no such object.
        """
        truth, rows, shown = truth_of(source), {}, []
        category_ids = sorted(category["id"] for category in truth["categories"])
        for batch in batches:
            outputs = self._detect(params, frozen, batch["image"], batch["size"])
            batch, (found, probs) = jax.tree.map(partition.own_rows, (batch, outputs))
            for k in np.flatnonzero(batch["valid"]):
                example, one, prob = jax.tree.map(lambda leaf: leaf[k], (batch, found, probs))
                one = one._replace(valid=one.valid & (one.classes < len(category_ids)))  # those that the data knows
                if len(shown) < 2 * SHOWN:
                    shown += _beside_truth(example, one, prob, tasks.numbered(source.classes, self.num_classes))
                objects = masks.in_original(one, prob, example["scale"], example["original_size"])
                image_id = int(example["image_id"])
                rows[image_id] = metrics.results(image_id, *objects, category_ids=category_ids)
        rows = processes.gathered(rows)
        found = [row for image in rows.values() for row in image]
        scores = metrics.evaluate(truth, found, image_ids=rows)
        scalars, names = dict(scores.scalars), {row["id"]: row["name"] for row in truth["categories"]}
        for kind, values in scores.classes.items():
            named = zip((names[number] for number in category_ids), values[:, 0])
            scalars |= {f"{kind}_AP/{name}": float(value) for name, value in named if np.isfinite(value)}
        shown = {"detections": pictures.grid(np.stack(shown), columns=2)} if shown else {}
        return tasks.Results(scalars, shown, {"results.json": json.dumps(found)})


def truth_of(source) -> dict:
    """The objects of a source in COCO's format: the file's, or made from the masks of generated pictures."""

    def objects(number: int):
        example = source[number]
        boxes = example["boxes"][:, [1, 0, 3, 2]]
        return example["index"], example["image"].shape[:2], boxes, example["classes"], example["masks"]

    return source.ground_truth() or metrics.ground_truth(map(objects, range(len(source))), source.classes)


def _beside_truth(example, found, probs, names) -> list[np.ndarray]:
    """Two pictures of the network's image: what is found in it, and what is there."""
    image = example["image"]
    located, scores, labels, drawn = masks.in_original(found, probs, np.ones(2), np.array(image.shape[:2]))
    sure = scores >= SHOWN_FROM
    guess = located[sure], drawn[sure], [names[n] for n in labels[sure]], scores[sure]
    there = example["classes"] >= 0
    bits = np.unpackbits(example["masks"][there], axis=-1)
    true = example["boxes"][there], masks.paste(bits, example["boxes"][there], *image.shape[:2])
    names = [names[n] for n in example["classes"][there]]
    return [pictures.detections(image, *guess), pictures.detections(image, *true, names)]

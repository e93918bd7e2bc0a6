"""The class of every pixel: UperNet on a plain vision transformer, fine-tuned end to end.

Losses, augmentation and evaluation are mmsegmentation's (configs/mae). Training sees crops of one size; an evaluation
sees whole images of their own sizes, window by window.
"""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import numpy as np

from addp_jax import errors, partition, pictures, processes, schema, tasks
from addp_jax.data import pipeline, segmentation
from addp_jax.metrics import segmentation as metrics
from addp_jax.models import segmenter
from addp_jax.ops import images, windows
from addp_jax.ops.segmentation import cross_entropy
from addp_jax.weights import encoder, encoder_input

AUXILIARY_WEIGHT = 0.4  # of the second head's loss
SHOWN = 4  # images in the evaluation's picture
SHOWN_SIDE = 512  # pixels; of larger images every second, third... pixel is shown


@schema.config
class Config(encoder_input.Config):
    """Fields of `config.model`. The defaults are those of mmsegmentation's MAE with UperNet."""

    net: segmenter.Config = segmenter.Config()
    scale: tuple[float, float] = schema.field((0.5, 2.0), above=0, matters=schema.TRAINING)  # of the crop's short side
    # Of a crop, of one class, if ten tries find such a crop.
    largest_share: float = schema.field(0.75, above=0, most=1, matters=schema.TRAINING)
    colours: bool = schema.field(True, matters=schema.TRAINING)  # distort brightness, contrast, saturation, hue
    # The loss is a mean over the pixels that count, as in Hugging Face's UperNet, not over all pixels.
    counted_only: bool = schema.field(False, matters=schema.TRAINING)
    windows: windows.Config = schema.field(windows.Config(), matters=schema.NOTHING)  # of an evaluation

    def __post_init__(self):
        if self.net.num_classes > segmentation.IGNORED:
            raise ValueError(f"net.num_classes: {self.net.num_classes}; label maps tell {segmentation.IGNORED} at most")
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale: {self.scale}; use two rising factors")
        if self.windows.mode == "whole":
            raise ValueError('windows.mode: "whole"; the encoder takes images of image_size alone, use "slide"')


class Task(tasks.Segmenter):
    """See `addp_jax.tasks`."""

    compact = ("tokenizer",)
    layout = segmenter.LAYOUT
    whole_images = True

    def __init__(self, config: Config, dtype):
        self.config = config
        self.image_size = config.net.encoder.image_size
        self.num_classes = config.net.num_classes
        self.input = encoder_input.Input(config, config.net.encoder, dtype)
        self.net = segmenter.Segmenter(config.net, dtype, self.input.num_codes)
        self._logits = jax.jit(self.logits)

    @property
    def example(self):
        size = self.image_size
        shapes = {"image": ((size, size, 3), np.uint8), "label": ((size, size), np.uint8), "size": ((2,), np.int32)}
        return {name: jax.ShapeDtypeStruct(*spec) for name, spec in shapes.items()}

    @property
    def evaluation_fields(self):
        return "image", "label", "index"

    def init(self, rng):
        return {"segmenter": segmenter.init(self.net, rng)}

    def load_frozen(self):
        return self.input.frozen

    def load_pretrained(self):
        """The encoder that fine-tuning starts from; its relative positions and LayerScale, and all else, start anew."""
        init, path = functools.partial(segmenter.init, self.net), self.config.encoder_weights
        return encoder.pretrained(path, "segmenter", init, self.config.net.encoder, self.input.frozen)

    def open_source(self, split, data):
        source = pipeline.open_source(data, split, self.image_size)
        if not source.has_label_maps:
            raise errors.UserError(f"config.data.source: {data.source} has no label maps; use label_maps or shapes")
        if source.has_objects:  # whose classes stand behind that of the background
            source.classes = segmentation.shapes_classes(source.classes, data.shift_labels)
        tasks.check_classes(source, self.num_classes, of_images=False)
        return source

    def transform(self, split, data):
        config, labels = self.config, segmentation.Labels(self.num_classes, data.ignored_label, data.shift_labels)
        if split == "eval":
            return segmentation.EvalSegmentation(labels)
        changes = config.scale, config.largest_share, data.flip, config.colours
        return segmentation.TrainSegmentation(self.image_size, labels, *changes)

    def loss(self, params, frozen, batch, rng, train: bool):
        params, size, statistics = params["segmenter"], batch["size"], {}
        image = self.input(frozen, images.to_unit(batch["image"]), size)
        if train:
            logits, measured = segmenter.training_logits(self.net, params, image, size, rng)
            statistics = {tasks.STATISTICS: {"segmenter": measured}}
        else:
            logits = self.net.apply({"params": params}, image, size)
        main, auxiliary = (cross_entropy(each, batch["label"], self.config.counted_only) for each in logits)
        auxiliary = AUXILIARY_WEIGHT * auxiliary
        loss = main + auxiliary
        return loss, {"loss": loss, "loss_main": main, "loss_auxiliary": auxiliary, **statistics}

    def logits(self, params, frozen, image):
        """`image` uint8 [B,S,S,3] -> float32 [B,s,s,C]; for patches of 16 pixels s is S/4."""
        image = self.input(frozen, images.to_unit(image))
        logits = self.net.apply({"params": params["segmenter"]}, image, method="logits")
        return partition.constrain(logits, "batch", None, None, None)

    def segment(self, params, frozen, image, batch: int = 0):
        mesh, config, crop = partition.current(), self.config.windows, self.image_size
        config = dataclasses.replace(config, batch=batch or config.batch)
        run = lambda crops: self._logits(params, frozen, crops)
        if not mesh.empty:
            rows = len(partition.rows(mesh, partition.batch_size(config.batch, mesh)))
            config = dataclasses.replace(config, batch=rows)

            def run(crops):
                with jax.set_mesh(mesh):
                    return partition.own_rows(self._logits(params, frozen, partition.of_process(crops, mesh)))

        own = 0 if image is None else windows.calls(image.shape[:2], crop, config)
        more = processes.largest(own) - own  # a program of several processes must be called by all of them
        with partition.one_device():
            label = None if image is None else windows.segment(image, run, crop, config)
            for _ in range(more):
                run(np.zeros((config.batch, crop, crop, 3), np.uint8))
        return label

    def evaluate(self, params, frozen, batches, source):
        """mIoU, mAcc and aAcc over whole images, 0 to 1, and of few classes each one's IoU; IoU.json has those of all.

        The pictures: how much of each class was taken for which, and the first images beside the truth.
        """
        names = tasks.numbered(source.classes, self.num_classes)
        matrix, shown = np.zeros((self.num_classes,) * 2, np.int64), []
        for example in batches:
            found = self.segment(params, frozen, example["image"] if example["valid"] else None)
            if found is None:
                continue
            matrix += metrics.confusion(found, example["label"], self.num_classes)
            if len(shown) < SHOWN:
                shown.append(_beside_truth(example, found, names))
        mesh = partition.current()
        number = 0 if mesh.empty else partition.share(mesh)[0]
        parts = processes.gathered({str(number): matrix.tolist()})
        return report(np.sum([np.array(part) for part in parts.values()], axis=0), names, shown)


def report(matrix: np.ndarray, names, shown) -> tasks.Results:
    """Of the confusion matrix int64 [C,C] of all. Figures without a value, as of a class not there, are left out.

    shown: (caption, picture) of some images.
    """
    scores = metrics.scores(matrix)
    rows = [
        {"class": name, "IoU": _known(iou), "accuracy": _known(accuracy), "pixels": int(pixels)}
        for name, iou, accuracy, pixels in zip(names, scores.iou, scores.accuracy, matrix.sum(1))
    ]
    scalars = {name: value for name, value in scores.scalars.items() if np.isfinite(value)}
    if len(names) <= pictures.NUMBERED_CLASSES:
        scalars |= {f"IoU/{row['class']}": row["IoU"] for row in rows if row["IoU"] is not None}
    drawn = {"confusion": pictures.confusion(matrix.sum(1), np.diag(matrix), matrix)}
    if shown:
        drawn["segmentation"] = pictures.captioned(shown)
    return tasks.Results(scalars, drawn, {"IoU.json": json.dumps(rows, indent=1)})


def _known(value) -> float | None:
    return float(value) if np.isfinite(value) else None


def _beside_truth(example, found, names) -> tuple[str, np.ndarray]:
    """(caption, picture): what is found in an image, what is there, and the classes' colours."""
    step = -(-max(found.shape) // SHOWN_SIDE)
    image, found, true = (array[::step, ::step] for array in (example["image"], found, example["label"]))
    both = np.concatenate([image, image], axis=1), np.concatenate([found, true], axis=1)
    return f"image {int(example['index'])}: prediction, truth", pictures.segmentation(*both, names)

"""What the training loop knows of a task. Adding a task adds one file here and edits none.

A task file has a frozen dataclass `Config` (the fields of `config.model`) and a class `Task`:

    Task(config, dtype)            dtype: of the computation; parameters are float32
    image_size                     pixels along one side, as the network sees it
    init(rng) -> params            pure: it is jitted, and traced without running for full-size plans
    load_frozen() -> frozen        reads the weights that are not trained, as numpy arrays ({} = none)
    loss(params, frozen, batch, rng, train) -> (scalar, metrics)
                                   batch: {"image": uint8 [B,H,W,3], ...}; metrics: scalars by name
    evaluate(params, frozen, batches) -> (scalars, images)
                                   batches carry "valid" bool [B]; images: float [H,W,3] in [0,1] by name
    transform(split, data) -> callable   for the input pipeline; split "train" or "eval", data: its config

Where a task needs them:

    load_pretrained() -> params    those that do not start at random: a part of what init gives, as numpy arrays
    open_source(split, data) -> source   instead of the images that `data` describes
    compact                        names of networks that compute in `dtype` alone: where frozen, their kernels are kept in it
    reconstruct(params, frozen, image) -> image   of a tokenizer: float [B,H,W,3] in [0,1], the result not clipped
    nets(params, frozen), sampler, sampler_config   of a generator: see `addp_jax.samplers`
    load_for_sampling() -> frozen  what of load_frozen its nets read
    logits, features(params, frozen, image uint8 [B,H,W,3])   of a task that recognises images: [B,C], [B,D]
    num_classes   C, of a task with classes
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil

import numpy as np

from addp_jax import errors, parameters, schema
from addp_jax.data import pipeline, sources, transforms, walk


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def create(name: str, fields, dtype):
    """The task `name` with `fields` (a mapping, the user's `config.model`). Raises UserError on an unknown name or field."""
    if name not in names():
        raise errors.UserError(f"config.task: no task {name!r}; the tasks are {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    return module.Task(schema.build(module.Config, fields, "config.model"), dtype)


def image_transform(split: str, data: pipeline.Config, image_size: int):
    """Random resized crop and flip for "train", resize and centre crop for "eval"."""
    if split == "train":
        return transforms.train_image(image_size, data.crop_scale, data.flip)
    return transforms.eval_image(image_size)


def open_source(task, split: str, data: pipeline.Config):
    """What `task` reads in this split: its own source where it has one, else the images of `data`.

    Raises UserError if their classes do not fit the task's network, and what opening them raises.
    """
    if hasattr(task, "open_source"):
        return task.open_source(split, data)
    source = pipeline.open_source(data, split, task.image_size)
    if hasattr(task, "num_classes"):
        check_classes(source, task.num_classes)
    return source


def check_classes(source, num_classes: int, field: str = "config.model.net.num_classes") -> None:
    """Raises UserError unless the classes of `source`, where they are known, can be those of a network; says if they are few."""
    found, shown = len(source.classes), parameters.shortened(list(source.classes), walk.SHOWN)
    if found > num_classes:
        raise errors.UserError(f"{field} = {num_classes}, but the data has {found} classes: {shown}")
    base = source.source if isinstance(source, pipeline.Part) else source
    flat = isinstance(base, sources.ImageFolder) and (base.classes == ("all",) or base.labels.min() < 0)
    if flat or found == 1 < num_classes:
        raise errors.UserError(
            f"config.data.path: {source!r} does not tell the classes of its images (found: {shown}); "
            f"the network has {num_classes}: put the images of each class into a folder of their own, in both splits"
        )
    if 0 < found < num_classes:
        walk.announce(f"{source!r} has {found} classes ({shown}), the network {num_classes}: some are never seen")


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A transform that refuses labels outside 0..num_classes-1: not every source knows its classes beforehand."""

    transform: pipeline.Transform
    num_classes: int

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        if not 0 <= example["label"] < self.num_classes:
            where = example.get("path") or f"example {example.get('index', '?')}"
            raise errors.UserError(
                f"{where} has label {example['label']}; config.model.net.num_classes = {self.num_classes} allows "
                f"0..{self.num_classes - 1}"
            )
        return self.transform(example, rng)

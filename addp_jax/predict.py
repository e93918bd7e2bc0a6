"""`--mode=predict` and `--mode=features`: what a network says of a folder of own images."""

from __future__ import annotations

import dataclasses
import functools
import json
import os

import jax
import numpy as np

from addp_jax import errors, evaluate, partition, writers
from addp_jax.data import features, pipeline, sources, transforms

TOP = 5  # classes named per image
FORMATS = ("npz", "array_record")
NUM_PICTURES = 64  # images on the contact sheet


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of `config.predict`."""

    images: str = ""  # folder of own images
    output: str = ""  # folder; "" = <workdir>/predictions or <workdir>/features
    batch_size: int = 64
    format: str = "npz"  # of features: npz | array_record

    def __post_init__(self):
        if self.format not in FORMATS:
            raise errors.UserError(f"config.predict.format: {self.format!r}; use {' or '.join(FORMATS)}")
        if self.batch_size < 1:
            raise errors.UserError(f"config.predict.batch_size: {self.batch_size}; use at least 1")


def predict(program, config: Config, workdir: str) -> None:
    """Write `predictions.jsonl`, one line per image with its five most likely classes, and `predictions.png`."""
    names = class_names(program)
    output = config.output or os.path.join(workdir, "predictions")
    source, rows = over_images(program, config, workdir, "logits")
    if jax.process_index():
        return
    probs = np.asarray(jax.nn.softmax(np.concatenate([logits for logits, _ in rows])))
    order = np.argsort(-probs, axis=1)[:, :TOP]
    os.makedirs(output, exist_ok=True)
    path = os.path.join(output, "predictions.jsonl")
    with open(path, "w", encoding="utf-8") as file:
        for i, top in enumerate(order):
            scores = [[names[n], round(float(probs[i, n]), 4)] for n in top]
            file.write(json.dumps({"image": os.path.relpath(source.path(i), source.root), "top": scores}) + "\n")
    shown = range(min(len(source), NUM_PICTURES))
    transform, rng = transform_of(program.task), np.random.default_rng(0)
    images = np.stack([transform(source[i], rng)["image"] for i in shown])
    captions = [f"{names[order[i, 0]]} {probs[i, order[i, 0]]:.0%}" for i in shown]
    for written in (path, *writers.save_pictures(output, {"predictions": writers.contact_sheet(captions, images)})):
        print(written)


def write_features(program, config: Config, workdir: str) -> None:
    """Write the features of every image, in the order of their paths, with the paths and with labels.

    `features.npz`: features float32 [N,D], labels int32 [N], classes and paths; `features.array_record`: one record
    per image (see `features.write_records`). The label is the number of the image's sub-folder, in sorted order.
    """
    source, rows = over_images(program, config, workdir, "features")
    if jax.process_index():
        return
    path = os.path.join(config.output or os.path.join(workdir, "features"), f"features.{config.format}")
    paths = [os.path.relpath(source.path(i), source.root) for i in range(len(source))]
    classes, labels = np.unique([os.path.dirname(name).split(os.sep)[0] for name in paths], return_inverse=True)
    rows = [(np.concatenate([row for row, _ in rows]), labels)]
    if config.format == "npz":
        features.write(path, rows, classes, paths=np.array(paths))
    else:
        features.write_records(path, rows, paths)
    print(path)


def over_images(program, config: Config, workdir: str, name: str):
    """`(source, rows)`: the images, and (result, label) of the task's function `name` on them, batch by batch."""
    task, mesh = program.task, program.mesh
    if not hasattr(task, name):
        raise errors.UserError(f"config.task: {program.config.task} has no {name}; use classification or linear_probe")
    if not config.images:
        raise errors.UserError("config.predict.images is empty: give a folder of images")
    source = sources.open_folder(config.images, "config.predict.images")
    batch_size = partition.batch_size(config.batch_size, mesh)
    with jax.set_mesh(mesh):
        if name == "features" and hasattr(task, "open_source"):  # of a frozen encoder: nothing needs to be trained
            nets = {}, partition.put(task.load_frozen(), partition.replicated(mesh))
        else:
            nets = evaluate.load(program, workdir)
        function = functools.partial(jax.jit(getattr(task, name)), *nets)
        rows = list(features.batches_of(source, transform_of(task), function, program.config.data, batch_size, mesh))
    return source, rows


def transform_of(task):
    """The evaluation's transform, without its check of labels: own images have none."""
    return transforms.eval_image(task.image_size, task.config.crop_pct)


def class_names(program) -> tuple[str, ...]:
    """One per class of the network; numbers, said so, where the training data is not at hand and no file is given."""
    config, count = program.config, program.task.num_classes
    try:
        known = pipeline.class_names(config.data, program.task.image_size)
    except errors.UserError as error:
        if config.data.class_names:
            raise
        print(f"classes are numbered ({error}); name them with --config.data.class_names=FILE")
        known = ()
    return (*known, *(f"class {n}" for n in range(len(known), count)))[:count]

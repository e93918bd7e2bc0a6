"""`--mode=predict` and `--mode=features`: what a network says of a folder of own images."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib

import jax
import numpy as np

from addp_jax import errors, files, parameters, partition, pictures, schema, tasks
from addp_jax.data import class_names, features, transforms
from addp_jax.data.sources import image_folder

TOP = 5  # classes named per image
FORMATS = ("npz", "array_record")
NUM_PICTURES = 64  # images on the contact sheet
MOST_NAMED = 20  # unreadable files in a message


@schema.config
class Config:
    """Fields of `config.predict`."""

    images: str = ""  # folder of own images
    output: str = ""  # folder; "" = <workdir>/predictions or <workdir>/features
    batch_size: int = schema.field(64, least=1)
    format: str = schema.field("npz", choices=FORMATS)  # of features


def predict(program, config: Config, workdir: str) -> None:
    """Write `predictions.jsonl`, one line per image with its five most likely classes, and `predictions.png`."""
    tasks.require(program.task, program.config.task, tasks.Classifier)
    given = given_names(program)  # a mistake there is said before anything is computed
    output = output_of(config, os.path.join(workdir, "predictions"))
    source, readable, logits, identity = over_images(program, config, workdir, program.task.logits)
    names = given or recorded_names(program, identity, workdir)
    if jax.process_index() == 0:
        if not np.isfinite(logits).all():
            raise errors.UserError(f"{workdir}: the network's scores are NaN or infinite; it names nothing")
        probs = np.asarray(jax.nn.softmax(logits))
        order = np.argsort(-probs, axis=1)[:, :TOP]
        lines = []
        for path, classes, scores in zip(paths_of(source, readable), order, probs):
            top = [[names[n], round(float(scores[n]), 4)] for n in classes]
            lines.append(json.dumps({"image": path, "top": top}) + "\n")
        transform, rng = transform_of(program.task), np.random.default_rng(0)
        images = np.stack([transform(source[i], rng)["image"] for i in readable[:NUM_PICTURES]])
        captions = [f"{names[classes[0]]} {scores.max():.0%}" for classes, scores in zip(order, probs[:NUM_PICTURES])]
        path, sheet = os.path.join(output, "predictions.jsonl"), pictures.contact_sheet(captions, images)
        try:
            files.write_text(path, "".join(lines))
            print(path, *pictures.save_pictures(output, {"predictions": sheet}), sep="\n")
        except OSError as error:
            raise errors.UserError(f"cannot write to {output}: {files.reason(error)}") from error
    refuse_unreadable(source, readable)


def write_features(program, config: Config, workdir: str) -> None:
    """Write the features of every image, in the order of their paths, with the paths and with labels.

    `features.npz`: features float32 [N,D], labels int32 [N], classes and paths; `features.array_record`: one record
    per image (see `features.write_records`). The label is the number of the image's sub-folder, in sorted order.
    """
    tasks.require(program.task, program.config.task, tasks.Recogniser)
    output = output_of(config, os.path.join(workdir, "features"))
    trained = "" if program.task.features_are_frozen else workdir
    source, readable, rows, _ = over_images(program, config, trained, program.task.features)
    if jax.process_index() == 0:
        path, paths = os.path.join(output, f"features.{config.format}"), paths_of(source, readable)
        classes, labels = np.unique([os.path.dirname(name).split(os.sep)[0] for name in paths], return_inverse=True)
        if config.format == "npz":
            features.write(path, [(rows, labels)], classes, paths=np.array(paths))
        else:
            features.write_records(path, [(rows, labels)], [files.printable(name) for name in paths])
        print(path)
    refuse_unreadable(source, readable)


def paths_of(source, positions) -> list[str]:
    return [os.path.relpath(source.path(i), source.root) for i in positions]


def output_of(config: Config, default: str) -> str:
    """The folder to write to. Raises UserError if it cannot be written to or lies among the images."""
    output = config.output or default
    if config.images:
        images, folder = (pathlib.Path(path).resolve() for path in (config.images, output))
        if images in (folder, *folder.parents):
            place = f"{output} lies among the images of {config.images}"
            raise errors.UserError(f"config.predict.output: {place}; give another folder")
    files.require_writable(output, "config.predict.output")
    return output


def over_images(program, config: Config, workdir: str, function):
    """What `function(params, frozen, image)` of the task says of the images. workdir: "" = nothing is trained.

    Returns `(source, readable, results, identity)`: the images; the positions [n] of those that can be read; the
    results [n,...] of these; the record of the run.
    """
    task, mesh, identity = program.task, program.mesh, {}
    if not config.images:
        raise errors.UserError("config.predict.images is empty: give a folder of images")
    source = image_folder.open_folder(config.images, "config.predict.images")
    data = dataclasses.replace(program.config.data, on_unreadable="skip")
    batch_size, rows, read = partition.batch_size(config.batch_size, mesh), [], []
    with jax.set_mesh(mesh):
        nets, identity = program.load(workdir) if workdir else (({}, program.place(task.load_frozen())), {})
        function = functools.partial(jax.jit(function), *nets)
        for results, _, valid in features.batches_of(source, transform_of(task), function, data, batch_size, mesh):
            rows.append(results[valid])
            read.append(valid)
    return source, np.flatnonzero(np.concatenate(read)), np.concatenate(rows), identity


def refuse_unreadable(source, readable) -> None:
    """Raises UserError naming the images that could not be read, once everything else is written."""
    if len(readable) < len(source):
        skipped = np.setdiff1d(np.arange(len(source)), readable)
        names = parameters.shortened([source.path(i) for i in skipped], MOST_NAMED)
        raise errors.UserError(f"config.predict.images: {len(skipped)} of {len(source)} files cannot be read: {names}")


def transform_of(task):
    """The evaluation's transform, without its check of labels: a user's images have none."""
    return transforms.eval_image(task.image_size, task.crop_pct)


def given_names(program) -> tuple[str, ...]:
    """Those in the file config.data.class_names, one per class of the network, else (). Raises UserError."""
    path = program.config.data.class_names
    names, count = class_names.read(path) if path else (), program.task.num_classes
    if path and len(names) != count:
        problem = f"{path} has {len(names)} names, but the network has {count} classes"
        raise errors.UserError(f"config.data.class_names: {problem}")
    return names


def recorded_names(program, identity: dict, workdir: str) -> tuple[str, ...]:
    """One per class of the network: those that the run has on record, else numbers."""
    if not identity.get("data", {}).get("classes"):
        print(f"classes are numbered: {workdir} has no names on record; name them with config.data.class_names")
    return tasks.class_names(program.task, identity)

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
    source, rows, skipped, identity = over_images(program, config, workdir, program.task.logits)
    names = given or recorded_names(program, identity, workdir)
    if jax.process_index() == 0:
        logits = np.concatenate([logits for logits, _, _ in rows])
        if not np.isfinite(logits).all():
            raise errors.UserError(f"{workdir}: the network's scores are NaN or infinite; it names nothing")
        probs = np.asarray(jax.nn.softmax(logits))
        order = np.argsort(-probs, axis=1)[:, :TOP]
        readable = np.concatenate([index for _, _, index in rows])
        lines = []
        for row, i in enumerate(readable):
            scores = [[names[n], round(float(probs[row, n]), 4)] for n in order[row]]
            lines.append(json.dumps({"image": os.path.relpath(source.path(i), source.root), "top": scores}) + "\n")
        path = os.path.join(output, "predictions.jsonl")
        shown = readable[:NUM_PICTURES]
        transform, rng = transform_of(program.task), np.random.default_rng(0)
        images = np.stack([transform(source[i], rng)["image"] for i in shown])
        captions = [f"{names[order[row, 0]]} {probs[row, order[row, 0]]:.0%}" for row in range(len(shown))]
        try:
            files.write_text(path, "".join(lines))
            print(path)
            for picture in pictures.save_pictures(output, {"predictions": pictures.contact_sheet(captions, images)}):
                print(picture)
        except OSError as error:
            raise errors.UserError(f"cannot write to {output}: {files.reason(error)}") from error
    refuse_skipped(source, skipped)


def write_features(program, config: Config, workdir: str) -> None:
    """Write the features of every image, in the order of their paths, with the paths and with labels.

    `features.npz`: features float32 [N,D], labels int32 [N], classes and paths; `features.array_record`: one record
    per image (see `features.write_records`). The label is the number of the image's sub-folder, in sorted order.
    """
    tasks.require(program.task, program.config.task, tasks.Recogniser)
    output = output_of(config, os.path.join(workdir, "features"))
    frozen = program.task.features_are_frozen
    source, rows, skipped, _ = over_images(program, config, "" if frozen else workdir, program.task.features)
    if jax.process_index() == 0:
        path = os.path.join(output, f"features.{config.format}")
        readable = np.concatenate([index for _, _, index in rows])
        paths = [os.path.relpath(source.path(i), source.root) for i in readable]
        classes, labels = np.unique([os.path.dirname(name).split(os.sep)[0] for name in paths], return_inverse=True)
        rows = [(np.concatenate([row for row, _, _ in rows]), labels)]
        if config.format == "npz":
            features.write(path, rows, classes, paths=np.array(paths))
        else:
            features.write_records(path, rows, [files.printable(name) for name in paths])
        print(path)
    refuse_skipped(source, skipped)


def output_of(config: Config, default: str) -> str:
    """The folder to write to. Raises UserError if it cannot be written to or lies among the images."""
    output = config.output or default
    if config.images:
        images, place = (pathlib.Path(path).resolve() for path in (config.images, output))
        if images == place or images in place.parents:
            raise errors.UserError(f"config.predict.output: {output} lies among the images of {config.images}; give another folder")
    files.require_writable(output, "config.predict.output")
    return output


def over_images(program, config: Config, workdir: str, function):
    """What `function(params, frozen, image)` of the task says of the images. workdir: "" = nothing needs to be trained.

    Returns `(source, rows, skipped, identity)`: the images; (results, labels, positions in the source) batch by batch, of
    those that can be read; the positions of the others; and the record of the run.
    """
    task, mesh, identity = program.task, program.mesh, {}
    if not config.images:
        raise errors.UserError("config.predict.images is empty: give a folder of images")
    source = image_folder.open_folder(config.images, "config.predict.images")
    data = dataclasses.replace(program.config.data, on_unreadable="skip")
    batch_size, rows, first = partition.batch_size(config.batch_size, mesh), [], 0
    with jax.set_mesh(mesh):
        nets, identity = program.load(workdir) if workdir else (({}, program.place(task.load_frozen())), {})
        function = functools.partial(jax.jit(function), *nets)
        for results, labels, valid in features.batches_of(source, transform_of(task), function, data, batch_size, mesh):
            rows.append((results[valid], labels[valid], first + np.flatnonzero(valid)))
            first += len(valid)
    readable = np.concatenate([index for _, _, index in rows])
    return source, rows, np.setdiff1d(np.arange(len(source)), readable), identity


def refuse_skipped(source, skipped) -> None:
    """Raises UserError naming the images that could not be read, once everything else is written."""
    if len(skipped):
        names = parameters.shortened([source.path(i) for i in skipped], MOST_NAMED)
        raise errors.UserError(f"config.predict.images: {len(skipped)} of {len(source)} files cannot be read: {names}")


def transform_of(task):
    """The evaluation's transform, without its check of labels: a user's images have none."""
    return transforms.eval_image(task.image_size, task.crop_pct)


def given_names(program) -> tuple[str, ...]:
    """Those in the file config.data.class_names, one per class of the network; () without it. Raises UserError if they do not fit."""
    path = program.config.data.class_names
    if not path:
        return ()
    names, count = class_names.read(path), program.task.num_classes
    if len(names) != count:
        raise errors.UserError(f"config.data.class_names: {path} has {len(names)} names, but the network has {count} classes")
    return names


def recorded_names(program, identity: dict, workdir: str) -> tuple[str, ...]:
    """One per class of the network: those that the run has on record, else numbers. Where the data lies now does not matter."""
    count, names = program.task.num_classes, tuple(identity.get("data", {}).get("classes", ()))
    if not names:
        print(f"classes are numbered: {workdir} has no names on record; name them with config.data.class_names")
    return (*names, *(f"class {n}" for n in range(len(names), count)))

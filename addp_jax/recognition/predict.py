"""`--mode=predict` and `--mode=features`: what a network says of a folder of own images."""

from __future__ import annotations

import dataclasses
import functools
import json
import os

import jax
import numpy as np

from addp_jax import errors, files, partition, pictures, tasks
from addp_jax.data import features, transforms
from addp_jax.recognition import detect, own, segment

TOP = 5  # classes named per image
NUM_PICTURES = 64  # images on the contact sheet


def predict(program, config: own.Config, workdir: str) -> None:
    """Write `predictions.jsonl`, one line per image with its five most likely classes, and `predictions.png`.

    A task that finds objects writes those instead, see detect.py; one that segments images label maps, see segment.py.
    """
    if isinstance(program.task, tasks.Detector):
        return detect.detect(program, config, workdir)
    if isinstance(program.task, tasks.Segmenter):
        return segment.segment(program, config, workdir)
    tasks.require(program.task, program.config.task, tasks.Classifier)
    given = own.given_names(program)  # a mistake there is said before anything is computed
    output = own.output_of(config, os.path.join(workdir, "predictions"))
    source, readable, logits, identity = over_images(program, config, workdir, program.task.logits)
    names = given or own.recorded_names(program, identity, workdir)
    if jax.process_index() == 0:
        if not np.isfinite(logits).all():
            raise errors.UserError(f"{workdir}: the network's scores are NaN or infinite; it names nothing")
        probs = np.asarray(jax.nn.softmax(logits))
        order = np.argsort(-probs, axis=1)[:, :TOP]
        lines = []
        for path, classes, scores in zip(own.paths_of(source, readable), order, probs):
            top = [[names[n], round(float(scores[n]), 4)] for n in classes]
            lines.append(json.dumps({"image": path, "top": top}) + "\n")
        transform, rng = transform_of(program.task), np.random.default_rng(0)
        images = np.stack([transform(source[i], rng)["image"] for i in readable[:NUM_PICTURES]])
        captions = [f"{names[classes[0]]} {scores.max():.0%}" for classes, scores in zip(order, probs[:NUM_PICTURES])]
        path, sheet = os.path.join(output, "predictions.jsonl"), pictures.contact_sheet(captions, images)
        with files.explain(f"cannot write to {output}"):
            files.write_text(path, "".join(lines))
            print(path, *pictures.save_pictures(output, {"predictions": sheet}), sep="\n")
    own.refuse_unreadable(source, readable)


def write_features(program, config: own.Config, workdir: str) -> None:
    """Write the features of every image, in the order of their paths, with the paths and with labels.

    `features.npz`: features float32 [N,D], labels int32 [N], classes and paths; `features.array_record`: one record
    per image (see `features.write_records`). The label is the number of the image's sub-folder, in sorted order.
    """
    tasks.require(program.task, program.config.task, tasks.Recogniser)
    output = own.output_of(config, os.path.join(workdir, "features"))
    trained = "" if program.task.features_are_frozen else workdir
    source, readable, rows, _ = over_images(program, config, trained, program.task.features)
    if jax.process_index() == 0:
        path, paths = os.path.join(output, f"features.{config.format}"), own.paths_of(source, readable)
        classes, labels = np.unique([os.path.dirname(name).split(os.sep)[0] for name in paths], return_inverse=True)
        if config.format == "npz":
            features.write(path, [(rows, labels)], classes, paths=np.array(paths))
        else:
            features.write_records(path, [(rows, labels)], [files.printable(name) for name in paths])
        print(path)
    own.refuse_unreadable(source, readable)


def over_images(program, config: own.Config, workdir: str, function):
    """What `function(params, frozen, image)` of the task says of the images. workdir: "" = nothing is trained.

    Returns `(source, readable, results, identity)`: the images; the positions [n] of those that can be read; the
    results [n,...] of these; the record of the run.
    """
    task, mesh, identity = program.task, program.mesh, {}
    source = own.open_images(config)
    data = dataclasses.replace(program.config.data, on_unreadable="skip")
    batch_size, rows, read = partition.batch_size(config.batch_size, mesh), [], []
    with jax.set_mesh(mesh):
        nets, identity = program.load(workdir) if workdir else (({}, program.place(task.load_frozen())), {})
        function = functools.partial(jax.jit(function), *nets)
        for results, _, valid in features.batches_of(source, transform_of(task), function, data, batch_size, mesh):
            rows.append(results[valid])
            read.append(valid)
    return source, np.flatnonzero(np.concatenate(read)), np.concatenate(rows), identity


def transform_of(task):
    """The evaluation's transform, without its check of labels: a user's images have none."""
    return transforms.eval_image(task.image_size, task.crop_pct)

"""The mode predict of a task that finds objects: what is where in own images."""

from __future__ import annotations

import dataclasses
import functools
import json
import os

import jax
import numpy as np

from addp_jax import files, partition, pictures
from addp_jax.data import pipeline, transforms
from addp_jax.metrics import detection as metrics
from addp_jax.ops import masks
from addp_jax.recognition import own

SHOWN_FROM = 0.5  # score of an object in the pictures


def detect(program, config: own.Config, workdir: str) -> None:
    """Write `predictions.jsonl`, one line per image with its objects, and `pictures`, where the surer ones are drawn.

    An object has a name, a score, a box (x0, y0, x1, y1 in pixels, ends exclusive) and a mask as COCO's RLE.
    """
    given = own.given_names(program)  # a mistake there is said before anything is computed
    output, source = own.output_of(config, os.path.join(workdir, "predictions")), own.open_images(config)
    lines, readable = [], []
    with jax.set_mesh(program.mesh):
        nets, identity = program.load(workdir)
        names = given or own.recorded_names(program, identity, workdir)
        for index, (boxes, scores, labels, drawn) in objects_of(program, source, nets, config.batch_size):
            path = own.paths_of(source, [index])[0]
            named = [names[label] for label in labels]
            rows = zip(named, scores.tolist(), boxes.tolist(), map(metrics.encode, drawn))
            found = [dict(zip(("name", "score", "box", "mask"), row)) for row in rows]
            lines.append(json.dumps({"image": path, "objects": found}) + "\n")
            readable.append(index)
            if jax.process_index() == 0:
                image, sure = transforms.decode(source[index]["image"], path), scores >= SHOWN_FROM
                surest = [name for name, good in zip(named, sure) if good]
                picture = pictures.detections(image, boxes[sure], drawn[sure], surest, scores[sure])
                pictures.save_pictures(os.path.join(output, "pictures"), {path: picture})
    if jax.process_index() == 0:
        path = os.path.join(output, "predictions.jsonl")
        with files.explain(f"cannot write {path}"):
            files.write_text(path, "".join(lines))
        print(path, os.path.join(output, "pictures"), sep="\n")
    own.refuse_unreadable(source, np.array(readable, int))


def objects_of(program, source, nets, batch_size: int):
    """(position, `masks.in_original`) of every image that can be read, on every process."""
    task, mesh = program.task, program.mesh
    data = dataclasses.replace(program.config.data, on_unreadable="skip")
    size, found = partition.batch_size(batch_size, mesh), jax.jit(functools.partial(task.detect, *nets))
    batches = pipeline.eval_batches(
        source, task.transform("eval", data), batch_size=size, config=data, rows=partition.rows(mesh, size),
        fields=("image", "size", "scale", "original_size", "index"),
    )  # fmt: skip
    for batch in pipeline.to_device(batches, partition.batch_sharding(mesh)):
        outputs = found(batch["image"], batch["size"])
        batch.pop("image")
        batch, outputs = partition.whole((batch, outputs))
        for k in np.flatnonzero(batch["valid"]):
            detections, probs = jax.tree.map(lambda leaf: leaf[k], outputs)
            objects = masks.in_original(detections, probs, batch["scale"][k], batch["original_size"][k])
            yield int(batch["index"][k]), objects

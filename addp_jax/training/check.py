"""`--mode=check`: read a whole data set once, at the speed of training's pipeline, and list what is wrong with it."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import sys

import numpy as np

from addp_jax import errors, files, logs, tasks
from addp_jax.data import pipeline, transforms

BATCH_SIZE = 64
SPLITS = ("train", "eval")


def check(program) -> None:
    """Print a line for each problem and how many images were read; exit with status 2 if there is one.

    Unreadable images; labels that the task's network has no class for; images that are in both splits.
    Raises UserError as opening the splits does.
    """
    task, config = program.task, dataclasses.replace(program.config.data, num_train=0, num_eval=0)  # all of it
    opened = {split: pipeline.open_source(config, split, task.image_size) for split in SPLITS}
    problems, digests, count = [], {}, 0
    for split, source in opened.items():
        found, digests[split] = check_split(split, source, config, task.num_classes if isinstance(task, tasks.Classifier) else None)
        problems += found
        count += len(source)
    for digest in sorted(set(digests["train"]) & set(digests["eval"])):
        one, other = (opened[split][digests[split][digest]]["path"] for split in SPLITS)
        problems.append(f"{other} is in both splits, as {one} as well")
    if isinstance(task, tasks.Classifier):
        for split, source in opened.items():
            try:
                tasks.check_classes(source, task.num_classes)
            except errors.UserError as error:
                problems.append(f"{split}: {error}")
    for problem in problems:
        print(files.printable(problem))
    print(f"{count} images read, {len(problems)} problems")
    if problems:
        sys.exit(2)


@dataclasses.dataclass(frozen=True)
class Decoded:
    """A transform that decodes an image and keeps a hash of its file."""

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        del rng
        image = example["image"]
        transforms.decode(image, example["path"])
        data = image if isinstance(image, bytes) else image.tobytes()
        digest = np.frombuffer(hashlib.blake2b(data, digest_size=8).digest(), np.uint64)[0]
        return {"digest": digest, "label": np.int64(example["label"])}


def check_split(split: str, source, config: pipeline.Config, num_classes: int | None):
    """(problems, {hash of a file: its position}) of one split."""
    problems, digests, labels = [], {}, collections.Counter()
    reading = dataclasses.replace(config, on_unreadable="skip")
    progress = logs.Progress(len(source), unit=f"{split} image")
    with pipeline.eval_batches(source, Decoded(), batch_size=min(BATCH_SIZE, len(source)), config=reading) as batches:
        for index, batch in enumerate(batches):
            first = index * len(batch["valid"])
            for row in np.flatnonzero(batch["valid"]):
                digests.setdefault(int(batch["digest"][row]), first + int(row))
                label = int(batch["label"][row])
                if num_classes is not None and not 0 <= label < num_classes:
                    labels[label] += 1
            progress.update(min(first + len(batch["valid"]), len(source)))
        unreadable = sorted(batches.skipped)
    progress.close()
    for i in unreadable:
        try:
            example = source[i]
            transforms.decode(example["image"], example["path"])
        except errors.UserError as error:
            problems.append(f"{split}: {error}")
    for label, many in sorted(labels.items()):
        problems.append(f"{split}: {many} images have label {label}; config.model.net.num_classes = {num_classes}")
    return problems, digests

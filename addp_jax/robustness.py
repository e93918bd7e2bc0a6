"""`--mode=robustness`: a trained classifier on ImageNet-A, -R, -Sketch and -C, whose folders the user has."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os

import jax
import numpy as np

from addp_jax import errors, evaluate
from addp_jax.data import features, pipeline, sources, transforms
from addp_jax.metrics import classification as metrics

SUBSETS = ("imagenet_a", "imagenet_r", "imagenet_sketch")
SEVERITIES = range(1, 6)


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of `config.robustness`: folders, "" = not measured."""

    imagenet_a: str = ""  # WNID/*.jpg
    imagenet_r: str = ""
    imagenet_sketch: str = ""
    imagenet_c: str = ""  # CORRUPTION/SEVERITY/WNID/*.JPEG


def robustness(program, config: Config, workdir: str) -> None:
    """Print one JSON line: top-1 accuracy on each set; for ImageNet-C the error of each corruption and mCE.

    A class is known by the name of its folder. Only the classes that a set has compete for its images, as in the
    papers of ImageNet-A and -R, which have 200 of the 1000. ImageNet-C's images are cropped already and taken whole.
    """
    task, mesh = program.task, program.mesh
    if not hasattr(task, "logits"):
        raise errors.UserError(f"config.task: {program.config.task} names no classes; use classification or linear_probe")
    if not any(dataclasses.asdict(config).values()):
        raise errors.UserError("config.robustness: all folders are empty; give at least one")
    names, result = pipeline.class_names(program.config.data, task.image_size), {}
    if len(names) > task.num_classes:
        raise errors.UserError(f"config.data.class_names: {len(names)} names, but the network has {task.num_classes} classes")
    with jax.set_mesh(mesh):
        top1 = Top1(program, names, functools.partial(jax.jit(task.logits), *evaluate.load(program, workdir)))
        for name in SUBSETS:
            if folder := getattr(config, name):
                result[name] = top1(folder, f"config.robustness.{name}", task.config.crop_pct)
        if config.imagenet_c:
            result["imagenet_c"] = error = corruption_errors(top1, config.imagenet_c)
            result["mce"] = metrics.mean_corruption_error(error)
    print(json.dumps(result))


@dataclasses.dataclass(frozen=True)
class Top1:
    """Accuracy of `function` (image uint8 [B,H,W,3] -> logits) on a folder with one sub-folder per class."""

    program: object
    names: tuple[str, ...]
    function: object

    def __call__(self, folder: str, field: str, crop_pct: float = 1.0) -> float:
        program, right = self.program, []
        source = sources.open_classes(folder, self.names, field)
        present = np.unique(source.labels)
        rows = features.batches_of(
            source, transforms.eval_image(program.task.image_size, crop_pct), self.function, program.config.data,
            program.config.batch_size, program.mesh,
        )  # fmt: skip
        for logits, labels in rows:
            right.append(present[logits[:, present].argmax(1)] == labels)
        return float(np.concatenate(right).mean())


def corruption_errors(top1, folder: str) -> dict[str, float]:
    """{corruption: top-1 error, mean over the five severities}. Raises UserError if a folder is missing."""
    folders = {name: [os.path.join(folder, name, str(level)) for level in SEVERITIES] for name in metrics.ALEXNET}
    for path in itertools.chain(*folders.values()):  # told now, not hours later
        if not os.path.isdir(path):
            raise errors.UserError(f"config.robustness.imagenet_c: no folder {path!r}")
    error = {}
    for name, levels in folders.items():
        error[name] = float(np.mean([1 - top1(level, "config.robustness.imagenet_c") for level in levels]))
        print(f"{name}: error {error[name]:.1%}", flush=True)
    return error

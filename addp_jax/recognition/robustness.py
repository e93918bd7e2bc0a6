"""`--mode=robustness`: a trained classifier on ImageNet-A, -R, -Sketch and -C, whose folders the user has."""

from __future__ import annotations

import dataclasses
import functools
import json
import os

import jax
import numpy as np

from addp_jax import errors, tasks
from addp_jax.data import features, transforms
from addp_jax.data.sources import image_folder
from addp_jax.metrics import classification as metrics
from addp_jax.recognition import own

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
    tasks.require(task, program.config.task, tasks.Classifier)
    if not any(dataclasses.asdict(config).values()):
        raise errors.UserError("config.robustness: all folders are empty; give at least one")
    require_folders(config)
    given = own.given_names(program)
    result = {}
    with jax.set_mesh(mesh):
        nets, identity = program.load(workdir)
        names = given or own.recorded_names(program, identity, workdir)
        top1 = functools.partial(accuracy, program, names, functools.partial(jax.jit(task.logits), *nets))
        for name in SUBSETS:
            if folder := getattr(config, name):
                result[name] = top1(folder, f"config.robustness.{name}", task.crop_pct)
        if config.imagenet_c:
            result["imagenet_c"] = error = corruption_errors(top1, config.imagenet_c)
            result["mce"] = metrics.mean_corruption_error(error)
    print(json.dumps(result))


def accuracy(program, names: tuple[str, ...], logits, folder: str, field: str, crop_pct: float = 1.0) -> float:
    """Top-1 of `logits` (image uint8 [B,H,W,3] -> [B,C]) on a folder with one sub-folder per class of `names`."""
    source, config = image_folder.open_classes(folder, names, field), program.config
    present, hits = np.unique(source.labels), []
    transform = transforms.eval_image(program.task.image_size, crop_pct)
    rows = features.batches_of(source, transform, logits, config.data, config.batch_size, program.mesh)
    for scores, labels, valid in rows:
        hits.append(metrics.in_top(scores[:, present], np.searchsorted(present, labels), 1)[valid])
    return float(np.concatenate(hits).mean())


def corruption_errors(top1, folder: str) -> dict[str, float]:
    """{corruption: top-1 error, mean over the five severities}."""
    error = {}
    for name, levels in corruptions(folder).items():
        error[name] = float(np.mean([1 - top1(level, "config.robustness.imagenet_c") for level in levels]))
        print(f"{name}: error {error[name]:.1%}", flush=True)
    return error


def corruptions(folder: str) -> dict[str, list[str]]:
    """{corruption: its folder for each severity}."""
    return {name: [os.path.join(folder, name, str(level)) for level in SEVERITIES] for name in metrics.ALEXNET}


def require_folders(config: Config) -> None:
    """Raises UserError naming the first folder that is missing: now, not hours later."""
    folders = [(name, getattr(config, name)) for name in SUBSETS]
    if config.imagenet_c:
        folders += [("imagenet_c", path) for levels in corruptions(config.imagenet_c).values() for path in levels]
    for name, path in folders:
        if path and not os.path.isdir(path):
            raise errors.UserError(f"config.robustness.{name}: no folder {path!r}")

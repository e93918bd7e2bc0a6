"""How good the features of the network in training are, by cheap means, at every evaluation."""

from __future__ import annotations

import functools

import jax
import numpy as np

from addp_jax import errors, partition, tasks
from addp_jax.data import features, part, transforms
from addp_jax.metrics import probes


def measure(program, params, frozen) -> dict[str, float]:
    """Of `config.evaluate.watch_features` images of each split; {} if that is 0.

    features_rank   the effective rank of the features of the evaluation split
    features_knn    its accuracy by the nearest neighbours in the training split
    features_probe  its accuracy by a linear classifier fitted to the training split

    The accuracies need labels; without them there is the rank alone.
    """
    if not program.config.evaluate.watch_features:
        return {}
    sources = prepare(program)
    queries, labels = _features(program, params, frozen, sources["eval"])
    scalars = {"features_rank": probes.effective_rank(queries)}
    if all(source.labelled for source in sources.values()):
        bank, bank_labels = _features(program, params, frozen, sources["train"])
        if min(labels.min(), bank_labels.min()) >= 0:
            scalars["features_knn"] = probes.knn_accuracy(bank, bank_labels, queries, labels)
            scalars["features_probe"] = probes.probe_accuracy(bank, bank_labels, queries, labels)
    return scalars


def prepare(program) -> dict[str, part.Part]:
    """The images that are read, by split. Raises UserError: too few, or a task that trains no features of images."""
    task, count = program.task, program.config.evaluate.watch_features
    if not isinstance(task, tasks.Recogniser) or task.features_are_frozen:
        raise errors.UserError("config.evaluate.watch_features: this task trains no features of images; use 0")
    sources = {split: program.source(split) for split in ("train", "eval")}
    for split, source in sources.items():
        if len(source) < count:
            has = f"the {split} split has {len(source)} images"
            raise errors.UserError(f"config.evaluate.watch_features: {count}, but {has}; lower it")
    return {split: part.Part(source, count) for split, source in sources.items()}


def _features(program, params, frozen, source) -> tuple[np.ndarray, np.ndarray]:
    """Features [N,D] and labels [N] of the images of `source` that can be read, on every process."""
    task, config, mesh = program.task, program.config, program.mesh
    transform = transforms.eval_image(task.image_size, task.crop_pct)
    function = functools.partial(_function(task), params, frozen)
    size = partition.batch_size(config.evaluate.batch_size, mesh)
    batches = features.batches_of(source, transform, function, config.data, size, mesh)
    rows, labels = zip(*((rows[valid], labels[valid]) for rows, labels, valid in batches))
    return np.concatenate(rows), np.concatenate(labels)


@functools.cache  # the second evaluation compiles nothing
def _function(task):
    return jax.jit(task.features)

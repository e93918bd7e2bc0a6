"""Evaluation of a config's held-out data, inside the loop and by `--mode=evaluate`. Computes no metric itself."""

from __future__ import annotations

import functools
import hashlib
import json
import os

import jax
import numpy as np

from addp_jax import errors, files, partition, pictures, processes, samplers, tasks
from addp_jax.data import part, pipeline
from addp_jax.metrics import feature_sets
from addp_jax.ops import images, keys
from addp_jax.program import check_classes
from addp_jax.training import watch
from addp_jax.weights import feature_nets


def run(program, state, frozen) -> tuple[dict, dict]:
    """`(scalars, images)` of (averaged, where there is an average) parameters: the task's evaluation on
    `config.eval_batches` batches (0 = the whole split), and what `config.evaluate` asks for."""
    params = state.params if state.ema_params is None else state.ema_params
    config, source = program.config, program.source("eval")
    wanted = config.eval_batches * config.batch_size
    examples = part.Part(source, wanted) if 0 < wanted < len(source) else source
    scalars, images, _ = task_results(program, params, frozen, examples)
    return scalars | distances(program, params, frozen)[0] | watch.measure(program, params, frozen), images


def task_results(program, params, frozen, source) -> tasks.Results:
    """The task's evaluation of all examples of `source`.

    The scalars hold how many `images` were evaluated, `of` how many; of a part, the other names begin with `part/`.
    """
    if not len(source):
        raise errors.UserError("config.data: the evaluation split is empty")
    if program.task.whole_images:
        batches = one_by_one(program, source)
    else:
        batches = on_device(program, source, partition.batch_size(program.config.batch_size, program.mesh))
    scalars, *more = program.task.evaluate(params, frozen, batches, source)
    used, of = len(source), total(source)
    prefix = "part/" if used < of else ""
    return tasks.Results({prefix + name: value for name, value in scalars.items()} | {"images": used, "of": of}, *more)


def total(source) -> int:
    """How many examples there are of which `source` may be a part."""
    return total(source.source) if isinstance(source, part.Part) else len(source)


def on_device(program, source, batch_size: int):
    """Every example of `source` once, in padded batches of the evaluation's transform."""
    config = program.config.data
    batches = pipeline.eval_batches(
        source, program.task.transform("eval", config), batch_size=batch_size, config=config,
        rows=partition.rows(program.mesh, batch_size), fields=program.task.evaluation_fields,
    )  # fmt: skip
    return processes.stoppable(pipeline.to_device(batches, partition.batch_sharding(program.mesh)))


def one_by_one(program, source):
    """This process's share of the examples of `source`, as the evaluation's transform gives them."""
    config, task = program.config.data, program.task
    transform, share = task.transform("eval", config), partition.share(program.mesh)
    return processes.stoppable(
        pipeline.one_by_one(source, transform, config=config, share=share, fields=task.evaluation_fields)
    )


def distances(program, params, frozen) -> tuple[dict, dict]:
    """Between the evaluation split and reconstructions of it (a tokenizer), or samples (a token predictor, ADDP).

    Returns the measures, named by network and number of images, those of reconstructions with an r before; and what
    they come from. Both {} where `config.evaluate.features` is empty.
    """
    config, mesh = program.config.evaluate, program.mesh
    if not config.features:
        return {}, {}
    net, make, source = prepare(program)
    batch_size = partition.batch_size(config.batch_size, mesh)
    real, samples, networks = Images(net), Images(net), (params, frozen, keys.of(config.seed, "samples"))
    for index, batch in enumerate(on_device(program, source, batch_size)):
        numbers = np.arange(index * batch_size, (index + 1) * batch_size)
        valid = partition.whole(batch["valid"])
        real.add(batch["image"], valid)
        samples.add(make(networks, {"number": numbers, "image": batch["image"]}), valid)
    values, prefix = feature_sets.compare(real.features, samples.features), ""
    if isinstance(program.task, tasks.Autoencoder):
        values, prefix = {"frechet": values["frechet"]}, "r"
    count = len(real.features)
    named = feature_sets.named(values, net.name, count, published=False)  # published figures are of bilinear real images
    return {prefix + name: value for name, value in named.items()}, {
        "protocol": f"{count} of {total(source)} images of the evaluation split, bicubic, and as many of the model's",
        "seed": config.seed,
        "features": {"network": net.name, "weights": net.weights},
        "real": {"images": count, "hash": real.digest.hexdigest()},
        "samples": {"images": count, "hash": samples.digest.hexdigest()},
    }


class Images:
    """The features of images that come in batches, and a hash of their pixels."""

    def __init__(self, net):
        self.net, self.features, self.digest = net, feature_sets.FeatureSet(), hashlib.blake2b(digest_size=8)

    def add(self, image, valid) -> None:
        """`image` uint8 [B,H,W,3], of which those that are `valid` [B] count."""
        self.features.add({name: rows[valid] for name, rows in self.net(image).items()})
        self.digest.update(np.ascontiguousarray(partition.whole(image)[valid]))


def prepare(program):
    """What `distances` needs: the feature network, what makes the model's images, the real ones.

    Raises UserError when `config.evaluate` asks for what is not there.
    """
    config, task = program.config.evaluate, program.task
    source = program.source("eval")
    if len(source) < config.num_images:
        raise errors.UserError(
            f"config.evaluate.num_images: {config.num_images}, but the evaluation split has {len(source)} images; lower it"
        )
    make = images_of(task, program.mesh)
    return feature_net(config.features, config.inception_weights, program.mesh), make, part.Part(source, config.num_images)


@functools.cache  # one network for all evaluations and all settings of a sweep
def feature_net(name: str, weights: str, mesh):
    return feature_nets.load(name, weights, mesh, "config.evaluate.features", "config.evaluate.inception_weights")


@functools.cache  # the second evaluation compiles nothing
def images_of(task, mesh):
    """See `samplers.drawing`; of an Autoencoder, the reconstructions of the batch's `image`."""
    if isinstance(task, tasks.Autoencoder):
        reconstruct = lambda params, frozen, key, image: task.reconstruct(params, frozen, images.to_unit(image))
        return jax.jit(lambda networks, batch: images.to_uint8(reconstruct(*networks, batch["image"])))
    if isinstance(task, tasks.Generator):
        return samplers.drawing(task, mesh)
    raise errors.UserError('config.evaluate.features: this task makes no images to compare; use ""')


def evaluate(program, workdir: str) -> None:
    """`--mode=evaluate`: prints the results over the whole evaluation split as one JSON line, writes pictures and files."""
    folder = os.path.join(workdir, "evaluation")
    files.require_writable(folder, "workdir")
    with jax.set_mesh(program.mesh):
        (params, frozen), identity = program.load(workdir)
        source = program.source("eval")
        if isinstance(program.task, tasks.KnowsClasses) and "data" in identity:
            check_classes(workdir, identity["data"].get("classes"), source)
        scalars, images, texts = task_results(program, params, frozen, source)
        measures, provenance = distances(program, params, frozen)
        measures |= watch.measure(program, params, frozen)
    if jax.process_index() == 0:
        try:
            with files.explain(f"cannot write to {folder}"):
                for path in pictures.save_pictures(folder, images):
                    print(path)
                for name, text in texts.items():
                    files.write_text(os.path.join(folder, name), text)
                    print(os.path.join(folder, name))
        finally:  # what was computed is printed whatever happens to the pictures
            print(json.dumps(scalars | measures | provenance))

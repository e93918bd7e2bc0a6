"""Evaluation of a config's held-out data, inside the loop and by `--mode=evaluate`. Computes no metric itself."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json

import jax
import numpy as np

from addp_jax import checkpoint, errors, parameters, partition, samplers, tasks, writers
from addp_jax.data import pipeline
from addp_jax.interop import features, weights
from addp_jax.metrics import feature_sets


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of `config.evaluate`: how far the model's own images are from the evaluation split's."""

    features: str = ""  # inception, or the work directory of a convnet or addp run; "" = no distances
    inception_weights: str = ""
    num_images: int = 2000  # of the split, spread evenly, and as many of the model's; the names end in it: fid_2k
    batch_size: int = 64
    seed: int = 0  # of the samples

    def __post_init__(self):
        for name, least in (("num_images", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise errors.UserError(f"config.evaluate.{name}: {getattr(self, name)}; use at least {least}")


def run(program, state, frozen) -> tuple[dict, dict]:
    """`(scalars, images)` of (averaged, where there is an average) parameters: the task's evaluation on
    `config.eval_batches` batches (0 = all), and the distances of `config.evaluate`, if any."""
    params = state.params if state.ema_params is None else state.ema_params
    scalars, images = task_results(program, params, frozen)
    return scalars | distances(program, params, frozen)[0], images


def task_results(program, params, frozen) -> tuple[dict, dict]:
    config, task = program.config, program.task
    source = tasks.open_source(task, "eval", config.data)
    batches = on_device(program, source, config.batch_size)
    return task.evaluate(params, frozen, itertools.islice(batches, config.eval_batches or None))


def on_device(program, source, batch_size: int):
    """Every example of `source` once, in padded batches of the evaluation's transform."""
    config = program.config.data
    batches = pipeline.eval_batches(
        source, program.task.transform("eval", config), batch_size=batch_size, config=config,
        rows=partition.rows(program.mesh, batch_size),
    )  # fmt: skip
    return pipeline.to_device(batches, partition.batch_sharding(program.mesh))


def distances(program, params, frozen) -> tuple[dict, dict]:
    """Between the evaluation split and reconstructions of it (a tokenizer), or samples (a token predictor, ADDP).

    Returns the measures, named by network and number of images, those of reconstructions with an r before; and what
    they come from. Both {} where `config.evaluate.features` is empty.
    """
    config, mesh = program.config.evaluate, program.mesh
    if not config.features:
        return {}, {}
    net, make, source = prepare(program)
    sets = {name: (feature_sets.FeatureSet(), hashlib.blake2b(digest_size=8)) for name in ("real", "samples")}
    batch_size = partition.batch_size(config.batch_size, mesh)
    for index, batch in enumerate(on_device(program, source, batch_size)):
        first = index * batch_size
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(config.seed), np.arange(first, first + batch_size))
        made = make((params, frozen), (keys, batch["image"] / np.float32(255)))
        for (gathered, digest), image in zip(sets.values(), (batch["image"], made)):
            left = config.num_images - first
            gathered.add({name: rows[:left] for name, rows in net(image).items()})
            digest.update(np.ascontiguousarray(partition.whole(image)[:left]))
    values = feature_sets.compare(*(gathered for gathered, _ in sets.values()))
    if reconstructs(program.task):
        values = {"frechet": values["frechet"]}
    prefix = "r" if reconstructs(program.task) else ""
    named = feature_sets.named(values, net.name, config.num_images)
    return {prefix + name: value for name, value in named.items()}, {
        "protocol": f"{config.num_images} images of the evaluation split, spread evenly, and as many of the model's",
        "seed": config.seed,
        "features": {"network": net.name, "weights": net.weights},
        **{name: {"images": config.num_images, "hash": digest.hexdigest()} for name, (_, digest) in sets.items()},
    }


def reconstructs(task) -> bool:
    return hasattr(task, "reconstruct")


def prepare(program):
    """What `distances` needs: the feature network, what makes the model's images, the real ones.

    Raises UserError when `config.evaluate` asks for what is not there.
    """
    config, task, data = program.config.evaluate, program.task, program.config.data
    source = pipeline.open_source(data, "eval", task.image_size)
    if len(source) < config.num_images:
        raise errors.UserError(
            f"config.evaluate.num_images: {config.num_images}, but the evaluation split has {len(source)} images; lower it"
        )
    return *compiled(config, task, program.mesh), pipeline.Part(source, config.num_images)


@functools.cache  # the second evaluation compiles nothing
def compiled(config: Config, task, mesh):
    """(feature network, jitted `((params, frozen), (keys [B], images [B,H,W,3])) -> uint8 [B,H,W,3]`)."""
    if reconstructs(task):
        make = lambda nets, batch: samplers.to_uint8(task.reconstruct(*nets, batch[1]))
    elif hasattr(task, "nets"):
        make = samplers.per_device(task, 1.0, mesh)
    else:
        raise errors.UserError('config.evaluate.features: this task makes no images to compare; use ""')
    fields = "config.evaluate.features", "config.evaluate.inception_weights"
    return features.load(config.features, config.inception_weights, mesh, *fields), jax.jit(make)


def read(program, workdir: str):
    """The parameters of the newest checkpoint in `workdir`, as numpy arrays."""
    params, info = checkpoint.load_params(workdir, ema=True)
    params = weights.fit(params, program.state.params, workdir)
    print(f"{workdir}: parameters of step {info['step']}")
    return params


def load(program, workdir: str):
    """`(params, frozen)` on the mesh: parameters laid out as in training, frozen networks whole on every device."""
    params, frozen = read(program, workdir), program.task.load_frozen()
    layouts = jax.tree.map(lambda leaf: leaf.sharding, program.state.params)
    return partition.put(params, {name: layouts[name] for name in params}), place(program, frozen)


def place(program, networks):
    """Networks whole on every device."""
    return partition.put(compact(program, networks), partition.replicated(program.mesh))


def compact(program, networks):
    """Networks as they are kept on the devices: kernels in the dtype of the computation where the task allows it."""
    dtype = partition.compute_dtype(program.config.dtype, program.mesh)
    return parameters.compact(networks, getattr(program.task, "compact", ()), dtype)


def evaluate(program, workdir: str) -> None:
    """`--mode=evaluate`: prints the results as one JSON line and writes the pictures to `workdir`."""
    with jax.set_mesh(program.mesh):
        params, frozen = load(program, workdir)
        scalars, images = task_results(program, params, frozen)
        measures, provenance = distances(program, params, frozen)
    if not scalars:
        raise errors.UserError("config.data: the evaluation split is empty")
    if jax.process_index() == 0:
        for path in writers.save_pictures(f"{workdir}/evaluation", images):
            print(path)
        print(json.dumps(scalars | measures | provenance))

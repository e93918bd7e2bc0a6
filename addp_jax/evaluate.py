"""Evaluation of a config's held-out data, inside the loop and by `--mode=evaluate`. Computes no metric itself."""

from __future__ import annotations

import itertools
import json

import jax

from addp_jax import checkpoint, errors, partition, writers
from addp_jax.data import pipeline
from addp_jax.interop import weights


def run(program, state, frozen) -> tuple[dict, dict]:
    """The task's evaluation of (averaged, where there is an average) parameters on `config.eval_batches` batches (0 = all)."""
    config, task = program.config, program.task
    source = pipeline.open_source(config.data, "eval", task.image_size)
    batches = pipeline.eval_batches(
        source, task.transform("eval", config.data), batch_size=config.batch_size, config=config.data,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip
    on_device = pipeline.to_device(batches, partition.batch_sharding(program.mesh))
    limited = itertools.islice(on_device, config.eval_batches or None)
    params = state.params if state.ema_params is None else state.ema_params
    return task.evaluate(params, frozen, limited)


def load(program, workdir: str):
    """`(params, frozen)` of the newest checkpoint in `workdir`, on the mesh."""
    layouts = jax.tree.map(lambda leaf: leaf.sharding, program.state.params)
    params, info = checkpoint.load_params(workdir, ema=True)
    params = weights.fit(params, program.state.params, workdir)
    print(f"{workdir}: parameters of step {info['step']}")
    params = jax.device_put(params, {name: layouts[name] for name in params})
    return params, jax.device_put(program.task.load_frozen(), partition.replicated(program.mesh))


def evaluate(program, workdir: str) -> None:
    """`--mode=evaluate`: prints the results as one JSON line and writes the pictures to `workdir`."""
    with jax.set_mesh(program.mesh):
        params, frozen = load(program, workdir)
        state = program.state.replace(params=params, ema_params=None)
        scalars, images = run(program, state, frozen)
    if not scalars:
        raise errors.UserError("config.data: the evaluation split is empty")
    for path in writers.save_pictures(f"{workdir}/evaluation", images):
        print(path)
    print(json.dumps(scalars))

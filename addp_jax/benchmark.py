"""`--mode=benchmark`: time and memory of a config's training step on the present device, with made-up images."""

from __future__ import annotations

import json
import resource
import time

import jax
import numpy as np

from addp_jax import errors, evaluate, partition, train

REPEATS = 3


def benchmark(config: train.Config) -> None:
    """Print one JSON line. Set the `*_weights` fields to "random" where no trained weights are at hand."""
    program = train.build(config, num_train=config.batch_size)
    if hasattr(program.task, "open_source"):
        raise errors.UserError(f"config.task: {config.task} trains on what it computed before; benchmark another task")
    rng, size = np.random.default_rng(0), program.task.image_size
    batch = {"image": rng.integers(0, 256, (config.batch_size, size, size, 3), np.uint8)}
    batch["label"] = np.zeros(config.batch_size, np.int32)
    with jax.set_mesh(program.mesh):
        frozen = evaluate.place(program, program.task.load_frozen())
        batch = jax.device_put(batch, partition.batch_sharding(program.mesh))
        state = program.init(jax.random.key(config.seed))
        started = time.perf_counter()
        step = program.step.lower(state, frozen, batch).compile()
        compile_seconds = time.perf_counter() - started
        seconds = []
        for _ in range(1 + REPEATS):
            started = time.perf_counter()
            state, metrics = step(state, frozen, batch)
            loss = float(metrics["loss"])
            seconds.append(time.perf_counter() - started)
    best = min(seconds[1:])
    print(json.dumps({
        "device": program.mesh.devices.flat[0].device_kind,
        "devices": program.mesh.size,
        "batch_size": config.batch_size,
        "trained_parameters": sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(program.state.params)),
        "loss": loss,
        "compile_seconds": round(compile_seconds, 1),
        "seconds_per_step": round(best, 3),
        "images_per_second": round(config.batch_size / best, 3),
        "planned_peak_gib": round(step.memory_analysis().peak_memory_in_bytes / 2**30, 2),
        "process_peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }))  # fmt: skip

"""Compiles a config's own program for devices that exist for the compiler only, and reports on it.

`plan` runs it as a program of its own, since a compiler may abort the process: a request as JSON on stdin, the report
as JSON on the last line of stdout.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import re
import sys
import time

import jax
import jax.numpy as jnp

from addp_jax import errors, files, partition, program, samplers, schema, tasks, weights
from addp_jax.generation import generate
from addp_jax.planning import flops, hlo, topologies

IMAGENET = 1_281_167  # images of an epoch, where the config does not limit them


def report(config: dict, topology: str, slices: int, program: str, level: str) -> dict:
    """What the compiler says. `error` is there instead of `peak` when the program does not fit or does not compile.

    Args:
      config: the fields of the run.
      program: train | sample.
      level: of the compiler's optimization: O0, several times faster, or default.
    """
    if level != "default":
        jax.config.update("jax_optimization_level", level)
    name = topologies.parse(topology, slices)
    devices = topologies.describe(name)
    limit = topologies.memory_limit(name, devices[0])
    run = build(config, partition.make_mesh(partition.Config(**config["mesh"]), devices))
    plain = build(flops.everything_kept(config), run.mesh)  # it computes nothing again for the backward pass
    with jax.set_mesh(run.mesh):
        function, args, sizes = PROGRAMS[program](run, config)
        executed = flops.count(function, *args)
        plain_function, plain_args, _ = PROGRAMS[program](plain, config)
        useful = flops.count(plain_function, *plain_args)
        started, used = time.perf_counter(), time.process_time()
        outcome = compiled(function, args)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - used
    return outcome | sizes | compiler_version(name) | {
        "topology": str(name), "kind": name.kind, "devices": len(devices), "chips": name.chips, "level": level,
        "limit": limit, "mesh": dict(run.mesh.shape), "steps": run.length.total, "num_train": num_train(config),
        "executed_flops": executed, "useful_flops": useful,
        "compile_seconds": round(seconds, 1), "compile_cpu_seconds": round(cpu_seconds, 1),
    }  # fmt: skip


def build(config: dict, mesh) -> program.TrainingProgram:
    """The run of the fields `config`, with frozen networks that have shapes only."""
    model = schema.with_frozen_weights(tasks.load(config["task"]).Config, config["model"], weights.SHAPES)
    fields = {entry.name: config[entry.name] for entry in dataclasses.fields(program.Config)} | {"model": model}
    return program.create_training(schema.build(program.Config, fields), num_train(config), mesh)


def num_train(config: dict) -> int:
    return config["data"]["num_train"] or IMAGENET


def training(run: program.TrainingProgram, config: dict):
    """`(step, its arguments, sizes)`: as the loop calls it."""
    frozen = _whole(run, run.task.load_frozen())
    sizes = _sizes(run.state.params, frozen, run.batch) | {"batch_size": run.config.batch_size}
    state = _bytes(run.state)
    sizes |= {"optimizer_bytes": state - sizes["parameter_bytes"], "donated": state}
    return run.step, (run.state, frozen, run.batch), sizes


def sampling(run: program.TrainingProgram, config: dict):
    """`(sampler, its arguments, sizes)`: as --mode=generate calls it."""
    tasks.require(run.task, run.config.task, tasks.Generator)
    settings = schema.build(generate.Config, config["generate"], "config.generate")
    size = generate.batch_size(settings, run.mesh)
    batch = {"number": jax.ShapeDtypeStruct((size,), jnp.int32, sharding=partition.batch_sharding(run.mesh))}
    frozen, params = _whole(run, run.task.load_for_sampling()), _whole(run, run.state.params)
    sizes = _sizes(params, frozen, batch) | {"batch_size": size, "optimizer_bytes": 0, "donated": 0}
    dtype = jax.eval_shape(jax.random.key, 0).dtype  # these devices run nothing, not even that
    key = jax.ShapeDtypeStruct((), dtype, sharding=partition.replicated(run.mesh))
    return jax.jit(samplers.drawing(run.task, run.mesh)), ((params, frozen, key), batch), sizes


PROGRAMS = {"train": training, "sample": sampling}


def _whole(run: program.TrainingProgram, networks):
    """Shapes of networks that are whole on every device."""
    sharding = partition.replicated(run.mesh)
    shapes = jax.eval_shape(lambda networks: run.compact(networks), networks)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


def _sizes(params, frozen, batch) -> dict:
    sizes = {"parameter_bytes": _bytes(params), "frozen_bytes": _bytes(frozen), "batch_bytes": _bytes(batch)}
    return sizes | {"parameters": sum(leaf.size for leaf in jax.tree.leaves(params))}


def _bytes(tree) -> int:
    """On one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def compiled(function, args) -> dict:
    """Memory, collectives and, from the TPU compiler at its default level, estimated cycles of one device."""
    try:
        executable = function.lower(*args).compile()
    except jax.errors.JaxRuntimeError as error:
        needed = memory_needed(str(error))
        return {"error": files.reason(error)} | ({"needed": needed} if needed else {})
    memory = executable.memory_analysis()
    sizes = {"peak": memory.peak_memory_in_bytes, "aliased": memory.alias_size_in_bytes}
    try:
        text = executable.as_text()
    except Exception as error:  # of a compiler that does not match jax; the memory is known all the same
        return sizes | {"unreadable": files.reason(error)}
    kinds = {kind: dataclasses.asdict(entry) for kind, entry in hlo.collectives(text).items()}
    return sizes | {"collectives": kinds, "cycles": hlo.estimated_cycles(text), "hbm_traffic": hlo.hbm_bytes(text)}


def memory_needed(message: str) -> float | None:
    """Bytes that a TPU program would need, of the compiler's refusal; None if it refuses for another reason."""
    match = re.search(r"(?:memory required [^(]*\(|Used )([\d.]+)([KMGT])", message)
    return float(match[1]) * 2 ** (10 * " KMGT".index(match[2])) if match else None


def compiler_version(name: topologies.Name) -> dict:
    """Of a TPU: `libtpu` that is installed, and the one that the installed jax asks for."""
    if name.kind in topologies.GPUS:
        return {}
    pins = [line for line in importlib.metadata.requires("jax") or [] if line.startswith("libtpu")]
    pin = re.split("[;,]", pins[0])[0].strip() if pins else ""
    return {"libtpu": importlib.metadata.version("libtpu"), "libtpu_wanted": pin}


if __name__ == "__main__":
    try:
        print(json.dumps(report(**json.load(sys.stdin))))
    except errors.UserError as error:
        print(json.dumps({"mistake": str(error)}))

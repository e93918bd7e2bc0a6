"""`--mode=benchmark`: time, FLOPs and memory of a config's training step and sampler, whole and by part, on the present
device, with made-up images. A part is run on its own, so the parts' times need not add up to the whole's.

FLOPs are told twice: executed ones, with what remat computes again for the backward pass, and useful ones, without.
Of the device's peak, the first are its hardware utilisation (HFU), the second the model's (MFU). `x floor` is how many
times as long a part takes as its useful FLOPs would at the peak.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from addp_jax import files, optim, partition, program, samplers, tasks
from addp_jax.planning import calls, flops, topologies

TABLES = ("training step", "sampling")
COMPARABLE = ("device", "devices", "dtype", "batch_size")  # of two results whose seconds are compared
REPEATS, ENOUGH_SECONDS = 3, 20.0  # the best of so many runs, of fewer where they take long
SLOWER = 1.05  # times the baseline's seconds: from here on a part is named
PER_RUN = ("seconds", "flops", "useful_flops", "calls")  # of a Row: they grow with the runs

# What jax calls a device -> its entry in topologies.CHIPS. The peak of others, and of float32, is measured.
DEVICES = {
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x",
    "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """What one part costs in one step, or in one run of the sampler."""

    part: str
    seconds: float
    flops: float  # executed
    useful_flops: float
    planned_bytes: int = 0  # peak memory of its program on one device, as the compiler plans it
    compile_seconds: float = 0.0
    calls: int = 1

    def __add__(self, other: Row) -> Row:
        sums = {name: getattr(self, name) + getattr(other, name) for name in (*PER_RUN, "compile_seconds")}
        return dataclasses.replace(self, **sums, planned_bytes=max(self.planned_bytes, other.planned_bytes))

    def __mul__(self, times: int) -> Row:
        return dataclasses.replace(self, **{name: getattr(self, name) * times for name in PER_RUN})


def measure(part: str, function, *args, carried: bool = False) -> Row:
    """Compile and time `function(*args)`. `carried`: its first output is the first argument of the next run.

    All its FLOPs count as useful: what has a backward pass says itself how many are.
    """
    counted, started = flops.count(function, *args), time.perf_counter()
    jitted = function if isinstance(function, jax.stages.Wrapped) else jax.jit(function)
    program = jitted.lower(*args).compile()
    compile_seconds, seconds = time.perf_counter() - started, []
    while len(seconds) <= REPEATS and sum(seconds[1:]) < ENOUGH_SECONDS:
        started = time.perf_counter()
        out = jax.block_until_ready(program(*args))
        seconds.append(time.perf_counter() - started)
        args = (out[0], *args[1:]) if carried else args
    memory = program.memory_analysis()
    return Row(part, min(seconds[1:]), counted, counted, memory.peak_memory_in_bytes if memory else 0, compile_seconds)


def made_up(shapes, sharding):
    """Small random numbers in the given shapes, random bytes; zeros for other integers and booleans."""

    def one(shape):
        if jnp.issubdtype(shape.dtype, jnp.floating):
            return 0.02 * jax.random.normal(jax.random.key(0), shape.shape, shape.dtype)
        if shape.dtype == jnp.uint8:
            return jax.random.bits(jax.random.key(0), shape.shape, shape.dtype)
        return jnp.zeros(shape.shape, shape.dtype)

    return jax.jit(lambda: jax.tree.map(one, shapes), out_shardings=sharding)()


def networks(function, mesh, *args) -> dict[str, Row]:
    """The networks that `function(*args)` runs, each timed alone: forward, its parameters on every device."""
    runs, rows = collections.defaultdict(list), {}
    for call in calls.record(function, *args):
        runs[call.name].append(call)
    for name, same in runs.items():
        sizes = [sum(array.size for array in call.arrays) for call in same]
        largest, count = same[sizes.index(max(sizes))], sizes.count(max(sizes))
        # Where the others are single examples of `one_by_one`, it loops; a single image may also be read by itself.
        looped = count < len(same) and len(largest.arrays) == 1
        rows[name] = _alone(largest, mesh, looped) * count
    return rows


def _alone(call: calls.Call, mesh, looped: bool) -> Row:
    def run(variables, arrays, rng):
        if looped:
            return partition.one_by_one(lambda batch: call.function(variables, [batch], rng), *arrays)
        return call.function(variables, arrays, rng)

    layouts = [partition.batch_sharding(mesh), partition.replicated(mesh)]
    arrays = [made_up(array, layouts[not array.ndim or array.shape[0] % mesh.size > 0]) for array in call.arrays]
    return measure(call.name, run, made_up(call.variables, layouts[1]), arrays, jax.random.key(0))


def training(config: program.Config, run: program.TrainingProgram, frozen, batch) -> list[Row]:
    """The step, its forward pass by network, the rest of its forward and backward pass, the optimizer."""
    task, key = run.task, jax.random.key(config.seed)
    state = run.init(key)
    pieces = config.optim.accumulate
    piece = jax.tree.map(lambda array: array[: len(array) // pieces], batch)
    optimizer = optim.build(config.optim, optim.schedule(config.optim, run.length, config.batch_size))

    def loss(params, frozen, batch):
        return task.loss(params, frozen, batch, key, True)[0]

    def update(state, grads):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return state.replace(opt_state=opt_state, params=optax.apply_updates(state.params, updates))

    inputs = state.params, program.with_average(task, frozen, state.ema_params), piece
    parts = [row * pieces for row in networks(loss, run.mesh, *inputs).values()]
    forward = measure("forward", loss, *inputs) * pieces
    grads = jax.tree.map(jnp.ones_like, state.params)
    updated = measure("optimizer", update, state, grads)
    kept = dataclasses.replace(config, model=flops.everything_kept(config.model))
    useful = flops.count(program.create_training(kept, config.batch_size, run.mesh).step, state, frozen, batch)
    step = measure("training step", run.step, state, frozen, batch, carried=True)
    step = dataclasses.replace(step, useful_flops=useful)
    seconds = step.seconds - forward.seconds - updated.seconds
    backward = Row("backward", seconds, step.flops - forward.flops, useful - forward.flops)
    return [step, *parts, forward, backward, updated]


def sampling(run: program.TrainingProgram, frozen, batch_size: int) -> list[Row]:
    """A whole run of the sampler for one batch, and its networks, each as often as the schedule runs it."""
    task, mesh, length = run.task, run.mesh, run.task.config.tokenizer.length
    params = jax.jit(task.init)(jax.random.key(0))
    keys = jax.device_put(jax.random.split(jax.random.key(0), batch_size), partition.batch_sharding(mesh))
    shape = jax.ShapeDtypeStruct((batch_size, task.image_size, task.image_size, 3), jnp.float32)
    images = made_up(shape, partition.batch_sharding(mesh))
    numbers = {"number": made_up(jax.ShapeDtypeStruct((batch_size,), jnp.int32), partition.batch_sharding(mesh))}
    whole = measure("sampling", samplers.drawing(task, mesh), (params, frozen, jax.random.key(0)), numbers)
    rows = {}
    for static, at in task.sampler.segments(task.sampler_config, length, 1.0):

        def step(params, frozen, keys, images, static=static, at=at):
            nets = task.nets(params, frozen)
            noise = samplers.draw_noise(keys, at.step[0], length, nets.codebook.shape[0])
            tokens, unknown = jnp.zeros((batch_size, length), jnp.int32), jnp.ones((batch_size, length), bool)
            nets, carry = samplers.prepared(nets, samplers.Carry(images, tokens, unknown), at)
            return task.sampler.step(nets, task.sampler_config, static, carry, jax.tree.map(lambda a: a[0], at), noise)

        for name, row in networks(step, mesh, params, frozen, keys, images).items():
            row = row * len(at.step)
            rows[name] = rows[name] + row if name in rows else row
    return [whole, *rows.values()]


def peak_flops(device, dtype) -> tuple[float, str]:
    """FLOP/s that one device can do, and how that is known."""
    if dtype == jnp.bfloat16 and device.device_kind in DEVICES:
        return topologies.CHIPS[DEVICES[device.device_kind]].flops, "data sheet"
    size = 2048 if device.platform == "cpu" else 8192
    matrix = jnp.ones((size, size), dtype)
    return 2 * size**3 / measure("", jnp.matmul, matrix, matrix).seconds, f"measured, a {dtype.name} matrix product"


def report(title: str, rows: list[Row], images: int, peak: float) -> None:
    """A table; the first row is the whole."""
    print(f"\n{title}")
    columns = f"{'GFLOP':>10}{'useful':>10}{'GFLOP/s':>10}{'images/s':>10}{'HFU':>8}{'MFU':>8}{'x floor':>9}{'MiB':>8}"
    print(f"{'':34}{'runs':>6}{'seconds':>10}{columns}")
    for row in rows:
        rate, useful_rate = row.flops / row.seconds, row.useful_flops / row.seconds
        floor = f"{peak / useful_rate:.2f}" if useful_rate else "-"  # the optimizer multiplies no matrices
        print(
            f"{row.part:34}{row.calls:6}{row.seconds:10.3f}{row.flops / 1e9:10.1f}{row.useful_flops / 1e9:10.1f}"
            f"{rate / 1e9:10.1f}{images / row.seconds:10.3f}{rate / peak:8.1%}{useful_rate / peak:8.1%}{floor:>9}"
            f"{row.planned_bytes / 2**20:8.0f}",
            flush=True,  # the next table takes its time
        )


def benchmark(config: program.Config) -> dict:
    """Print tables and, as one line of JSON, what is returned.

    Set the `*_weights` fields to "random" where no trained weights are at hand.
    """
    run = program.create_training(config, num_train=config.batch_size)
    task, device = run.task, run.mesh.devices.flat[0]
    dtype = partition.compute_dtype(config.dtype, run.mesh)
    with jax.set_mesh(run.mesh):
        frozen = run.place(task.load_frozen())
        batch = made_up(run.batch, partition.batch_sharding(run.mesh))
        peak, source = peak_flops(device, dtype)
        measures = {TABLES[0]: lambda: training(config, run, frozen, batch)}
        if isinstance(task, tasks.Generator):
            measures[TABLES[1]] = lambda: sampling(run, frozen, config.batch_size)
        tables = {}
        for title, rows in measures.items():
            tables[title] = rows()
            report(f"{title}, {config.batch_size} images", tables[title], config.batch_size, peak * run.mesh.size)
    result = {
        "device": device.device_kind,
        "devices": run.mesh.size,
        "dtype": dtype.name,
        "batch_size": config.batch_size,
        "peak_flops_per_device": peak,
        "peak_from": source,
        "trained_parameters": sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(run.state.params)),
        "process_peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "device_peak_gib": round((device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30, 2),
    } | {title: [dataclasses.asdict(row) for row in rows] for title, rows in tables.items()}
    print(json.dumps(result))
    return result


def read(path: str) -> dict:
    """An earlier result, as `--output` writes it. Raises UserError if the file holds none."""
    with files.explain(f"baseline {path}: not a result of --mode=benchmark", KeyError, TypeError, ValueError):
        earlier = files.read_json(path)
        return {name: earlier[name] for name in COMPARABLE} | {
            table: {row["part"]: float(row["seconds"]) for row in earlier.get(table, [])} for table in TABLES
        }


def compare(result: dict, earlier: dict) -> None:
    """Print every part's seconds beside those of `earlier` (`read`), and name the parts that have become slower."""
    for name in COMPARABLE:
        if earlier[name] != result[name]:
            print(f"warning: the baseline's {name} is {earlier[name]}, of this run {result[name]}")
    print(f"\n{'seconds':34}{'baseline':>10}{'now':>10}{'ratio':>8}")
    slower = []
    for table in TABLES:
        for row in result.get(table, []):
            if (part := row["part"]) in earlier[table]:
                before, now = earlier[table][part], row["seconds"]
                print(f"{part:34}{before:10.3f}{now:10.3f}{now / before:8.2f}")
                slower += [part] * (now > SLOWER * before)
    print(f"slower by more than {SLOWER - 1:.0%}: {', '.join(slower) or 'nothing'}")

"""The training loop. Knows no task, loss or data set: config -> data -> task -> step -> checkpoint."""

from __future__ import annotations

import dataclasses
import math
import signal
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from addp_jax import checkpoint, errors, evaluate, optim, parameters, partition, processes, tasks, writers
from addp_jax.data import pipeline
from addp_jax.interop import weights


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole run; configs/base.py says what each field means."""

    task: str
    model: Any  # fields of the task's own Config
    seed: int
    batch_size: int
    epochs: float
    steps: int
    dtype: str
    log_every: int
    eval_every: int
    eval_batches: int
    data: pipeline.Config
    optim: optim.Config
    mesh: partition.Config
    checkpoint: checkpoint.Config
    generate: Any
    predict: Any
    robustness: Any
    init: str = ""  # run folder or weight file that the trained network starts from; "" = random
    evaluate: evaluate.Config = evaluate.Config()
    # What may change between two starts of one run, because no number depends on it.
    # The path of `init` may change as well: the content counts.
    FREE = (
        "init", "mesh", "checkpoint", "generate", "predict", "robustness", "evaluate",
        "log_every", "eval_every", "eval_batches",
    )  # fmt: skip
    FREE_DATA = ("class_names", "workers", "threads", "prefetch")
    # And the paths of weights: their content counts.
    FREE_MODEL = ("sampler", "num_samples", "cache", "neighbours", "temperature")


def check(config: Config, mesh) -> None:
    """Raises UserError for a batch that cannot be split over devices and micro-batches, and for empty intervals."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch_size < 1 or config.batch_size % (devices * config.optim.accumulate):
        raise errors.UserError(
            f"config.batch_size: {config.batch_size} is not a multiple of {devices} devices (config.mesh data x fsdp) "
            f"times {config.optim.accumulate} micro-batches (config.optim.accumulate)"
        )
    for name in ("log_every", "eval_every"):
        if getattr(config, name) < 1:
            raise errors.UserError(f"config.{name}: {getattr(config, name)} steps; use at least 1")


class TrainState(flax.struct.PyTreeNode):
    """Everything a checkpoint holds."""

    step: jax.Array  # optimizer steps done
    params: Any
    opt_state: Any
    ema_params: Any  # None without an average


def identity(config: Config, frozen, initial) -> dict:
    """What a run's numbers depend on, as JSON: the config without its FREE fields, and the hashes of given weights."""
    fields = dataclasses.asdict(config)
    kept = {name: value for name, value in fields.items() if name not in Config.FREE}
    kept["data"] = {name: value for name, value in fields["data"].items() if name not in Config.FREE_DATA}
    kept["model"] = {
        name: value
        for name, value in fields["model"].items()
        if name not in Config.FREE_MODEL and not name.endswith("_weights")
    }
    hashes = lambda networks: {name: parameters.content_hash(params) for name, params in networks.items()}
    return kept | {"frozen": hashes(frozen)} | ({"init": hashes(initial)} if initial else {})


def make_init(task, optimizer, config: Config):
    """`(rng, pretrained) -> TrainState`, pure; `pretrained`: parameters that do not start at random."""

    def init(rng, pretrained=None):
        params = parameters.replaced(task.init(rng), pretrained or {})
        average = params if config.optim.ema_decay else None
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jax.tree.map(jnp.copy, average))

    return init


def make_step(task, optimizer, schedule, config: Config):
    """`(state, frozen, batch) -> (state, metrics)`; its randomness is a function of the seed and the step."""
    grad = jax.value_and_grad(task.loss, has_aux=True)
    pieces = config.optim.accumulate

    def gradients(params, frozen, batch, rng):
        if pieces == 1:
            (_, metrics), grads = grad(params, frozen, batch, rng, True)
            return grads, metrics

        def add(total, piece):
            index, micro_batch = piece
            (_, metrics), grads = grad(params, frozen, micro_batch, jax.random.fold_in(rng, index), True)
            return jax.tree.map(lambda a, b: a + b / pieces, total, grads), metrics

        # Strided pieces, so that each spans all devices.
        split = jax.tree.map(lambda a: a.reshape(-1, pieces, *a.shape[1:]).swapaxes(0, 1), batch)
        zeros = jax.tree.map(jnp.zeros_like, params)
        grads, metrics = jax.lax.scan(add, zeros, (jnp.arange(pieces), split))
        return grads, jax.tree.map(lambda values: values.mean(0), metrics)

    def step(state: TrainState, frozen, batch):
        rng = jax.random.fold_in(jax.random.key(config.seed), state.step)
        grads, metrics = gradients(state.params, frozen, batch, rng)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.ema_params
        if config.optim.ema_decay:
            average = optax.incremental_update(params, average, 1 - config.optim.ema_decay)
        metrics |= {
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
            "learning_rate": schedule(state.step),
        }
        return TrainState(state.step + 1, params, opt_state, average), metrics

    return step


@dataclasses.dataclass(frozen=True)
class Run:
    """What the loop, and everything that must see the same program as the loop, works with."""

    config: Config
    task: Any
    mesh: jax.sharding.Mesh
    length: optim.Length
    init: Any  # (rng, pretrained = None) -> TrainState
    step: Any  # jitted (state, frozen, batch) -> (state, metrics)
    state: TrainState  # shapes and shardings
    source: Any  # the training split; None where it was not opened


def build(config: Config, num_train: int = 0, mesh=None) -> Run:
    """The jitted program of a config; nothing is computed yet.

    Args:
      num_train: images in an epoch; 0 = open the training split and count.
      mesh: default: all devices, as `config.mesh` says.
    """
    mesh = mesh or partition.make_mesh(config.mesh)
    check(config, mesh)
    task = tasks.create(config.task, config.model, partition.compute_dtype(config.dtype, mesh))
    source = None if num_train else tasks.open_source(task, "train", config.data)
    num_train = num_train or len(source)
    run = optim.length(
        config.optim, epochs=config.epochs, steps=config.steps, num_train=num_train, batch_size=config.batch_size
    )
    schedule = optim.schedule(config.optim, run, config.batch_size)
    optimizer = optim.build(config.optim, schedule)
    init = make_init(task, optimizer, config)
    with jax.set_mesh(mesh):  # whose devices may exist in a plan only: nothing is computed, the key neither
        shapes = jax.eval_shape(lambda: init(jax.random.key(config.seed)))
    layout = partition.shardings(shapes, mesh)
    everywhere = partition.replicated(mesh)
    step = jax.jit(
        make_step(task, optimizer, schedule, config),
        in_shardings=(layout, everywhere, partition.batch_sharding(mesh)),
        out_shardings=(layout, everywhere),
        donate_argnums=0,
    )
    state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, layout)
    return Run(config, task, mesh, run, jax.jit(init, out_shardings=layout), step, state, source)


def train(config: Config, workdir: str) -> None:
    """Train to the end of the schedule, from the newest checkpoint in `workdir` if there is one."""
    run = build(config)
    with jax.set_mesh(run.mesh), processes.Interrupt() as interrupt:
        frozen = run.task.load_frozen()
        initial = run.task.load_pretrained() if hasattr(run.task, "load_pretrained") else {}
        if config.init:
            initial = weights.fit(weights.read(config.init, field="config.init: "), run.state.params, f"config.init ({config.init})")
        if config.evaluate.features:
            evaluate.prepare(run)  # a mistake there is told before the first step
        saver = checkpoint.Checkpointer(workdir, config.checkpoint, identity(config, frozen, initial))
        frozen = evaluate.place(run, frozen)
        state, start = saver.restore_latest(run.state) or (run.init(jax.random.key(config.seed), initial), 0)
        if start >= run.length.total:
            print(f"{workdir}: already trained to step {start} of {run.length.total}")
            return
        batches = pipeline.train_batches(
            run.source, run.task.transform("train", config.data), seed=config.seed, batch_size=config.batch_size, start_step=start,
            config=config.data, rows=partition.rows(run.mesh, config.batch_size),
        )  # fmt: skip
        log = Log(workdir, run, saver, start)
        try:
            with processes.noticing_losses():  # before what is below waits for all
                state = loop(run, state, frozen, start, batches, saver, log, interrupt)
        finally:
            batches.close()
            saver.close()
            log.close()
    if interrupt.requested and int(state.step) < run.length.total:
        print(f"stopped by a signal at step {int(state.step)}; the same command goes on from there")
        processes.agreed(True)  # the first one may still be writing
        raise SystemExit(128 + signal.SIGTERM)


def loop(run: Run, state, frozen, start: int, batches, saver, log: "Log", interrupt: processes.Interrupt):
    """The loop itself. The order matters: a checkpoint is made *before* the batch that follows it is taken, and
    a step's metrics are read only once the following step has been dispatched."""
    config, total = run.config, run.length.total
    on_device = pipeline.to_device(batches, partition.batch_sharding(run.mesh))
    for step in range(start, total):
        state, metrics = run.step(state, frozen, next(on_device))
        log.add(step + 1, metrics)
        done = step + 1
        last = done == total or interrupt.after(done)
        if last or done % config.checkpoint.every == 0:
            log.flush()  # a non-finite loss ends the run here, before it is saved
            saver.save(done, state)
        if done % config.eval_every == 0 or done == total:
            log.flush()
            log.results(done, *evaluate.run(run, state, frozen))
        if last:
            break
    return state


class Log:
    """Metrics of each step, one step late; the console, TensorBoard and log.jsonl."""

    def __init__(self, workdir: str, run: Run, saver, start: int):
        self.writer = writers.Writer(workdir, enabled=jax.process_index() == 0, start_step=start)
        self.progress = writers.Progress(run.length.total, start, enabled=jax.process_index() == 0)
        self.every, self.saver, self.workdir = run.config.log_every, saver, workdir
        self.waiting, self.window = None, []

    def add(self, step: int, metrics) -> None:
        self.flush()
        self.waiting = (step, metrics)

    def flush(self) -> None:
        """Read the waiting metrics. Raises UserError when the loss, a gradient or a new parameter is not finite."""
        if self.waiting is None:
            return
        (step, metrics), self.waiting = self.waiting, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        watched = {name: values[name] for name in ("loss", "grad_norm", "param_norm")}
        if not all(map(math.isfinite, watched.values())):
            found = ", ".join(f"{name} {value}" for name, value in watched.items())
            newest = self.saver.newest()
            last = "there is no checkpoint yet" if newest is None else f"the last good checkpoint is step {newest}"
            raise errors.UserError(f"step {step}: {found}; stopped. In {self.workdir} {last}; lower config.optim.base_lr")
        self.window.append(values)
        self.progress.update(step, f"loss {values['loss']:.4f}")
        if step % self.every == 0:
            mean = {name: sum(entry[name] for entry in self.window) / len(self.window) for name in values}
            self.writer.scalars(step, {f"train/{name}": value for name, value in mean.items()})
            self.window = []

    def results(self, step: int, scalars: dict, images: dict) -> None:
        self.writer.scalars(step, {f"eval/{name}": value for name, value in scalars.items()})
        self.writer.images(step, images)

    def close(self) -> None:
        self.progress.close()
        self.writer.close()
        if jax.process_index() == 0:
            writers.curves(f"{self.workdir}/log.jsonl", f"{self.workdir}/curves.png")

"""The training loop. Knows no task, loss or data set: config -> data -> task -> step -> checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from addp_jax import (
    checkpoint, errors, evaluate, files, lock, optim, parameters, partition, processes, program, schema, writers,
)  # fmt: skip
from addp_jax.data import pipeline, sources
from addp_jax.interop import weights
from addp_jax.ops import keys

SMALLEST_SHARE = 0.5  # of a checkpoint's bytes that it takes on the disk, compressed, at the very least


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole run; configs/base.py says what each field means. Of `model` the task's own Config says what matters."""

    task: str
    model: Any  # fields of the task's own Config
    seed: int
    batch_size: int = schema.field(least=1)
    epochs: float = schema.field(least=0)
    steps: int = schema.field(least=0)
    dtype: str
    log_every: int = schema.field(least=1, matters=schema.NOTHING)
    eval_every: int = schema.field(least=1, matters=schema.NOTHING)
    eval_batches: int = schema.field(least=0, matters=schema.NOTHING)
    data: pipeline.Config
    optim: optim.Config
    mesh: partition.Config = schema.field(matters=schema.NOTHING)
    checkpoint: checkpoint.Config = schema.field(matters=schema.NOTHING)
    generate: Any = schema.field(matters=schema.NOTHING)
    predict: Any = schema.field(matters=schema.NOTHING)
    robustness: Any = schema.field(matters=schema.NOTHING)
    # Run folder or weight file that the trained network starts from; "" = random. Its content matters, not its path.
    init: str = schema.field("", matters=schema.NOTHING)
    evaluate: evaluate.Config = schema.field(evaluate.Config(), matters=schema.NOTHING)


def check(config: Config, mesh) -> None:
    """Raises UserError for a batch that cannot be split over devices and micro-batches."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch_size % (devices * config.optim.accumulate):
        raise errors.UserError(
            f"config.batch_size: {config.batch_size} is not a multiple of {devices} devices (config.mesh data x fsdp) "
            f"times {config.optim.accumulate} micro-batches (config.optim.accumulate)"
        )


class TrainState(flax.struct.PyTreeNode):
    """Everything a checkpoint holds."""

    step: jax.Array  # optimizer steps done
    params: Any
    opt_state: Any
    ema_params: Any  # None without an average


def identity(program: program.Program, frozen, initial) -> dict:
    """What a run's numbers depend on, as JSON; it is compared whenever the run goes on or its networks are used.

    The config's fields that matter, the dtype of the computation, the names of the classes in the order of the labels,
    the content of the training data, and the content of frozen and initial weights. `location`, which is not compared, says
    where the data lay at first.
    """
    config, source = program.config, program.source("train")
    fields = schema.identity(config) | {
        "model": schema.identity(program.task.config),
        "dtype": partition.compute_dtype(config.dtype, program.mesh).name,
    }
    fields["data"] |= {"classes": list(source.classes), "content": sources.fingerprint(source)}
    location = {name: getattr(config.data, name) for name in ("path", "train_split", "eval_split", "num_eval")}
    hashes = lambda networks: {name: parameters.content_hash(params) for name, params in networks.items()}
    return fields | {"location": location, "frozen": hashes(frozen)} | ({"init": hashes(initial)} if initial else {})


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
        rng = jax.random.fold_in(keys.of(config.seed, "training"), state.step)
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


@dataclasses.dataclass(frozen=True, eq=False)
class Run(program.Program):
    """What the loop, and everything that must see the same program as the loop, works with."""

    length: optim.Length = dataclasses.field(kw_only=True)
    init: Any = dataclasses.field(kw_only=True)  # jitted (rng, pretrained = None) -> TrainState
    step: Any = dataclasses.field(kw_only=True)  # jitted (state, frozen, batch) -> (state, metrics)
    state: TrainState = dataclasses.field(kw_only=True)  # shapes and shardings


def build(config: Config, num_train: int = 0, mesh=None) -> Run:
    """The jitted training program of a config; nothing is computed yet.

    Args:
      num_train: images in an epoch; 0 = open the training split and count.
      mesh: default: all devices, as `config.mesh` says.
    """
    mesh = mesh or partition.make_mesh(config.mesh)
    check(config, mesh)
    base = program.create(config, mesh)
    task = base.task
    num_train = num_train or len(base.source("train"))
    length = optim.length(
        config.optim, epochs=config.epochs, steps=config.steps, num_train=num_train, batch_size=config.batch_size
    )
    schedule = optim.schedule(config.optim, length, config.batch_size)
    optimizer = optim.build(config.optim, schedule)
    init = make_init(task, optimizer, config)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: init(keys.of(config.seed, "parameters")))
    layout = partition.shardings(shapes, mesh)
    everywhere = partition.replicated(mesh)
    step = jax.jit(
        make_step(task, optimizer, schedule, config),
        in_shardings=(layout, everywhere, partition.batch_sharding(mesh)),
        out_shardings=(layout, everywhere),
        donate_argnums=0,
    )
    state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, layout)
    init = jax.jit(init, out_shardings=layout)
    return Run(config, task, mesh, state.params, base.opened, length=length, init=init, step=step, state=state)


def preflight(run: Run, workdir: str) -> None:
    """All that can be known of the data before the first step: both splits, their classes, what evaluations need."""
    train, held_out = run.source("train"), run.source("eval")
    if hasattr(run.task, "num_classes"):  # shards of two splits may have been packed from folders of other classes
        program.check_classes("the training split", train.classes, held_out)
    if run.config.evaluate.features:
        evaluate.prepare(run)


def require_room(run: Run, workdir: str) -> None:
    """Raises UserError if `workdir` cannot be written to or its disk has no room for a checkpoint."""
    files.require_writable(workdir, "--workdir")
    needed, free = parameters.size(run.state), shutil.disk_usage(workdir).free
    if free < SMALLEST_SHARE * needed:
        raise errors.UserError(
            f"--workdir {workdir}: a checkpoint takes {needed / 1e6:.0f} MB, and the disk has {free / 1e6:.0f} MB left"
        )


def train(config: Config, workdir: str) -> None:
    """Train to the end of the schedule, from the newest checkpoint in `workdir` if there is one."""
    run = build(config)
    preflight(run, workdir)
    with jax.set_mesh(run.mesh), processes.Interrupt() as interrupt, contextlib.ExitStack() as stack:
        frozen = run.task.load_frozen()
        initial = run.task.load_pretrained() if hasattr(run.task, "load_pretrained") else {}
        if config.init:
            initial = weights.fit(weights.read(config.init, field="config.init: "), run.state.params, f"config.init ({config.init})")
        require_room(run, workdir)
        stack.enter_context(lock.hold(workdir))
        saver = checkpoint.Checkpointer(workdir, config.checkpoint, identity(run, frozen, initial))
        stack.enter_context(contextlib.closing(saver))
        frozen = run.place(frozen)
        state, start = saver.restore_latest(run.state) or (run.init(keys.of(config.seed, "parameters"), initial), 0)
        finish(run, workdir, state, frozen, start, saver, interrupt)


def finish(run: Run, workdir: str, state, frozen, start: int, saver, interrupt: processes.Interrupt) -> None:
    """From step `start` to the end, or to a signal; first the evaluation at `start`, if the run was killed before it."""
    config, total = run.config, run.length.total
    due = bool(start) and (start % config.eval_every == 0 or start >= total)
    first = jax.process_index() == 0  # it alone has the log
    missing = due and not processes.agreed(not first or writers.holds(f"{workdir}/log.jsonl", start, "eval/"))
    if start >= total and not missing:
        print(f"{workdir}: already trained to step {start} of {total}")
        return
    with Log(workdir, run, saver, start) as log, processes.noticing_losses():  # before what is outside waits for all
        if missing:
            log.results(start, *evaluate.run(run, state, frozen))
        if start < total:
            batches = pipeline.train_batches(
                run.source("train"), run.task.transform("train", config.data), seed=config.seed, batch_size=config.batch_size,
                start_step=start, config=config.data, rows=partition.rows(run.mesh, config.batch_size),
            )  # fmt: skip
            with contextlib.closing(batches):
                state = loop(run, state, frozen, start, batches, saver, log, interrupt)
    if interrupt.requested and int(state.step) < total:
        saver.wait()
        print(f"stopped by a signal at step {int(state.step)}; the same command goes on from there")
        processes.agreed(True)  # the first one may still be writing
        raise SystemExit(128 + interrupt.requested)


def loop(run: Run, state, frozen, start: int, batches, saver, log: Log, interrupt: processes.Interrupt):
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
            raise errors.UserError(
                f"step {step}: {found}; stopped. In {self.workdir} {self.last_checkpoint()}; lower config.optim.base_lr"
            )
        self.window.append(values)
        self.progress.update(step, f"loss {values['loss']:.4f}")
        if step % self.every == 0:
            mean = {name: sum(entry[name] for entry in self.window) / len(self.window) for name in values}
            self.write(self.writer.scalars, step, {f"train/{name}": value for name, value in mean.items()})
            self.window = []

    def results(self, step: int, scalars: dict, images: dict) -> None:
        self.write(self.writer.scalars, step, {f"eval/{name}": value for name, value in scalars.items()})
        self.write(self.writer.images, step, images)

    def write(self, method, step: int, values: dict) -> None:
        try:
            method(step, values)
        except errors.UserError as error:
            raise errors.UserError(f"{error}; {self.last_checkpoint()}") from error

    def last_checkpoint(self) -> str:
        newest = self.saver.newest()
        return "there is no checkpoint yet" if newest is None else f"the last good checkpoint is step {newest}"

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            self.progress.close()
            self.writer.close()
            if jax.process_index() == 0:
                writers.curves(f"{self.workdir}/log.jsonl", f"{self.workdir}/curves.png")
        except errors.UserError:
            if kind is None:  # else the error that ends the run says more
                raise

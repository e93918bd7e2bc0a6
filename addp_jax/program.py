"""One object per program: a config's task on a mesh, its data, and how trained networks get into it; and its training.

A network is used only with what it was trained with: `Program.read` and `weights.check_frozen` compare the record that
a run keeps of itself (`training.loop.identity`) with the present config and weights, in every mode.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from addp_jax import errors, optim, parameters, partition, schema, tasks, weights
from addp_jax.data import pipeline
from addp_jax.ops import keys
from addp_jax.weights import checkpoint, provenance

SHOWN = 5  # class names in a message


@schema.config
class Evaluation:
    """What every evaluation tells beside the task's own figures."""

    # Distances between images of the evaluation split and the model's own, in the features of this network:
    features: str = ""  # inception, or the work directory of a convnet or addp run; "" = no distances
    inception_weights: str = ""  # pt_inception-2015-12-05-6726825d, .pth or .safetensors
    num_images: int = schema.field(2000, least=2, tiny=16)  # of the split, spread evenly; the names end in it: fid_2k
    batch_size: int = schema.field(64, least=1, tiny=8)
    seed: int = 0  # of the samples
    # Images of each split by which the features of the network itself are judged (training/watch.py); 0 = none.
    watch_features: int = schema.field(0, least=0)


@schema.config
class Config:
    """A run. Of `model` the task's own Config says what matters."""

    task: str  # a file in addp_jax/tasks
    model: Any  # fields of the task's own Config
    # Run folder or weight file that the trained network starts from; "" = random. Its content matters, not its path.
    init: str = schema.field("", matters=schema.NOTHING)
    seed: int = 0  # of parameters, masks, dropout, data order
    batch_size: int = schema.field(4096, least=1, tiny=8)  # images per optimizer step, over all devices
    epochs: float = schema.field(0.0, least=0, tiny=0.0)  # passes over the training split; or
    steps: int = schema.field(0, least=0, tiny=4)  # optimizer steps; exactly one of the two is set
    # Of the computation; auto: float32 on CPU, bfloat16 elsewhere. Parameters are float32.
    dtype: str = schema.field("auto", choices=("auto", "float32", "bfloat16"))
    log_every: int = schema.field(50, least=1, matters=schema.NOTHING, tiny=1)  # steps
    eval_every: int = schema.field(5000, least=1, matters=schema.NOTHING, tiny=4)  # steps
    # Batches per evaluation while training, spread over the split; 0 = the whole split.
    eval_batches: int = schema.field(8, least=0, matters=schema.NOTHING, tiny=1)
    # The first of a few steps of which TensorBoard's profiler shows what the devices do; 0 = none. A run that resumes
    # beyond it traces nothing.
    profile: int = schema.field(0, least=0, matters=schema.NOTHING)
    data: pipeline.Config = pipeline.Config()
    optim: optim.Config = optim.Config()
    mesh: partition.Config = schema.field(partition.Config(), matters=schema.NOTHING)
    checkpoint: checkpoint.Config = schema.field(checkpoint.Config(), matters=schema.NOTHING)
    evaluate: Evaluation = schema.field(Evaluation(), matters=schema.NOTHING)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What every mode works with; only training knows more (`TrainingProgram`)."""

    config: Any  # Config
    task: tasks.Task
    mesh: jax.sharding.Mesh
    params: Any  # shapes and shardings of the networks that the task trains
    opened: dict = dataclasses.field(default_factory=dict)  # what `source` has opened, and evaluations have computed

    def source(self, split: str):
        """What the task reads in the split "train" or "eval"; opened once."""
        if split not in self.opened:
            self.opened[split] = self.task.open_source(split, self.config.data)
        return self.opened[split]

    def read(self, workdir: str) -> tuple[dict, dict]:
        """`(parameters as numpy arrays, identity)` of the newest checkpoint in `workdir`; averages if it has them.

        Raises UserError if the run is one of another task or had other settings of its networks.
        """
        params, info = checkpoint.load_params(workdir, ema=True)
        identity = info["identity"]
        own = {"task": self.config.task, "model": schema.identity(self.task.config, "network")}
        if "model" in identity:  # imported weights have no record of their settings
            usual = schema.identity(type(self.task.config)(), "network")
            model = provenance.completed(identity["model"], own["model"], usual)
            provenance.require_settings(workdir, {"task": identity.get("task"), "model": model}, own)
        params = weights.fit(params, self.params, workdir)
        print(f"{workdir}: parameters of step {info['step']}")
        return params, identity

    def load(self, workdir: str):
        """`((parameters, frozen networks) on the mesh, identity)`; the parameters are laid out as in training."""
        params, identity = self.read(workdir)
        frozen = self.task.load_frozen()
        weights.check_frozen(workdir, identity, frozen)
        layouts = jax.tree.map(lambda leaf: leaf.sharding, self.params)
        return (partition.put(params, {name: layouts[name] for name in params}), self.place(frozen)), identity

    def load_for_sampling(self, workdir: str):
        """`(parameters, frozen networks)` as numpy arrays: those that sampling needs."""
        params, identity = self.read(workdir)
        frozen = typing.cast(tasks.Generator, self.task).load_for_sampling()  # modes that sample take no other task
        weights.check_frozen(workdir, identity, frozen)
        return params, frozen

    def place(self, networks):
        """Networks whole on every device."""
        return partition.put(self.compact(networks), partition.replicated(self.mesh))

    def compact(self, networks):
        """Networks as devices keep them: kernels in the dtype of the computation where the task allows it."""
        dtype = partition.compute_dtype(self.config.dtype, self.mesh)
        return parameters.compact(networks, self.task.compact, dtype)


def create(config, mesh=None) -> Program:
    """The program of a config; nothing is computed and no data is opened yet. mesh: default: all devices."""
    mesh = mesh or partition.make_mesh(config.mesh)
    task = tasks.create(config.task, config.model, partition.compute_dtype(config.dtype, mesh))
    with jax.set_mesh(mesh):  # whose devices may exist in a plan only: nothing is computed, the key neither
        shapes = jax.eval_shape(lambda: task.init(keys.of(config.seed, "parameters")))
    layout = partition.shardings(shapes, mesh, task.layout)
    params = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, layout)
    return Program(config, task, mesh, params)


class TrainState(flax.struct.PyTreeNode):
    """Everything a checkpoint holds."""

    step: jax.Array  # optimizer steps done
    params: Any
    opt_state: Any
    ema_params: Any  # None without an average


def make_init(task, optimizer, config: Config):
    """`(rng, pretrained) -> TrainState`, pure; `pretrained`: parameters that do not start at random."""

    def init(rng, pretrained=None):
        params = parameters.replaced(task.init(rng), pretrained or {})
        average = params if config.optim.ema_decay else None
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jax.tree.map(jnp.copy, average))

    return init


def with_average(task, frozen: dict, average) -> dict:
    """What `task.loss` gets as frozen networks: with the averaged parameters, where it reads them."""
    return frozen | {tasks.AVERAGE: average} if task.average_for else frozen


def make_step(task, optimizer, schedule, config: Config):
    """`(state, frozen, batch) -> (state, metrics)`; its randomness is a function of the seed and the step."""
    grad = jax.value_and_grad(task.loss, has_aux=True)
    pieces = config.optim.accumulate

    def gradients(params, frozen, batch, rng):
        if pieces == 1:
            (_, metrics), grads = grad(params, frozen, batch, rng, True)
            return grads, metrics

        def add(carry, piece):
            total, statistics = carry
            index, micro_batch = piece
            rng_of_piece = jax.random.fold_in(rng, index)
            (_, metrics), grads = grad(parameters.replaced(params, statistics), frozen, micro_batch, rng_of_piece, True)
            statistics = metrics.pop(tasks.STATISTICS, {})  # one micro-batch after the other goes into them
            return (jax.tree.map(lambda a, b: a + b / pieces, total, grads), statistics), metrics

        # Strided pieces, so that each spans all devices.
        split = jax.tree.map(lambda a: a.reshape(-1, pieces, *a.shape[1:]).swapaxes(0, 1), batch)
        start = jax.tree.map(jnp.zeros_like, params), parameters.running(params)
        (grads, statistics), metrics = jax.lax.scan(add, start, (jnp.arange(pieces), split))
        return grads, {tasks.STATISTICS: statistics} | jax.tree.map(lambda values: values.mean(0), metrics)

    def step(state: TrainState, frozen, batch):
        rng = jax.random.fold_in(keys.of(config.seed, "training"), state.step)
        grads, metrics = gradients(state.params, with_average(task, frozen, state.ema_params), batch, rng)
        statistics = metrics.pop(tasks.STATISTICS, {})
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = parameters.replaced(optax.apply_updates(state.params, updates), statistics)
        average = state.ema_params
        if config.optim.ema_decay:
            average = optax.incremental_update(params, average, 1 - config.optim.ema_decay)
            average = parameters.replaced(average, statistics)  # which are averages already
        metrics |= {
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
            "learning_rate": schedule(state.step),
        }
        return TrainState(state.step + 1, params, opt_state, average), metrics

    return step


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingProgram(Program):
    """What the loop, and everything that must see the same program as the loop, works with; see `create_training`."""

    length: optim.Length = dataclasses.field(kw_only=True)
    init: Any = dataclasses.field(kw_only=True)  # jitted (rng, pretrained = None) -> TrainState
    step: Any = dataclasses.field(kw_only=True)  # jitted (state, frozen, batch) -> (state, metrics)
    state: TrainState = dataclasses.field(kw_only=True)  # shapes and shardings

    @property
    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and shardings of a training batch."""
        sharding, size = partition.batch_sharding(self.mesh), self.config.batch_size
        stack = lambda one: jax.ShapeDtypeStruct((size, *one.shape), one.dtype, sharding=sharding)
        return {name: stack(one) for name, one in self.task.example.items()}


def require_divisible_batch(config: Config, mesh) -> None:
    """Raises UserError for a batch that cannot be split over devices and micro-batches."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch_size % (devices * config.optim.accumulate):
        raise errors.UserError(
            f"config.batch_size: {config.batch_size} is not a multiple of {devices} devices (config.mesh data x fsdp) "
            f"times {config.optim.accumulate} micro-batches (config.optim.accumulate)"
        )


def create_training(config: Config, num_train: int = 0, mesh=None) -> TrainingProgram:
    """The jitted training program of a config; nothing is computed yet.

    Args:
      num_train: images in an epoch; 0 = open the training split and count.
      mesh: default: all devices, as `config.mesh` says.
    """
    mesh = mesh or partition.make_mesh(config.mesh)
    require_divisible_batch(config, mesh)
    base = create(config, mesh)
    task = base.task
    if task.average_for and not config.optim.ema_decay:
        raise errors.UserError(
            f"config.optim.ema_decay: 0, but {task.average_for} needs the averaged parameters; set it, to 0.9999 or so"
        )
    num_train = num_train or len(base.source("train"))
    length = optim.length(
        config.optim, epochs=config.epochs, steps=config.steps, num_train=num_train, batch_size=config.batch_size
    )
    schedule = optim.schedule(config.optim, length, config.batch_size)
    optimizer = optim.build(config.optim, schedule)
    init = make_init(task, optimizer, config)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: init(keys.of(config.seed, "parameters")))
    layout = partition.shardings(shapes, mesh, task.layout)
    everywhere = partition.replicated(mesh)
    step = jax.jit(
        make_step(task, optimizer, schedule, config),
        in_shardings=(layout, everywhere, partition.batch_sharding(mesh)),
        out_shardings=(layout, everywhere),
        donate_argnums=0,
    )
    state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, layout)
    init = jax.jit(init, out_shardings=layout)
    functions = dict(init=init, step=step)
    return TrainingProgram(config, task, mesh, state.params, base.opened, length=length, state=state, **functions)


def check_classes(where: str, recorded, source) -> None:
    """Raises UserError unless `source` has the classes that are on `recorded` in `where`, in the same order."""
    found = list(source.classes)
    if not recorded or not found or list(recorded) == found:
        return
    gone, new = (sorted(set(one) - set(other)) for one, other in ((recorded, found), (found, recorded)))
    text = f"lacks {parameters.shortened(gone, SHOWN)}" * bool(gone) + ", " * bool(gone and new)
    text += f"has {parameters.shortened(new, SHOWN)}" * bool(new)
    raise errors.UserError(
        f"config.data: {source!r} has {len(found)} classes, {where} {len(recorded)}: "
        f"this data {text or 'has them in another order'}"
    )

"""The training loop. Knows no task, loss or data set: config -> data -> task -> step -> checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import sys
import time

import jax

from addp_jax import errors, files, parameters, partition, processes, program, schema, tasks, weights
from addp_jax.data import pipeline
from addp_jax.ops import keys
from addp_jax.program import TrainingProgram
from addp_jax.training import evaluate, pace, reports, watch
from addp_jax.training.log import Log
from addp_jax.weights import buckets, checkpoint, lock

SMALLEST_SHARE = 0.5  # of a checkpoint's bytes that it takes on the disk, compressed, at the very least
HASHING_SECONDS = 5.0  # for hashing the last checkpoint after a signal; without hashes it counts too
LARGE = 50_000_000  # parameters that nobody trains on a CPU on purpose


def preflight(run: TrainingProgram, workdir: str) -> None:
    """All that can be known of the data before the first step: both splits, their classes, what evaluations need."""
    train, held_out = run.source("train"), run.source("eval")
    if isinstance(run.task, tasks.KnowsClasses):  # the shards of two splits may be of folders of other classes
        program.check_classes("the training split", train.classes, held_out)
    if run.config.evaluate.features:
        evaluate.prepare(run)
    if run.config.evaluate.watch_features:
        watch.prepare(run)


def require_room(run: TrainingProgram, workdir: str) -> None:
    """Raises UserError if `workdir` cannot be written to or its disk has no room for a checkpoint."""
    files.require_writable(workdir, "workdir")
    needed, free = parameters.size(run.state), shutil.disk_usage(workdir).free
    if free < SMALLEST_SHARE * needed:
        raise errors.UserError(
            f"workdir {workdir}: a checkpoint takes {needed / 1e6:.0f} MB, and the disk has {free / 1e6:.0f} MB left"
        )


def warn_of_cpu(run: TrainingProgram) -> None:
    """One line on stderr when a network of full size is about to be trained on a CPU."""
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(run.params))
    if count > LARGE and run.mesh.devices.flat[0].platform == "cpu" and jax.process_index() == 0:
        print(
            f"warning: {count / 1e6:.0f} M parameters are trained on a CPU, how long that takes is not known; with an "
            "accelerator in this machine: pip install -e '.[cuda12]' (or cuda13, tpu)", file=sys.stderr,
        )  # fmt: skip


def write_config(run: TrainingProgram, workdir: str) -> None:
    """Write every field of the run to `<workdir>/config.json`: for whoever loads the run without its config file.

    It decides nothing: what must agree stands in the run's identity. Raises UserError if it cannot be written.
    """
    if jax.process_index() != 0:
        return
    fields = schema.fields(dataclasses.replace(run.config, model=run.task.config))
    with files.explain(f"workdir: cannot write to {workdir}"):
        files.write_text(f"{workdir}/{buckets.CONFIG}", json.dumps(fields, indent=1) + "\n")


def train(config: program.Config, workdir: str) -> None:
    """Train to the end of the schedule, from the newest checkpoint in `workdir` if there is one."""
    clock, interrupt = pace.Clock(), processes.Interrupt()
    run = program.create_training(config)
    warn_of_cpu(run)
    preflight(run, workdir)
    interrupt.leave()
    with jax.set_mesh(run.mesh), contextlib.ExitStack() as stack:
        frozen = run.task.load_frozen()
        initial = run.task.load_pretrained()
        if config.init:
            loaded = weights.read(config.init, field="config.init: ")
            initial = weights.fit(loaded, run.state.params, f"config.init ({config.init})")
        require_room(run, workdir)
        stack.enter_context(lock.hold(workdir))
        saver = checkpoint.Checkpointer(workdir, config.checkpoint, identity(run, frozen, initial))
        stack.enter_context(contextlib.closing(saver))
        write_config(run, workdir)
        frozen = run.place(frozen)
        interrupt.leave()
        clock.to("restore")
        state, start = saver.restore_latest(run.state) or (run.init(keys.of(config.seed, "parameters"), initial), 0)
        clock.to("start")
        interrupt.leave()
        with interrupt:
            finish(run, workdir, state, frozen, start, saver, interrupt, clock)


def finish(run: TrainingProgram, workdir: str, state, frozen, start: int, saver, interrupt, clock: pace.Clock) -> None:
    """From step `start` to the end, or to a signal (`interrupt`); first the evaluation that a kill prevented."""
    config, total = run.config, run.length.total
    due = bool(start) and (start % config.eval_every == 0 or start >= total)
    first = jax.process_index() == 0  # it alone has the log
    missing = due and not processes.agreed(not first or reports.holds(f"{workdir}/log.jsonl", start, "eval/"))
    if start >= total and not missing:
        print(f"{workdir}: already trained to step {start} of {total}")
        return
    with Log(workdir, run, saver, start, clock) as log, processes.as_one():  # before what is outside waits for all
        if missing:
            clock.to("evaluate")
            with interrupt.at_once():
                log.results(start, *evaluate.run(run, state, frozen))
        if start < total and not interrupt.cut_short:
            batches = pipeline.train_batches(
                run.source("train"), run.task.transform("train", config.data), seed=config.seed, start_step=start,
                batch_size=config.batch_size, rows=partition.rows(run.mesh, config.batch_size), config=config.data,
                fields=run.task.example,
            )  # fmt: skip
            with contextlib.closing(batches):
                state = loop(run, state, frozen, start, batches, saver, log, interrupt, clock)
    if interrupt.requested and (interrupt.cut_short or int(state.step) < total):
        saver.wait(hashing=HASHING_SECONDS)
        print(f"stopped by a signal at step {int(state.step)}; the same command goes on from there")
        processes.agreed(True)  # the first one may still be writing
        raise SystemExit(128 + interrupt.requested)


def loop(run: TrainingProgram, state, frozen, start: int, batches, saver, log: Log, interrupt, clock: pace.Clock):
    """The loop itself. The order matters: a checkpoint is made *before* the batch that follows it is taken, and
    a step's metrics are read only once the following ones have been dispatched, so that no device waits for it."""
    config, total, saved = run.config, run.length.total, time.monotonic()
    on_device = pipeline.to_device(batches, partition.batch_sharding(run.mesh))
    for step in range(start, total):
        clock.to("data")
        batch = next(on_device)
        log.trace.before(step + 1)
        clock.to("train" if step > start else "compile")
        state, metrics = run.step(state, frozen, batch)
        clock.to("train")
        log.add(step + 1, metrics)
        done = step + 1
        last = done == total or interrupt.after()
        log.trace.after(done, metrics, last)
        if last or done % config.checkpoint.every == 0 or overdue(config, done, saved):
            log.flush()  # a non-finite loss ends the run here, before it is saved
            clock.to("save")
            saver.save(done, state)
            saved = time.monotonic()
        if done % config.eval_every == 0 or done == total:
            log.flush()
            clock.to("evaluate")
            with interrupt.at_once():
                log.results(done, *evaluate.run(run, state, frozen))
            if interrupt.cut_short and not last:
                saver.save(done, state)
                break
        if last:
            break
    return state


def overdue(config: program.Config, step: int, saved: float) -> bool:
    """Whether it is time for a checkpoint by the clock of any process. saved: when the last one was made."""
    minutes = config.checkpoint.every_minutes
    if not minutes or step % config.log_every:
        return False
    return bool(processes.largest(int(time.monotonic() - saved > 60 * minutes)))


def identity(program: program.Program, frozen, initial) -> dict:
    """What a run's numbers depend on, as JSON; it is compared whenever the run goes on or its networks are used.

    The config's fields that matter, the dtype of the computation, the names of the classes in the order of the labels,
    the content of the training data, and the content of frozen and initial weights. `location`, which is not compared,
    says where the data lay at first.
    """
    config, source = program.config, program.source("train")
    fields = schema.identity(config) | {
        "model": schema.identity(program.task.config),
        "dtype": partition.compute_dtype(config.dtype, program.mesh).name,
    }
    fields["data"] |= {"classes": list(source.classes), "content": source.fingerprint()}
    location = {name: getattr(config.data, name) for name in ("path", "train_split", "eval_split", "num_eval")}
    hashes = lambda networks: {name: parameters.content_hash(params) for name, params in networks.items()}
    return fields | {"location": location, "frozen": hashes(frozen)} | ({"init": hashes(initial)} if initial else {})

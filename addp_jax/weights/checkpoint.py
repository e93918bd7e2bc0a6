"""Checkpoints: save, restore the newest undamaged one, and read another run's parameters.

Layout of a work directory::

    <workdir>/config.json                      all fields of the run, which training writes
    <workdir>/lock                             while a run is at work, see `lock`
    <workdir>/checkpoints/identity.json        which run this is (fields that decide the numbers)
    <workdir>/checkpoints/<step>/state/...     what orbax writes; appears by one rename
    <workdir>/checkpoints/<step>/identity.json a copy; where both can be read, the copy counts
    <workdir>/checkpoints/<step>/blake2.json   size and hash of every file of that step, see `manifest`
    <workdir>/checkpoints/<step>.damaged/      set aside by a restore, never deleted

Orbax keeps no checksums: a flipped byte restores silently. Hence the hashes. A step without `blake2.json`, or with a
torn one, was killed between its commit and its hashing; it is accepted if it restores. A step that the manifest proves
sound and that cannot be used all the same is a UserError that names its folder.
"""

import concurrent.futures
import contextlib
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import sys
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp

from addp_jax import errors, files, parameters, processes, schema
from addp_jax.weights import lock, manifest, mirror, provenance, quiet

STEP = re.compile("0|[1-9][0-9]*")  # how a step's folder is named
quiet.install()


@schema.config
class Config:
    """When, and how many."""

    every: int = schema.field(1000, least=1, tiny=2)  # optimizer steps between checkpoints
    every_minutes: float = schema.field(0.0, least=0)  # the same by the clock, asked every `log_every`; 0 = not
    keep: int = schema.field(2, least=1)  # newest checkpoints kept
    keep_every: int = schema.field(0, least=0)  # additionally keep each multiple of this for ever; 0 = none


class Checkpointer:
    """Saves a run's states in the background and restores the newest undamaged one.

    Every process of a multi-host run makes one and calls the same methods in the same order.
    """

    def __init__(self, workdir, config, identity):
        """workdir: a folder, or the `mirror` of one in a bucket, where each process has a folder of its own.
        identity: JSON-able dict, the fields that decide the numbers and hashes of frozen weights.

        Raises UserError if `workdir` cannot be written to, or holds checkpoints of another identity.
        """
        self._root = pathlib.Path(lock.folder(workdir)) / "checkpoints"
        self._mirror = workdir if isinstance(workdir, mirror.Mirror) else None
        self._writes = self._mirror is not None or jax.process_index() == 0  # to its folder
        self._config, self._identity = config, json.dumps(identity, indent=1)
        files.require_writable(self._root, "workdir")
        steps = [self._root / str(step) for step in _steps(self._root)]
        provenance.require(self._root, steps, self._identity, self._writes)
        self._manager = self._pending = None  # _pending: the save under way, (future, step)
        self._pool, self._leaving = concurrent.futures.ThreadPoolExecutor(1, "checkpoint"), threading.Event()
        self._orbax()

    def restore_latest(self, abstract_state):
        """(state, step) of the newest undamaged checkpoint, or None if there is none yet.

        abstract_state: pytree of jax.ShapeDtypeStruct with shardings; the mesh need not be the one saved from.
        A damaged checkpoint is reported on stderr and set aside as `<step>.damaged`. Raises UserError if leaves differ
        in name, shape or dtype, or if all checkpoints are damaged.
        """
        self.wait()
        for step, older in itertools.pairwise([*_steps(self._root), None]):
            state, problem = self._restore(step, abstract_state)
            if not problem:
                return state, step
            self._set_aside(step, older, problem)
        if any(self._root.glob("*.damaged*")):
            advice = "use another workdir, or delete the *.damaged folders to start from the beginning"
            raise errors.UserError(f"all checkpoints in {self._root} are damaged; {advice}")
        return None

    def save(self, step, state):
        """Saves `state` in the background; a step that is already saved is left as it is.

        Returns once the arrays are copied off the devices. Raises UserError if this save, or the one before it, found
        no space or could not write.
        """
        self.wait()
        if step in _steps(self._root):
            return
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state))
        try:
            self._orbax().save(step, args=arguments, force=True)  # the loop decides when to save
        except Exception as error:
            self._fail(step, error)
        self._pending = self._pool.submit(self._commit, step), step

    def wait(self, hashing=None):
        """Blocks until the save under way is committed and hashed; raises UserError as `save` does.

        hashing: seconds after which an unfinished manifest is given up, as by a process that has been told to end.
        """
        if self._pending is None:
            return
        (future, step), self._pending = self._pending, None
        try:
            if concurrent.futures.wait([future], hashing).not_done:
                self._leaving.set()
            future.result()
        except Exception as error:
            self._fail(step, error)

    def newest(self):
        """Step of the newest checkpoint, or None; waits for the save under way."""
        self.wait()
        return max(_steps(self._root), default=None)

    def close(self):
        """Waits for the save under way and stops the background threads."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            if self._manager is not None:
                self._manager.close()

    def _orbax(self):
        """The manager, made anew after a failed save; that also removes what a killed save left."""
        if self._manager is None:
            policies = [ocp.checkpoint_managers.LatestN(1 if self._mirror else self._config.keep)]
            if self._config.keep_every and not self._mirror:
                policies.append(ocp.checkpoint_managers.EveryNSteps(self._config.keep_every))
            keep = ocp.checkpoint_managers.AnyPreservationPolicy(policies)
            options = ocp.CheckpointManagerOptions(preservation_policy=keep, cleanup_tmp_directories=True)
            handlers = None
            if self._mirror and jax.process_count() > 1:  # in folders of their own; without OCDBT, files of other names
                own = options.multiprocessing_options = ocp.options.MultiprocessingOptions(primary_host=None)
                writer = ocp.type_handlers.ArrayHandler(primary_host=None, replica_id=0)
                ocp.type_handlers.register_type_handler(jax.Array, writer, override=True)
                handlers = {"state": ocp.StandardCheckpointHandler(multiprocessing_options=own, use_ocdbt=False)}
            self._manager = ocp.CheckpointManager(self._root, options=options, item_handlers=handlers)
            self._manager.reached_preemption = lambda step: False  # it would upset the numbers of `processes.Interrupt`
        return self._manager

    def _commit(self, step):
        """Runs in the background: waits for orbax's rename (older steps go after it), then hashes, or uploads."""
        self._orbax().wait_until_finished()
        folder = self._root / str(step)
        if self._writes:
            files.write_text(folder / provenance.NAME, self._identity)
        if self._mirror:
            self._mirror.push_step(step, self._config.keep, self._config.keep_every)
        elif self._writes:
            manifest.write_manifest(folder, self._leaving.is_set)

    def _fail(self, step, error):
        """Drops the manager, which would raise the same error again, and says what is left."""
        manager, self._manager = self._manager, None
        for finish in (manager.wait_until_finished, manager.close):
            with contextlib.suppress(Exception):
                finish()
        cause = files.cause_of_failed_write(error)
        if not cause:
            raise error
        newest = max(_steps(self._root), default=None)
        last = "there is no good checkpoint" if newest is None else f"the last good checkpoint is step {newest}"
        raise errors.UserError(f"checkpoint {step}: {cause} {self._root}; {last}", passing=True) from error

    def _restore(self, step, abstract_state):
        """(state, "") or (None, what is damaged); every process gives the same answer."""
        folder = self._root / str(step)
        state, problem = None, manifest.inspect(folder, "state") if jax.process_index() == 0 else ""
        if processes.agreed(not problem):
            state, problem = _attempt(folder, lambda: self._read(folder, abstract_state))
            if processes.agreed(not problem):
                return state, ""
        return None, problem or "another host cannot read it"

    def _read(self, folder, abstract_state):
        with ocp.PyTreeCheckpointer() as reader:
            saved = parameters.named_leaves(_metadata(reader, folder))
        expected = parameters.named_leaves(abstract_state)
        if lines := parameters.differences(saved, expected, lambda leaf: f"{leaf.dtype}{list(leaf.shape)}"):
            text = parameters.shortened(lines, 8)
            raise errors.UserError(f"{folder} does not fit this config ({text}); use another workdir")
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        return self._orbax().restore(int(folder.name), args=arguments)["state"]

    def _set_aside(self, step, older, problem):
        folder = self._root / str(step)
        if jax.process_index() == 0:
            then = "no older one is left" if older is None else f"going on from step {older}"
            print(f"checkpoint {folder} is damaged ({problem}); {then}", file=sys.stderr)
            names = (f"{folder}.damaged{number or ''}" for number in itertools.count())
            with files.explain(f"cannot set aside the damaged {folder}"):
                os.rename(folder, next(name for name in names if not os.path.lexists(name)))
        processes.agreed(True)  # wait for the rename
        self._orbax().reload()


def load_params(path, *, ema):
    """Reads the parameters of another run, without its optimizer, on any number of devices.

    path: a work directory or its `checkpoints` folder, whose newest undamaged step is read, or one step's folder.
    ema: take the moving average if there is one, else `params`. Returns (nested dict of numpy arrays, {"path", "step",
    "ema", "identity"}). Changes nothing on disk. Raises UserError if there is no undamaged checkpoint.
    """
    path = pathlib.Path(files.expand(os.fspath(path))).absolute()
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    one_step = path.name.isdecimal() and (path / "state").is_dir()
    folders = [path] if one_step else [root / str(step) for step in _steps(root)]
    if not folders:
        raise errors.UserError(f"no checkpoint in {path}: give a workdir or a <workdir>/checkpoints/<step>")
    for folder in folders:
        problem = manifest.inspect(folder, "state")
        if not problem:
            result, problem = _attempt(folder, lambda: _read_params(folder, ema))
        if not problem:
            return result[0], result[1] | {"identity": provenance.find(folder.parent, [folder])[0] or {}}
        if jax.process_index() == 0:
            print(f"checkpoint {folder} is damaged ({problem}); not used", file=sys.stderr)
    raise errors.UserError(f"all checkpoints in {path} are damaged")


def save_params(path, params, identity):
    """Writes a params-only checkpoint (step 0) under the work directory `path`, for `load_params`.

    Raises UserError if checkpoints are there already, or the folder cannot be written to; nothing is left behind then.
    """
    root = pathlib.Path(lock.folder(path)) / "checkpoints"
    with lock.hold(path):
        require_no_checkpoints(path)
        new = not root.exists()
        try:
            with contextlib.closing(Checkpointer(path, Config(), identity)) as checkpointer:
                checkpointer.save(0, {"params": params})
        except BaseException:
            if new:
                shutil.rmtree(root, ignore_errors=True)
            raise


def require_no_checkpoints(path):
    """Raises UserError if the work directory `path` holds checkpoints."""
    if _steps(pathlib.Path(lock.folder(path)) / "checkpoints"):
        raise errors.UserError(f"{path} already holds checkpoints; use another workdir")


def _steps(root):
    """Steps with a folder, newest first; orbax names a folder by its step only once committed."""
    entries = root.iterdir() if root.is_dir() else ()
    return sorted((int(entry.name) for entry in entries if STEP.fullmatch(entry.name)), reverse=True)


def _metadata(reader, folder):
    """The tree of a step's arrays, without their values. Raises ValueError if they cannot be of this size."""
    metadata = reader.metadata(folder / "state").item_metadata
    if not isinstance(tree := getattr(metadata, "tree", None), dict):
        raise ValueError("its metadata cannot be read")
    claimed = sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
    manifest.require_plausible(folder, claimed)
    return tree


def _read_params(folder, ema):
    with ocp.PyTreeCheckpointer() as reader:
        tree = _metadata(reader, folder)
        is_ema = bool(ema and jax.tree.leaves(tree.get("ema_params")))
        key = "ema_params" if is_ema else "params"
        if not jax.tree.leaves(tree.get(key)):
            raise ValueError("it holds no params")
        item = {key: tree[key]}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        arguments = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True)
        params = reader.restore(folder / "state", args=arguments)[key]
    return params, {"path": str(folder), "step": int(folder.name), "ema": is_ema}


def _attempt(folder, read):
    """(read(), "") or (None, what went wrong) if that may be damage."""
    try:
        return read(), ""
    except Exception as error:
        lost = jax.distributed.is_initialized() and processes.LOST.search(str(error))
        if lost or isinstance(error, (errors.UserError, MemoryError)):
            raise
        if not manifest.exists(folder):
            return None, files.reason(error)
        # With intact files it is memory, sharding or a library, and every other step would fail too.
        raise errors.UserError(f"{folder} cannot be used: {files.reason(error)}") from error

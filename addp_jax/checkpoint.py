"""Checkpoints: save, restore the newest undamaged one, and read another run's parameters.

Layout of a work directory::

    <workdir>/checkpoints/identity.json        which run this is (fields that decide the numbers)
    <workdir>/checkpoints/<step>/state/...     what orbax writes; appears by one rename
    <workdir>/checkpoints/<step>/blake2.json   size and hash of every file of that step
    <workdir>/checkpoints/<step>.damaged/      set aside by a restore, never deleted

Orbax keeps no checksums: a flipped byte restores silently. Hence the hashes. A step without
`blake2.json` was killed between its commit and its hashing; it is accepted if it restores.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import tempfile

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from flax import traverse_util

from addp_jax import errors, parameters, processes

MANIFEST = "blake2.json"
IDENTITY = "identity.json"

# Orbax logs each save at length, and what it logs as an error it raises as well.
absl_logging.get_absl_logger().addFilter(
    lambda record: record.levelno >= logging.CRITICAL or "/orbax/" not in record.pathname
)


@dataclasses.dataclass(frozen=True)
class Config:
    """config.checkpoint."""

    every: int = 1000  # optimizer steps between checkpoints
    keep: int = 2  # newest checkpoints kept
    keep_every: int = 0  # additionally keep each multiple of this for ever; 0 = none

    def __post_init__(self):
        for name, least in (("every", 1), ("keep", 1), ("keep_every", 0)):
            if getattr(self, name) < least:
                raise errors.UserError(f"config.checkpoint.{name} must be at least {least}")


class Checkpointer:
    """Saves a run's states in the background and restores the newest undamaged one.

    Every process of a multi-host run makes one and calls the same methods in the same order.
    """

    def __init__(self, workdir, config, identity):
        """identity: JSON-able dict, the fields that decide the numbers and hashes of frozen weights.

        Raises UserError if `workdir` cannot be written to, or holds checkpoints of another identity.
        """
        if "://" in str(workdir):
            raise errors.UserError(f"--workdir {workdir} is a URL: mount the bucket and give a folder")
        self._root = pathlib.Path(workdir).absolute() / "checkpoints"
        self._config = config
        _require_writable(self._root)
        _require_identity(self._root, identity)
        self._manager = None
        self._pending = None  # the save under way: a future
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._orbax()

    def restore_latest(self, abstract_state):
        """(state, step) of the newest undamaged checkpoint, or None if there is none yet.

        abstract_state: pytree of jax.ShapeDtypeStruct with shardings; the mesh need not be the one
        saved from. A damaged checkpoint is reported on stderr and set aside as `<step>.damaged`.
        Raises UserError if leaves differ in name, shape or dtype, or if all checkpoints are damaged.
        """
        self.wait()
        steps = _steps(self._root)
        for step, older in zip(steps, [*steps[1:], None]):
            state, problem = self._restore(step, abstract_state)
            if not problem:
                return state, step
            self._set_aside(step, older, problem)
        if any(self._root.glob("*.damaged*")):
            advice = "use another --workdir, or delete the *.damaged folders to start from the beginning"
            raise errors.UserError(f"all checkpoints in {self._root} are damaged; {advice}")
        return None

    def save(self, step, state):
        """Saves `state` in the background; a step that is already saved is left as it is.

        Returns once the arrays are copied off the devices. Raises UserError if this save, or the
        one before it, found no space or could not write.
        """
        self.wait()
        if step in self._orbax().all_steps():
            return
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state))
        try:
            self._orbax().save(step, args=arguments, force=True)  # when to save is the loop's decision
        except Exception as error:
            self._fail(step, error)
        self._pending = self._pool.submit(self._commit, step), step

    def wait(self):
        """Blocks until the save under way is committed and hashed; raises UserError as `save` does."""
        if self._pending is None:
            return
        (future, step), self._pending = self._pending, None
        try:
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
            policies = [ocp.checkpoint_managers.LatestN(self._config.keep)]
            if self._config.keep_every:
                policies.append(ocp.checkpoint_managers.EveryNSteps(self._config.keep_every))
            keep = ocp.checkpoint_managers.AnyPreservationPolicy(policies)
            options = ocp.CheckpointManagerOptions(preservation_policy=keep, cleanup_tmp_directories=True)
            self._manager = ocp.CheckpointManager(self._root, options=options)
        return self._manager

    def _commit(self, step):
        """Runs in the background: waits for orbax's rename (older steps go after it), then hashes."""
        self._orbax().wait_until_finished()
        if jax.process_index() == 0:
            _write_manifest(self._root / str(step))

    def _fail(self, step, error):
        """Drops the manager, which would raise the same error again, and says what is left."""
        manager, self._manager = self._manager, None
        for finish in (manager.wait_until_finished, manager.close):
            with contextlib.suppress(Exception):
                finish()
        text = str(error)
        full = re.search("No space left on device|Disk quota exceeded", text)  # from OSError and tensorstore
        if not full and not isinstance(error, OSError) and "os_error_code" not in text:
            raise error
        cause = "no space left on" if full else f"cannot write ({_first_line(error)}) to"
        good = _steps(self._root)
        last = f"the last good checkpoint is step {good[0]}" if good else "there is no good checkpoint"
        raise errors.UserError(f"checkpoint {step}: {cause} {self._root}; {last}") from error

    def _restore(self, step, abstract_state):
        """(state, "") or (None, what is damaged); every process gives the same answer."""
        folder = self._root / str(step)
        state, problem = None, _inspect(folder) if jax.process_index() == 0 else ""
        if processes.agreed(not problem):
            state, problem = _attempt(folder, lambda: self._read(folder, abstract_state))
            if processes.agreed(not problem):
                return state, ""
        return None, problem or "another host cannot read it"

    def _read(self, folder, abstract_state):
        with ocp.PyTreeCheckpointer() as reader:
            saved = parameters.named_leaves(reader.metadata(folder / "state").item_metadata.tree)
        wanted = parameters.named_leaves(abstract_state)
        differences = parameters.differences(saved, wanted, lambda leaf: f"{leaf.dtype}{list(leaf.shape)}")
        if differences:
            text = parameters.shortened(differences, 8)
            raise errors.UserError(f"{folder} does not fit this config ({text}); use another --workdir")
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        return self._orbax().restore(int(folder.name), args=arguments)["state"]

    def _set_aside(self, step, older, problem):
        folder = self._root / str(step)
        if jax.process_index() == 0:
            then = "no older one is left" if older is None else f"going on from step {older}"
            print(f"checkpoint {folder} is damaged ({problem}); {then}", file=sys.stderr)
            before = len(list(self._root.glob(f"{step}.damaged*")))
            os.rename(folder, f"{folder}.damaged{before or ''}")
        processes.agreed(True)  # wait for the rename
        self._orbax().reload()


def load_params(path, *, ema):
    """Reads the parameters of another run, without its optimizer, on any number of devices.

    path: a work directory, its `checkpoints` folder, or the folder of one step; of the first two,
    the newest undamaged step is read. ema: take the moving average if there is one, else `params`.
    Returns (nested dict of numpy arrays, {"path", "step", "ema", "identity"}); "ema" says which
    it was. Changes nothing on disk. Raises UserError if there is no undamaged checkpoint.
    """
    path = pathlib.Path(path).absolute()
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    one_step = path.name.isdecimal() and (path / "state").is_dir()
    folders = [path] if one_step else [root / str(step) for step in _steps(root)]
    if not folders:
        raise errors.UserError(f"no checkpoint in {path}: give a --workdir or a <workdir>/checkpoints/<step>")
    for folder in folders:
        problem = _inspect(folder)
        if not problem:
            result, problem = _attempt(folder, lambda: _read_params(folder, ema))
        if not problem:
            return result
        if jax.process_index() == 0:
            print(f"checkpoint {folder} is damaged ({problem}); not used", file=sys.stderr)
    raise errors.UserError(f"all checkpoints in {path} are damaged")


def save_params(path, params, identity):
    """Writes a params-only checkpoint (step 0) under the work directory `path`, for `load_params`.

    Raises UserError if checkpoints are there already, or the folder cannot be written to; then nothing is left behind.
    """
    require_no_checkpoints(path)
    root = pathlib.Path(path).absolute() / "checkpoints"
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
    if _steps(pathlib.Path(path) / "checkpoints"):
        raise errors.UserError(f"{path} already holds checkpoints; use another --workdir")


def _steps(root):
    """Steps with a folder, newest first; orbax names a folder by its step only once committed."""
    if not root.is_dir():
        return []
    return sorted((int(entry.name) for entry in root.iterdir() if entry.name.isdecimal()), reverse=True)


def _write_manifest(folder):
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    entries = {file.relative_to(folder).as_posix(): [file.stat().st_size, _hash_file(file)] for file in files}
    _write_atomically(folder / MANIFEST, json.dumps(entries, indent=0))


def _inspect(folder):
    """What is wrong with a step's files, in a few words; "" if they agree with the manifest or have none."""
    if not (folder / "state").is_dir():
        return "folder state is missing"
    if not (folder / MANIFEST).exists():
        return ""
    try:
        entries = json.loads((folder / MANIFEST).read_text())
        for name, (size, digest) in entries.items():
            file = folder / name
            if not file.is_file():
                return f"file {name}: missing"
            if file.stat().st_size != size:
                return f"file {name}: {file.stat().st_size} bytes instead of {size}"
            if _hash_file(file) != digest:
                return f"file {name}: hash differs"
    except OSError as error:
        return f"cannot be read: {_first_line(error)}"
    except (ValueError, TypeError, AttributeError):
        return f"file {MANIFEST}: not readable as JSON"
    return ""


def _hash_file(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _write_atomically(path, text):
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _read_params(folder, ema):
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(folder / "state").item_metadata.tree
        is_ema = bool(ema and jax.tree.leaves(tree.get("ema_params")))
        key = "ema_params" if is_ema else "params"
        item = {key: tree[key]}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        arguments = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True)
        params = reader.restore(folder / "state", args=arguments)[key]
    identity = _read_identity(folder.parent) or {}
    return params, {"path": str(folder), "step": int(folder.name), "ema": is_ema, "identity": identity}


def _attempt(folder, read):
    """(read(), "") or (None, what went wrong) if that may be damage."""
    try:
        return read(), ""
    except Exception as error:
        # With intact files it is memory, sharding or a library, and every other step would fail too.
        if isinstance(error, errors.UserError) or (folder / MANIFEST).exists():
            raise
        return None, _first_line(error)


def _require_writable(root):
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise errors.UserError(f"cannot write to --workdir {root.parent}: {error.strerror}") from error


def _require_identity(root, identity):
    """Writes `identity`, or raises UserError if the checkpoints here are those of another."""
    identity = json.loads(json.dumps(identity))
    if jax.process_index() == 0 and (_read_identity(root) is None or not _steps(root)):
        _write_atomically(root / IDENTITY, json.dumps(identity, indent=1))  # there is nothing to mix up
    processes.agreed(True)  # wait for the file
    saved = _read_identity(root)
    if saved is None:
        raise errors.UserError(f"--workdir {root.parent}: not the same folder for all processes; give one that they share")
    old, new = (traverse_util.flatten_dict(tree, sep=".") for tree in (saved, identity))
    fields = [
        f"{name} was {old.get(name, 'absent')!r}, is {new.get(name, 'absent')!r}"
        for name in sorted(old.keys() | new.keys())
        if (name in old, old.get(name)) != (name in new, new.get(name))
    ]
    if fields:
        text = parameters.shortened(fields, 5)
        raise errors.UserError(f"{root} holds checkpoints of another run ({text}); use another --workdir")


def differences(saved, identity):
    old, new = (traverse_util.flatten_dict(tree, sep=".") for tree in (saved, identity))
    return [
        f"{name} was {old.get(name, 'absent')!r}, is {new.get(name, 'absent')!r}"
        for name in sorted(old.keys() | new.keys())
        if (name in old, old.get(name)) != (name in new, new.get(name))
    ]


def _read_identity(root):
    try:
        return json.loads((root / IDENTITY).read_text()) if (root / IDENTITY).exists() else None
    except (OSError, ValueError) as error:
        raise errors.UserError(f"cannot read {root / IDENTITY}: {_first_line(error)}") from error


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]

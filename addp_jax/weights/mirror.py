"""A work directory in a bucket: a local folder that the run works in, and that is copied there.

    at the start       the newest undamaged checkpoint, the log and the config come from the bucket
    every minute       what was written meanwhile goes there, the log whole: a bucket's files cannot be appended to
    at a checkpoint    its files and the log go there, then its manifest, see `buckets`; older ones are removed
    at the end         whatever is left goes there, and the folder is removed

Each process of several has a folder of its own, and uploads what it wrote of a checkpoint; all else the first one does.
A SIGKILL leaves the folder behind; the next run of the same user on that host removes it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator

import jax

from addp_jax import errors, files, processes
from addp_jax.weights import bucket_lock, buckets, lock, manifest

PUSH_SECONDS = 30.0  # between uploads; with the time that one takes, a kill loses a minute at most
PULLED = (buckets.CONFIG, "log.jsonl", f"{buckets.CHECKPOINTS}/identity.json")
ROOM = "addp_jax-runs"  # in the folder for temporary files


@contextlib.contextmanager
def opened(workdir: str, trains: bool, resumed: tuple[str, ...] = ()) -> Iterator[str | Mirror]:
    """A local `workdir` as it is; for a URL, the local folder that stands for it while the block runs.

    trains: checkpoints are written, so that other runs are kept out. resumed: folders of the work directory that the
    block goes on with. Every process must enter. Raises UserError if the bucket cannot be used, or another run is at
    work there.
    """
    if not buckets.is_url(workdir):
        yield workdir
        return
    first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        bucket = buckets.Bucket(workdir)
        held = stack.enter_context(bucket_lock.hold(bucket)) if trains else None
        mirror = Mirror(bucket, stack.enter_context(_room()), held)
        mirror.pull(resumed, set_aside=trains and first)
        print(f"{bucket.url} is worked on in {mirror}, and uploaded")
        if first:
            stack.enter_context(_repeated(PUSH_SECONDS, mirror.push))
        yield mirror


class Mirror(os.PathLike):
    """The local folder of a work directory in a bucket; as a path or text it is that folder."""

    def __init__(self, bucket: buckets.Bucket, room: pathlib.Path, held: bucket_lock.Held | None = None):
        name = bucket.url.split("://")[1]
        self._folder, self._held, self._pushed = room / name.strip("/"), held, {}
        self._pushing = threading.Lock()
        self._bucket, self._checkpoints = bucket, buckets.Bucket(f"{bucket.url}/{buckets.CHECKPOINTS}")
        (self._folder / buckets.CHECKPOINTS).mkdir(parents=True)

    def __fspath__(self) -> str:
        return str(self._folder)

    __str__ = __fspath__

    def pull(self, resumed: tuple[str, ...], set_aside: bool) -> None:
        """Fills the folder; see `opened`, and `buckets.pull_newest`."""
        self._bucket.download(filter(self._bucket.exists, PULLED), self._folder)
        for folder in resumed:
            self._bucket.download(self._bucket.sizes(folder), self._folder)
        self._pushed = self._written()
        buckets.pull_newest(self._checkpoints, self._folder / buckets.CHECKPOINTS, processes.agreed, set_aside)

    def push(self) -> None:
        """Uploads the files written since the last time, but for checkpoints."""
        with self._pushing:
            self._push()

    def _push(self) -> None:
        written = self._written()
        changed = [name for name, state in written.items() if self._pushed.get(name) != state]
        with (
            files.explain(f"cannot copy {self._folder} before its upload"),
            tempfile.TemporaryDirectory(prefix="addp_jax-") as room,  # the log grows while it is read
        ):
            for name in changed:
                copy = pathlib.Path(room) / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self._folder / name, copy)
            self._bucket.upload(room, changed)
        self._pushed = written

    def _written(self) -> dict[str, tuple]:
        """`{name: what changes when the file does}` of all files but checkpoints and unfinished ones."""
        states: dict[str, tuple] = {}
        for path in self._folder.rglob("*"):
            name = path.relative_to(self._folder).as_posix()
            if name.startswith(f"{buckets.CHECKPOINTS}/") and name not in PULLED:
                continue
            if name == lock.NAME or name.endswith(files.TEMPORARY):
                continue
            with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                if path.is_file():
                    states[name] = (path.stat().st_mtime_ns, path.stat().st_size)
        return states

    def push_step(self, step: int, keep: int, keep_every: int) -> None:
        """Uploads a checkpoint, its manifest last, and removes those that `keep` and `keep_every` do not keep.

        Every process must call it, maybe in a thread: each uploads what no process before it has. Raises UserError.
        """
        folder, number = self._folder / buckets.CHECKPOINTS / str(step), jax.process_index()
        names = list(manifest.sizes(folder))
        if number:
            before = json.loads(processes.told(f"bucket/{step}/0"))
            own = self._upload(folder, [name for name in names if name not in before])
            processes.tell(f"bucket/{step}/{number}", json.dumps(own))
            return
        if self._held:
            self._held.require()
        self._checkpoints.remove(buckets.of_step(self._checkpoints.sizes(str(step)), step))  # what a killed upload left
        if jax.process_count() > 1:
            processes.tell(f"bucket/{step}/0", json.dumps(names))
        entries = self._upload(folder, names)
        for other in range(1, jax.process_count()):
            entries |= json.loads(processes.told(f"bucket/{step}/{other}"))
        stored = self._checkpoints.sizes(str(step))
        if wrong := [name for name, (size, _) in entries.items() if stored.get(f"{step}/{name}") != size]:
            raise errors.UserError(f"{self._checkpoints.url}/{step}/{wrong[0]} did not arrive whole", passing=True)
        self.push()  # the log up to this step
        self._checkpoints.write(f"{step}/{manifest.NAME}", manifest.text(entries).encode())
        self._remove_old(step, keep, keep_every)

    def _upload(self, folder: pathlib.Path, names: list[str]) -> dict[str, list]:
        """Uploads files of a step, and meanwhile makes their entries of the manifest."""
        with concurrent.futures.ThreadPoolExecutor(1, "upload") as pool:
            upload = pool.submit(self._checkpoints.upload, folder.parent, [f"{folder.name}/{name}" for name in names])
            entries = manifest.entries(folder, names)
            upload.result()
        return entries

    def _remove_old(self, newest: int, keep: int, keep_every: int) -> None:
        """Removes older checkpoints, and what killed uploads left; the files of a damaged one stay."""
        names = self._checkpoints.sizes()
        steps = buckets.committed(names)
        kept = {*steps[:keep], *(step for step in steps if keep_every and step % keep_every == 0)}
        begun = {int(first) for first, *_ in (name.split("/") for name in names) if first.isdecimal()}
        for step in begun - kept:
            if step in steps or (step < newest and f"{step}/{buckets.DAMAGED}" not in names):
                self._checkpoints.remove(buckets.of_step(names, step))


@contextlib.contextmanager
def _room() -> Iterator[pathlib.Path]:
    """A new folder for temporary files, removed at the end; those of runs that were killed are removed before."""
    parent = pathlib.Path(tempfile.gettempdir()) / f"{ROOM}-{os.getuid()}"
    parent.mkdir(mode=0o700, exist_ok=True)
    for room in filter(pathlib.Path.is_dir, parent.iterdir()):
        with contextlib.suppress(OSError), open(room.with_suffix(".held"), "rb") as mark:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while its process lives
            shutil.rmtree(room, ignore_errors=True)
            os.unlink(mark.name)
    handle, name = tempfile.mkstemp(".held", dir=parent)
    with open(handle, "rb") as mark:
        fcntl.flock(mark, fcntl.LOCK_EX)
        room = pathlib.Path(name).with_suffix("")  # made after the lock: no other process takes it for a killed one's
        try:
            yield room
        finally:
            shutil.rmtree(room, ignore_errors=True)
            os.unlink(name)  # before the lock is gone


@contextlib.contextmanager
def _repeated(seconds: float, function: Callable[[], None]) -> Iterator[None]:
    """Calls `function` in a thread every so often and at the end; the last error is raised unless the block has one."""
    ended, failed = threading.Event(), True

    def attempt():
        try:
            function()
        except errors.UserError as error:
            print(f"warning: {error}", file=sys.stderr)

    def work():
        while not ended.wait(seconds):
            attempt()

    thread = threading.Thread(target=work, name="mirror", daemon=True)
    thread.start()
    try:
        yield
        failed = False
    finally:
        ended.set()
        thread.join()
        attempt() if failed else function()

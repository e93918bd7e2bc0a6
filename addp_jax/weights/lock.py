"""One run at a time in a work directory.

The rule: whoever writes to a work directory holds `<workdir>/lock`, and only a holder that is alive keeps others out.

The holder is alive while the kernel keeps its `flock` on the file, which ends with the process however that dies. Not
every network file system shares these locks between hosts, so that the file also says who holds it, and the holder
touches it every 10 s. Where the lock can be had although another is named in the file:

    same host:   alive if a process of that number, start time and boot is there
    other host:  alive if the file was touched in the last 60 s, by the file system's own clock
    no name:     a file that stays empty, torn or foreign for 2 s belongs to nobody

Two hosts that take over the file of a third, dead one within the same moment are not told apart on such a file system.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np

from addp_jax import errors, files, processes

NAME = "lock"
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0  # without a heartbeat from another host
NAMING_SECONDS = 2.0  # that a new holder has to write its name
LONGEST = 4096  # bytes of the file, and of the line that all processes give
BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
IRREGULAR = (errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENXIO)
KINDS = {"host": str, "boot": str, "pid": int, "start": str, "since": str}


@contextlib.contextmanager
def hold(workdir: str | os.PathLike, name: str = "workdir") -> Iterator[None]:
    """Keeps other runs out of `workdir`, which is made where it is missing, while the block runs.

    Of several processes the first one holds the lock for all; every process must enter. The file is removed at the end.
    name: the flag or config field that gives the folder. Raises UserError, the same in every process, if another run is
    at work in the folder or it cannot be written to.
    """
    held, problem = None, ""
    if jax.process_index() == 0:
        try:
            held = _Held(pathlib.Path(folder(workdir, name)), name)
        except errors.UserError as error:
            problem = str(error)
    if problem := line_from_first(problem):
        raise errors.UserError(problem)
    try:
        yield
    finally:
        if held:
            held.release()


def folder(workdir: str | os.PathLike, name: str = "workdir") -> str:
    """The absolute path of a work directory. Raises UserError for a URL, which is no folder."""
    if "://" in os.fspath(workdir):
        raise errors.UserError(f"{name} {workdir} is a URL: give a folder")
    return os.path.abspath(files.expand(os.fspath(workdir)))


class _Held:
    """The lock, held by this process. Raises UserError if another holds it or the file cannot be made."""

    def __init__(self, workdir: pathlib.Path, name: str):
        files.require_writable(workdir, name)
        self._path = workdir / NAME
        try:
            self._descriptor, holder = _acquire(self._path)
        except OSError as error:
            text = "not a regular file; delete it" if error.errno in IRREGULAR else files.reason(error)
            raise errors.UserError(f"{name}: cannot lock {self._path}: {text}") from error
        if holder is not None:
            advice = f"wait for it, stop it, or use another {name}"
            raise errors.UserError(f"{workdir}: a run is at work here{holder}; {advice}")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def _beat(self):
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._descriptor)

    def release(self):
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if _is_at(self._path, self._descriptor):
                self._path.unlink()  # before the kernel's lock ends
        _close(self._descriptor)


def _acquire(path: pathlib.Path) -> tuple[int, str | None]:
    """`(open descriptor, None)` with our name in the file, or `(-1, who has it)`. Raises OSError."""
    while True:
        descriptor, new = _open(path)
        try:
            busy = not _flock(descriptor)
            if not _is_at(path, descriptor):  # its holder removed it meanwhile
                _close(descriptor)
                continue
            record = None if new and not busy else _named(path, descriptor)
            if not busy and not (record and alive(record, _age(path, descriptor))):
                _write(descriptor)
                return descriptor, None
        except BaseException:
            _close(descriptor)
            raise
        _close(descriptor)
        return -1, description(record)


def _open(path: pathlib.Path) -> tuple[int, bool]:
    """`(descriptor, whether the file is new)`; only a regular file is opened."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor, new = os.open(path, flags | os.O_EXCL, 0o644), True
    except FileExistsError:
        descriptor, new = os.open(path, flags, 0o644), False
    _descriptors.add(descriptor)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        _close(descriptor)
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), os.fspath(path))
    return descriptor, new


def _close(descriptor: int) -> None:
    _descriptors.discard(descriptor)
    os.close(descriptor)


def _close_in_child() -> None:
    """A forked child, which may outlive its parent, must not keep the kernel's lock."""
    for descriptor in tuple(_descriptors):
        _close(descriptor)


_descriptors: set[int] = set()
os.register_at_fork(after_in_child=_close_in_child)


def _flock(descriptor: int) -> bool:
    """False if another process has the kernel's lock; True if we have it or the file system has no such locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in BUSY
    return True


def _is_at(path: pathlib.Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _age(path: pathlib.Path, descriptor: int) -> float:
    """Seconds between the file's last change and now, both by the file system's clock; in the future as in the past."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=files.TEMPORARY) as probe:
        os.utime(probe.fileno())
        return abs(os.fstat(probe.fileno()).st_mtime - os.fstat(descriptor).st_mtime)


def _named(path: pathlib.Path, descriptor: int) -> dict | None:
    """Who the file names; None if it names nobody, after waiting for one who may just be writing the name."""
    deadline = time.monotonic() + NAMING_SECONDS
    while (record := _read(descriptor)) is None:
        if time.monotonic() >= deadline or _age(path, descriptor) >= NAMING_SECONDS:
            break
        time.sleep(0.1)
    return record


def _read(descriptor: int) -> dict | None:
    return parsed(os.pread(descriptor, LONGEST, 0))


def parsed(data: bytes) -> dict | None:
    """The `own_record` of a process in these bytes; None if there is none."""
    try:
        record = json.loads(data)
        kinds = {name: type(record[name]) for name in KINDS}
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return record if kinds == KINDS and record["pid"] > 0 else None


def own_record() -> dict:
    """Who this process is."""
    pid, since = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S %Z").strip()
    return {"host": socket.gethostname(), "boot": _boot(), "pid": pid, "start": _start(pid) or "", "since": since}


def _write(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(own_record()).encode(), 0)
    os.fsync(descriptor)


def alive(record: dict, age: float) -> bool:
    """Whether its process still is. age: seconds since it last gave a sign, which count on other hosts."""
    if record["host"] != socket.gethostname():
        return age <= STALE_SECONDS
    return record["boot"] == _boot() and record["start"] == _start(record["pid"])


def _boot() -> str:
    """Changes with every start of this machine; "" where the system does not tell."""
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _start(pid: int) -> str | None:
    """When a process of this machine started, "" where the system does not tell; None if there is no such process."""
    if not os.path.exists("/proc/self/stat"):
        try:
            os.kill(pid, 0)
        except PermissionError:
            return ""
        except (OSError, OverflowError):
            return None
        return ""
    try:
        state, *fields = pathlib.Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else fields[18]  # Z, X: it has ended


def description(record: dict | None) -> str:
    """Who it is, to follow a sentence."""
    if record is None:
        return ""
    host, since = (files.printable(record[name], 64) for name in ("host", "since"))
    return f" (process {record['pid']} on {host} since {since})"


def line_from_first(line: str) -> str:
    """The first process's line, in every process."""
    array = np.zeros(LONGEST, np.uint8)
    data = line.encode("utf-8", "backslashreplace")[:LONGEST]
    array[: len(data)] = np.frombuffer(data, np.uint8)
    return bytes(np.asarray(processes.from_first(array))).rstrip(b"\0").decode("utf-8", "ignore")

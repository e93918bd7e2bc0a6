"""Runs and weights in a bucket: `gs://...`, and whatever else fsspec opens by a URL.

A bucket has no renames, no locks and no appending, and a file appears in it when it is closed. Hence the rule: the code
of a run knows local folders only. What is read comes as a copy (`fetched`, `pull_newest`). What a run writes lies in a
local folder first (`mirror`). A checkpoint is in the bucket if its manifest is: that file is the last to come and the
first to go, so that a kill between any two files leaves no half of a checkpoint that counts.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import pathlib
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable

import fsspec

from addp_jax import errors, files
from addp_jax.weights import manifest

CHECKPOINTS = "checkpoints"
CONFIG = "config.json"  # of a run, beside its checkpoints
DAMAGED = "damaged.json"  # what the manifest of a step is renamed to whose files do not agree with it
REFUSALS = FileNotFoundError, PermissionError, ImportError, ValueError
REFUSED = re.compile(r"^Forbidden|, 4(?!08|29)\d\d$")  # what gcsfs says; 408 and 429 may pass
EXTRAS = {"gs": "gs", "gcs": "gs"}  # by the scheme of a URL, the extra that installs what opens it


def is_url(path: str | os.PathLike) -> bool:
    return "://" in os.fspath(path)


class Bucket:
    """The objects below a URL, by their names relative to it.

    Every method raises UserError naming the URL for whatever the store refuses.
    """

    def __init__(self, url: str):
        """Raises UserError if nothing that is installed opens such a URL."""
        self.url, scheme = url.rstrip("/"), url.split("://")[0]
        advice = f"; pip install -e '.[{EXTRAS[scheme]}]'" if scheme in EXTRAS else ""
        self._failing = lambda doing: files.explain(f"cannot {doing} {self.url}", Exception, passing=_may_pass)
        with files.explain(f"cannot open {self.url}", ImportError, ValueError, advice=advice):
            self._system, self._root = fsspec.url_to_fs(self.url, auto_mkdir=True)

    def sizes(self, folder: str = "") -> dict[str, int]:
        """`{name: bytes}` of all objects below `folder`, as they are now."""
        with self._failing("list"):
            self._system.invalidate_cache()
            found = self._system.find(self._path(folder), detail=True)
            return {path[len(self._root) + 1 :]: entry["size"] for path, entry in found.items()}

    def exists(self, name: str = "") -> bool:
        with self._failing("read"):
            self._system.invalidate_cache()
            return self._system.isfile(self._path(name))

    def read(self, name: str) -> bytes | None:
        """The bytes of an object, None if there is none."""
        with self._failing("read"), contextlib.suppress(FileNotFoundError):
            self._system.invalidate_cache()
            return self._system.cat_file(self._path(name))
        return None

    def write(self, name: str, data: bytes) -> None:
        with self._failing("write to"):
            self._system.pipe_file(self._path(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """Writes an object unless there is one; False then. In one step where the store can, else after a look."""
        with self._failing("write to"), contextlib.suppress(FileExistsError):
            self._system.invalidate_cache()
            self._system.pipe_file(self._path(name), data, mode="create")
            return True
        return False

    def download(self, names: Iterable[str], folder: str | os.PathLike) -> None:
        """Copies objects to the same names below `folder`."""
        with self._failing("read"):
            pairs = [(self._path(name), files.below(folder, name)) for name in names]
            for parent in {os.path.dirname(path) for _, path in pairs}:
                os.makedirs(parent, exist_ok=True)
            if pairs:
                self._system.get(*map(list, zip(*pairs)))

    def upload(self, folder: str | os.PathLike, names: Iterable[str]) -> None:
        """Copies files below `folder` to the same names."""
        with self._failing("write to"):
            pairs = [(os.path.join(folder, name), self._path(name)) for name in names]
            if pairs:
                self._system.put(*map(list, zip(*pairs)))

    def remove(self, names: Iterable[str]) -> None:
        """Removes objects one after the other; one that is gone already is no error."""
        with self._failing("write to"):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    self._system.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root


def _may_pass(error: Exception) -> bool:
    """Whether a store may do it later: unless it says that something is missing, forbidden or not understood."""
    return not (isinstance(error, REFUSALS) or REFUSED.search(str(error)))


def committed(names: Iterable[str]) -> list[int]:
    """Steps of which `names`, relative to the folder of checkpoints, hold the manifest; newest first."""
    pairs = [name.split("/") for name in names]
    steps = {pair[0] for pair in pairs if len(pair) == 2 and pair[1] == manifest.NAME}
    return sorted((int(step) for step in steps if step.isdecimal()), reverse=True)


def of_step(names: Iterable[str], step: int) -> list[str]:
    """The names that belong to a step; the manifest is the first one."""
    own = [name for name in names if name.startswith(f"{step}/")]
    return sorted(own, key=lambda name: name != f"{step}/{manifest.NAME}")


def pull_newest(
    checkpoints: Bucket, folder: str | os.PathLike, agreed: Callable[[bool], bool] = bool, set_aside: bool = False
) -> int | None:
    """Copies the newest step that agrees with its manifest to `folder`/<step>; None if the bucket has no step yet.

    checkpoints: the bucket of a run's checkpoints.
    agreed: whether a copy is good in all processes, each of which makes its own.
    set_aside: the manifest of a damaged step becomes damaged.json, so that the step is not taken any more.
    A damaged step is told on stderr. Raises UserError if all steps are damaged, or the store fails for the moment.
    """
    names = checkpoints.sizes()
    for step in committed(names):
        local, problem = pathlib.Path(folder) / str(step), ""
        try:
            checkpoints.download(of_step(names, step), folder)
            problem = manifest.inspect(local)
        except errors.UserError as error:
            if error.passing:  # it is not the step's fault
                raise
            problem = str(error)
        if agreed(not problem):
            return step
        shutil.rmtree(local, ignore_errors=True)
        problem = problem or "another process cannot read it"
        print(f"checkpoint {checkpoints.url}/{step} is damaged ({problem}); not used", file=sys.stderr)
        if set_aside and (listing := checkpoints.read(f"{step}/{manifest.NAME}")) is not None:
            checkpoints.write(f"{step}/{DAMAGED}", listing)
            checkpoints.remove([f"{step}/{manifest.NAME}"])
    if committed(names) or any(name.endswith(f"/{DAMAGED}") for name in names):
        advice = "delete them to start from the beginning"
        raise errors.UserError(f"all checkpoints in {checkpoints.url} are damaged; {advice}")
    return None


def fetched(path: str, field: str = "") -> str:
    """A local path as it is; for a URL the path of a copy, made once in a process and removed at its end.

    A run, or the folder of its checkpoints, comes with its newest undamaged checkpoint and its config. field: what an
    error begins with, as "config.init: ". Raises UserError if there is nothing, or it cannot be read.
    """
    if not is_url(path):
        return path
    try:
        return _fetched(path.rstrip("/"))
    except errors.UserError as error:
        raise errors.UserError(f"{field}{error}", error.passing) from error


@functools.cache
def _fetched(url: str) -> str:
    room = tempfile.mkdtemp(prefix="addp_jax-")
    atexit.register(shutil.rmtree, room, ignore_errors=True)
    parent, name = url.rsplit("/", 1)
    local, bucket = pathlib.Path(room) / name, Bucket(url)
    if bucket.exists():  # a weight file
        Bucket(parent).download([name], room)
    elif name.isdecimal():  # one checkpoint
        names = bucket.sizes()
        bucket.download(names if manifest.NAME in names else (), local)
    elif name == CHECKPOINTS:
        pull_newest(bucket, local)
    else:
        bucket.download([CONFIG] * bucket.exists(CONFIG), local)
        pull_newest(Bucket(f"{url}/{CHECKPOINTS}"), local / CHECKPOINTS)
    if not local.exists():
        raise errors.UserError(f"nothing at {url}: no weight file, run or checkpoint")
    return str(local)

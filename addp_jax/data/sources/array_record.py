"""array_record shards that `addp_jax.data.pack` wrote."""

import fcntl
import glob
import os
import re
import shutil

import grain
import msgpack
import numpy as np

from addp_jax import errors, files
from addp_jax.data import sources, walk


def open_split(config, split: str, image_size: int) -> sources.Source:
    name = config.train_split if split == "train" else config.eval_split
    path = sources.require_path(config)
    return ArrayRecord(stage(path, name, files.expand(config.stage)) if config.stage else path, name)


class ArrayRecord(sources.Source):
    """Shards written by `python -m addp_jax.data.pack`, named `<split>-00000-of-00004.array_record`.

    path: the folder of the shards, or a glob that matches them.
    Raises UserError: no shard, a missing shard, or a file of another format.
    """

    labelled = True

    def __init__(self, path: str, split: str = "train"):
        self.path, self.split = path, split
        paths = shards(path, split)
        self._records = _open_shards(paths)
        list_file = os.path.join(os.path.dirname(paths[0]), f"{split}-classes.json")
        with files.explain(f"config.data.path: cannot read {list_file}", OSError, ValueError):
            names = files.read_json(list_file)
            strings = isinstance(names, list) and all(isinstance(name, str) for name in names)
            if not strings or len(set(names)) < len(names):
                raise ValueError("not a list of different names")
        self.classes = tuple(names)

    def fingerprint(self, times: bool = False) -> str:
        """Changes with the shards: their names and sizes, with `times` also their place and time of change."""
        return sources.file_fingerprint(shards(self.path, self.split), times=times)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> dict:
        try:
            record = msgpack.unpackb(self._records[int(i)], unicode_errors="surrogateescape")
            image, label, path = record["image"], record["label"], record["path"]
            if not isinstance(image, bytes) or not isinstance(path, str) or type(label) is not int:
                raise ValueError("an entry of another type")
            if not walk.UNKNOWN <= label <= sources.LARGEST_LABEL:
                raise ValueError(f"label {label}")
        except Exception as error:  # array_record raises bare C++ errors
            where = f"{self.path!r}, split {self.split}, record {i}"
            raise errors.Unreadable(f"{where}: damaged, or not by addp_jax.data.pack: {files.reason(error)}") from error
        return {"image": image, "label": np.int32(label), "index": np.int32(i), "path": files.printable(path)}

    def __repr__(self) -> str:
        return f"ArrayRecord({self.path!r}, {self.split!r}, {len(self)} images)"


def _open_shards(paths: list[str]):
    """The records of all shards. Raises UserError naming the one that cannot be opened."""
    try:
        return grain.sources.ArrayRecordDataSource(paths)
    except Exception as error:  # array_record raises bare C++ errors, which name no file
        for path in paths:
            try:
                len(grain.sources.ArrayRecordDataSource([path]))
            except Exception as damage:
                reason = files.reason(damage)
                raise errors.UserError(f"config.data.path: {path} is damaged or cut short ({reason})") from damage
        reason = files.reason(error)
        raise errors.UserError(f"config.data.path: cannot open {paths[0]} and the others: {reason}") from error


def shards(path: str, split: str) -> list[str]:
    """The shard files of a split, in order. Raises UserError: there is none, or fewer than their names promise."""
    pattern = re.compile(re.escape(split) + r"-\d+-of-(\d+)\.array_record")
    candidates = sorted(glob.glob(os.path.join(glob.escape(path), "*") if os.path.isdir(path) else path))
    paths = [file for file in candidates if pattern.fullmatch(os.path.basename(file))]
    if not paths:
        advice = "write them with python -m addp_jax.data.pack"
        raise errors.UserError(f"config.data.path: no {split}-*.array_record in {path!r}; {advice}")
    promised = int(pattern.fullmatch(os.path.basename(paths[0]))[1])
    if len(paths) != promised:
        raise errors.UserError(f"config.data.path: {len(paths)} of {promised} {split} shards found in {path!r}")
    for file in paths:
        if not os.path.isfile(file):
            raise errors.UserError(f"config.data.path: {file} is not a regular file")
    return paths


def stage(path: str, split: str, folder: str) -> str:
    """Copies a split's shards and its list of classes to `folder`, those that are there already excepted; returns it.

    Several processes of a host may do so at once. Raises UserError: no shards, or `folder` cannot be written to.
    """
    paths = shards(path, split)
    files.require_writable(folder, "config.data.stage")
    for source in [*paths, os.path.join(os.path.dirname(paths[0]), f"{split}-classes.json")]:
        target = os.path.join(folder, os.path.basename(source))
        problem = f"config.data.stage: cannot copy {source} to {folder}"
        with files.explain(problem), open(f"{target}.lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.path.exists(target) and os.path.getsize(target) == os.path.getsize(source):
                continue
            with open(source, "rb") as file:
                files.replace(target, lambda copy, file=file: shutil.copyfileobj(file, copy, 2**24))
    return folder

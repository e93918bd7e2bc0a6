"""Random-access sources of examples. Adding a source adds one file here and edits none.

A source file has `open_split(config, split, image_size) -> Source`, where config is `pipeline.Config`, whose `source`
is the file's name, and split "train" or "eval". Sources are cheap to pickle: every worker process gets a copy.
"""

import hashlib
import importlib
import itertools
import os
import pkgutil
import time
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np

from addp_jax import errors, files

LARGEST_LABEL = 2**31 - 1
WAITS = (0.5, 2.0, 8.0)  # seconds before a read is tried again


@runtime_checkable
class Source(Protocol):
    """Examples by their number.

    Attributes:
      classes: names by label; empty when unknown.
      labelled: False where no label says anything: images without folders of classes.
      has_objects: the examples have `classes`, and `masks` or `outlines`, of objects; see shapes.py and coco.py here.
      has_label_maps: `segmentation.Labels` reads every pixel's class off the examples; see label_maps.py, shapes.py.
    """

    classes: tuple[str, ...]
    labelled: bool
    has_objects: bool = False
    has_label_maps: bool = False

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> dict:
        """Of images a dict:

        image  the undecoded bytes of one file (decoding is the transform's work), or uint8 [H,W,3]
        label  int32; -1 when unknown
        index  int32, position in the source
        path   the file, for error messages

        and whatever else a task's example has. Raises Unreadable.
        """
        ...

    def fingerprint(self, times: bool = False) -> str:
        """Changes with the examples, wherever they lie; of files, without reading them. See `Files.fingerprint`."""
        ...

    def ground_truth(self) -> dict | None:
        """The objects of all images in COCO's format, where a file has them."""
        return None


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def open_split(config, split: str, image_size: int) -> Source:
    """The source `config.source` of the split "train" or "eval".

    image_size: side in pixels of generated images; files have their own. Raises UserError: unknown, or as the source.
    """
    if config.source not in names():
        raise errors.UserError(f"config.data.source = {config.source!r}; choose {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{config.source}").open_split(config, split, image_size)


def require_path(config) -> str:
    """Raises UserError if `config.path` is empty."""
    if not config.path:
        raise errors.UserError(f"config.data.path is empty; config.data.source={config.source} reads from it")
    return config.path


class Files(Source):
    """Image files with labels, int32 [N]. Their paths are one bytes object, which pickles faster than a list.

    Args:
      root: folder that `paths` are relative to.
      classes: names by label, or () when unknown.
      sizes: bytes of each file, or None = asked for when needed.
    """

    def __init__(self, root: str, paths, labels, classes: tuple[str, ...], sizes: list[int] | None = None):
        encoded = [os.fsencode(path) for path in paths]
        self.root, self.classes = root, classes
        self._names = b"".join(encoded)
        self._ends = np.cumsum([0] + [len(name) for name in encoded])
        self._sizes = None if sizes is None else np.array(sizes, np.int64)
        self.labels = np.array(labels, np.int32)
        self.labelled = classes != ("all",) and self.labels.min(initial=0) >= 0

    def path(self, i: int) -> str:
        """The file of example i."""
        return os.path.join(self.root, os.fsdecode(self._names[self._ends[i] : self._ends[i + 1]]))

    def file_names(self) -> list[str]:
        """The files of all examples, relative to `root`."""
        return [os.fsdecode(self._names[start:end]) for start, end in itertools.pairwise(self._ends)]

    def file_sizes(self) -> np.ndarray:
        """Bytes of all files, int64 [N]."""
        if self._sizes is None:
            self._sizes = np.array([patiently(os.stat, self.path(i)).st_size for i in range(len(self))], np.int64)
        return self._sizes

    def fingerprint(self, times: bool = False) -> str:
        """Changes when a file is added, removed, renamed, relabelled or resized; with `times`, when it is rewritten.

        Without `times` it survives moving and copying the folder.
        """
        if times:
            return file_fingerprint((self.path(i) for i in range(len(self))), self.labels.tobytes())
        parts = self._names, self._ends.astype(np.int64).tobytes(), self.file_sizes().tobytes(), self.labels.tobytes()
        return hashlib.blake2b(b"\0".join(parts), digest_size=8).hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict:
        path = self.path(i)
        image = patiently(files.read_bytes, path)
        return {"image": image, "label": self.labels[i], "index": np.int32(i), "path": path}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.root!r}, {len(self)} images)"


def patiently(read: Callable, path: str):
    """`read(path)`, tried again where a mount or a network has failed for the moment. Raises Unreadable."""
    for wait in (*WAITS, None):
        try:
            return read(path)
        except OSError as error:
            passing = files.may_pass(error)
            if not passing or wait is None:
                raise errors.Unreadable(f"cannot read {path}: {files.reason(error)}", passing) from error
        time.sleep(wait)


def file_fingerprint(paths, more: bytes = b"", times: bool = True) -> str:
    """16 hex digits from names and sizes, and with `times` from where the files lie and when they changed.

    The time of change, unlike that of modification, cannot be set back by what copies or unpacks files.
    """
    digest = hashlib.blake2b(more, digest_size=8)
    for path in paths:
        status = patiently(os.stat, path)
        digest.update(os.fsencode(path if times else os.path.basename(path)) + f"\0{status.st_size}\0".encode())
        if times:
            digest.update(f"{status.st_mtime_ns}\0{status.st_ctime_ns}\0".encode())
    return digest.hexdigest()

"""Features of images: computed once, kept in a file, read like any other source."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable

import msgpack
import numpy as np
from array_record.python import array_record_module

from addp_jax import errors, files, partition, processes
from addp_jax.data import pipeline, sources


@dataclasses.dataclass(frozen=True)
class Features(sources.Source):
    """A random-access source of {"features": float32 [D], "label": int32}."""

    features: np.ndarray  # float32 [N,D]
    labels: np.ndarray  # int32 [N]
    classes: tuple[str, ...]  # names by label; empty when unknown
    labelled = True
    content: str = ""  # what they were computed from, wherever it lies

    def fingerprint(self, times: bool = False) -> str:
        """Changes with the images, the encoder and the choice of a few."""
        return hashlib.blake2b(self.content.encode() + self.labels.tobytes(), digest_size=8).hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict:
        return {"features": self.features[i], "label": self.labels[i]}

    def few(self, shots: int, seed: int) -> "Features":
        """`shots` examples of every class, drawn with `seed`. Raises UserError if a class has fewer."""
        rng, rows = np.random.default_rng(seed), []
        for label in np.unique(self.labels):
            of_class = np.flatnonzero(self.labels == label)
            if len(of_class) < shots:
                has = f"class {label} has {len(of_class)} training examples"
                raise errors.UserError(f"config.model.shots = {shots}, but {has}")
            rows.append(rng.permutation(of_class)[:shots])
        rows = np.sort(np.concatenate(rows))
        return Features(self.features[rows], self.labels[rows], self.classes, f"{self.content} {shots} {seed}")


def identity(*parts: str) -> str:
    """16 hex digits of what the features depend on: `parts`, and the code of this package."""
    return hashlib.blake2b("\0".join((*parts, code())).encode(), digest_size=8).hexdigest()


@functools.cache
def code() -> str:
    """Changes with the networks, the transforms and the generated pictures."""
    files = sorted(pathlib.Path(__file__).parents[1].glob("*/*.py"))
    return hashlib.blake2b(b"\0".join(file.read_bytes() for file in files), digest_size=8).hexdigest()


def cached(folder: str, key: str, source, compute: Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]) -> Features:
    """The features in `folder`/`key`.npz; computed and written first where there is no such file.

    Args:
      folder: made if missing.
      key: names everything the features depend on, the data too: `identity`.
      source: its class names are kept with the features.
      compute: gives (features [b,D], labels [b]) batch by batch, in order.
    Raises UserError: the file is damaged, or the folder cannot be written to.
    """
    path = os.path.join(folder, f"{key}.npz")
    if not processes.agreed(os.path.exists(path)):  # else all compute, and all write the same
        write(path, compute(), source.classes)
    try:
        with files.open_regular(path) as raw, np.load(raw) as file:
            names = tuple(str(name) for name in file["classes"])
            return Features(file["features"], file["labels"], names, source.fingerprint())
    except Exception as error:  # what is no npz makes numpy and zipfile raise nearly anything
        raise errors.UserError(f"config.model.cache: cannot read {path}; delete it") from error


def write(path: str, batches: Iterable[tuple[np.ndarray, np.ndarray]], classes: tuple[str, ...], **more) -> None:
    """Writes an .npz of features float32 [N,D], labels int32 [N], classes and `more`; it appears when complete."""
    features, labels = zip(*batches)
    arrays = dict(features=np.concatenate(features).astype(np.float32), labels=np.concatenate(labels).astype(np.int32))
    save(path, lambda part: np.savez(part, **arrays, classes=np.array(classes, str), **more))


def write_records(path: str, batches: Iterable[tuple[np.ndarray, np.ndarray]], paths: list[str]) -> None:
    """Writes an array_record of msgpack {"features": D little-endian float32, "label": int, "path": str}."""
    rows = ((feature, label) for batch in batches for feature, label in zip(*batch))

    def fill(part):
        writer = array_record_module.ArrayRecordWriter(part, "group_size:1")
        for (feature, label), name in zip(rows, paths, strict=True):
            record = {"features": feature.astype("<f4").tobytes(), "label": int(label), "path": name}
            writer.write(msgpack.packb(record))
        writer.close()

    save(path, fill)


def save(path: str, fill: Callable[[str], None]) -> None:
    """Makes a file by `fill`, under another name of the same ending until it is complete."""
    with files.explain(f"cannot write {path}"):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)  # durable enough: it can be made again
        with tempfile.TemporaryDirectory(prefix=".part-", dir=os.path.dirname(path) or ".") as room:
            fill(os.path.join(room, os.path.basename(path)))
            os.replace(os.path.join(room, os.path.basename(path)), path)


def batches_of(source, transform, function, config: pipeline.Config, batch_size: int, mesh):
    """(function(image uint8 [B,H,W,3]), label [B], valid [B]) as numpy, batch by batch, on every process.

    The batches are in the order of `source`; padding is cut off. `valid` is False where an image could not be read
    (config.on_unreadable="skip").
    """
    rows = partition.rows(mesh, batch_size)
    batches = pipeline.eval_batches(source, transform, batch_size=batch_size, config=config, rows=rows)
    left = len(source)
    for batch in processes.stoppable(pipeline.to_device(batches, partition.batch_sharding(mesh))):
        results, label, valid = partition.whole((function(batch["image"]), batch["label"], batch["valid"]))
        yield results[:left], label[:left], valid[:left]
        left -= len(valid)

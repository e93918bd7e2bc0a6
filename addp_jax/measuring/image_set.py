"""A set of images that is measured: a folder, or the `arr_0` of an .npz, read in batches."""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import math
import os
import zipfile
from collections.abc import Iterator

import numpy as np

from addp_jax import errors, files
from addp_jax.data import part, transforms
from addp_jax.data.sources import image_folder

PREPARE = "python -m addp_jax.data.prepare makes them so"
LARGEST_RATIO = 1032  # by which deflate can shrink a file at the most
ARRAY = "arr_0.npy"  # the images in an .npz of ADM's evaluation suite


class ImageSet:
    """Images of one size, in the order of their paths or of the array.

    A folder is read with everything below it. Grey images get three equal channels, an alpha channel is dropped,
    16-bit grey is scaled to 8 bits. An .npz holds uint8 [N,H,W,3]; it is never in memory as a whole.

    Attributes:
      path: as given. size: (height, width) in pixels. flag: what the user set it with, for messages.
      of: how many images there are, of which a part is measured.
    Raises UserError naming the file: missing, unreadable, no images, not all of one size, or fewer than `limit`.
    """

    def __init__(self, path: str, limit: int, flag: str):
        self.path, self.flag = path, flag
        self._files = None if path.endswith(".npz") else image_folder.open_folder(path, flag)
        shape = read_header(path, flag)[0] if self._files is None else (len(self._files), *self._decode(0).shape)
        self.of, self.size = shape[0], shape[1:3]
        if limit > self.of:
            raise errors.UserError(f"{flag}={path}: holds {self.of} images, fewer than the {limit} asked for")
        self._chosen = part.spread(self.of, limit) if limit else np.arange(self.of)

    def __len__(self) -> int:
        return len(self._chosen)

    @functools.cached_property
    def content_hash(self) -> str:
        """16 hex digits of the files' bytes, in order, whatever their names; of a part of an .npz of its places too."""
        digest = hashlib.blake2b(digest_size=8)
        if self._files is None and len(self) < self.of:
            digest.update(self._chosen.astype("<i8").tobytes())
        paths = [self.path] if self._files is None else [self._files.path(i) for i in self._chosen]
        for path in paths:
            with files.open_regular(path) as file:
                digest.update(hashlib.file_digest(file, hashlib.blake2b).digest())
        return digest.hexdigest()

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """uint8 [<=batch_size,H,W,3]."""
        if self._files is None:
            yield from self._from_array(batch_size)
            return
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
            for first in range(0, len(self), batch_size):
                yield np.stack(list(threads.map(self._checked, self._chosen[first : first + batch_size])))

    def _decode(self, i: int) -> np.ndarray:
        example = self._files[i]
        return transforms.decode(example["image"], example["path"])

    def _checked(self, i: int) -> np.ndarray:
        image = self._decode(i)
        if image.shape[:2] != self.size:
            own, first = (f"{width}x{height}" for height, width in (image.shape[:2], self.size))
            raise errors.UserError(
                f"{self._files.path(i)} has {own} pixels, the first image of {self.flag} {first}; "
                f"all must have one size: {PREPARE}"
            )
        return image

    def _from_array(self, batch_size: int):
        shape, skip = read_header(self.path, self.flag)
        image_bytes = int(np.prod(shape[1:]))
        with files.open_regular(self.path) as raw, zipfile.ZipFile(raw) as archive, archive.open(ARRAY) as file:
            for first in range(0, len(self), batch_size):
                chosen = self._chosen[first : first + batch_size]
                start = self._chosen[first - 1] + 1 if first else 0
                size = (chosen[-1] + 1 - start) * image_bytes
                # A damaged archive makes zipfile and zlib raise nearly anything.
                with files.explain(f"{self.flag}={self.path}", Exception, advice="; make it again"):
                    file.read(0 if first else skip)
                    data = file.read(size)
                    if chosen[-1] + 1 == self.of:
                        file.read()  # zipfile compares the checksum once all is read
                if len(data) < size:
                    advice = f"{ARRAY} ends before image {chosen[-1]}; make it again"
                    raise errors.UserError(f"{self.flag}={self.path}: {advice}")
                yield np.frombuffer(data, np.uint8).reshape(-1, *shape[1:])[chosen - start]


def read_header(path: str, flag: str) -> tuple[tuple[int, ...], int]:
    """Shape [N,H,W,3] of the images in an .npz, and the bytes before them. Raises UserError if there are none."""
    advice = "; give a folder of images or an .npz with arr_0"
    with files.explain(f"{flag}={path}", Exception, advice=advice):  # what is no npz raises nearly anything
        with files.open_regular(path) as raw, zipfile.ZipFile(raw) as archive:
            shape, fortran, dtype, skip = array_header(archive, ARRAY)
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[-1] != 3 or min(shape) < 1:
        raise errors.UserError(f"{flag}={path}: arr_0 is {dtype} {list(shape)}; expected uint8 images [N,H,W,3]")
    return shape, skip


def read_arrays(path: str, names: tuple[str, ...], flag: str) -> dict[str, np.ndarray]:
    """Those of the numeric arrays `names` that an .npz holds, whole. Raises UserError naming a damaged file."""
    with files.explain(f"{flag}={path}", Exception):  # as above
        with files.open_regular(path) as raw, zipfile.ZipFile(raw) as archive:
            held = [name for name in names if f"{name}.npy" in archive.namelist()]
            for name in held:
                array_header(archive, f"{name}.npy")
            raw.seek(0)
            with np.load(raw) as loaded:
                return {name: loaded[name] for name in held}


def array_header(archive: zipfile.ZipFile, name: str):
    """(shape, whether in Fortran's order, dtype, bytes before the data) of the .npy file `name`.

    Raises ValueError if it holds fewer bytes than it claims: nothing larger than the file is ever made of it.
    """
    if name not in archive.namelist():
        raise ValueError(f"it holds no {name}")
    entry = archive.getinfo(name)
    if entry.file_size > LARGEST_RATIO * max(entry.compress_size, 1):
        raise ValueError(f"{name} claims more bytes than the file holds")
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        skip = file.tell()
    claimed = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or claimed != entry.file_size - skip or min(shape, default=1) < 0:
        raise ValueError(f"{name} claims {dtype} {list(shape)}, but the file does not hold as many bytes")
    return shape, fortran, dtype, skip

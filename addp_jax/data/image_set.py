"""A set of images that is measured: a folder, or the `arr_0` of an .npz, read in batches."""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import os
import zipfile
from collections.abc import Iterator

import numpy as np

from addp_jax import errors
from addp_jax.data import sources, transforms

PREPARE = "python -m addp_jax.data.prepare makes them so"
ARRAY = "arr_0.npy"  # the images in an .npz of ADM's evaluation suite


class ImageSet:
    """Images of one size, in the order of their paths or of the array.

    A folder is read with everything below it. Grey images get three equal channels, an alpha channel is dropped,
    16-bit grey is scaled to 8 bits. An .npz holds uint8 [N,H,W,3]; it is never in memory as a whole.

    Attributes:
      path: as given. size: (height, width) in pixels. flag: what the user set it with, for messages.
    Raises UserError naming the file: missing, unreadable, no images, not all of one size, or fewer than `limit`.
    """

    def __init__(self, path: str, limit: int, flag: str):
        self.path, self.flag = path, flag
        self._files = None if path.endswith(".npz") else sources.open_folder(path, flag)
        if self._files is None:
            (available, *self.size, _), _ = read_header(path, flag)
        else:
            available, self.size = len(self._files), self._decode(0).shape[:2]
        self.size = tuple(self.size)
        if limit > available:
            raise errors.UserError(f"{flag}={path}: holds {available} images, fewer than the {limit} asked for")
        # A part is spread evenly: files are often sorted by class.
        self._chosen = np.arange(limit or available) * available // (limit or available)

    def __len__(self) -> int:
        return len(self._chosen)

    @functools.cached_property
    def content_hash(self) -> str:
        """16 hex digits from the bytes of the files, in order, whatever their names."""
        digest = hashlib.blake2b(digest_size=8)
        paths = [self.path] if self._files is None else [self._files.path(i) for i in self._chosen]
        for path in paths:
            with open(path, "rb") as file:
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
            height, width = self.size
            raise errors.UserError(
                f"{self._files.path(i)} has {image.shape[1]}x{image.shape[0]} pixels, the first image of {self.flag} "
                f"{width}x{height}; all must have one size: {PREPARE}"
            )
        return image

    def _from_array(self, batch_size: int):
        shape, skip = read_header(self.path, self.flag)
        image_bytes = int(np.prod(shape[1:]))
        with zipfile.ZipFile(self.path) as archive, archive.open(ARRAY) as file:
            file.read(skip)
            for first in range(0, len(self), batch_size):
                chosen = self._chosen[first : first + batch_size]
                start = self._chosen[first - 1] + 1 if first else 0
                read = file.read((chosen[-1] + 1 - start) * image_bytes)
                if len(read) < (chosen[-1] + 1 - start) * image_bytes:
                    raise errors.UserError(f"{self.flag}={self.path}: {ARRAY} ends before image {chosen[-1]}; make it again")
                yield np.frombuffer(read, np.uint8).reshape(-1, *shape[1:])[chosen - start]


def read_header(path: str, flag: str) -> tuple[tuple[int, ...], int]:
    """Shape [N,H,W,3] of the images in an .npz, and the bytes before them. Raises UserError if there are none."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(ARRAY) as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
            skip = file.tell()
    # What is no npz makes numpy and zipfile raise nearly anything.
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).split("\n")[0].strip("'\"")
        raise errors.UserError(f"{flag}={path}: {reason}; give a folder of images or an .npz with arr_0") from error
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
        raise errors.UserError(f"{flag}={path}: arr_0 is {dtype} {list(shape)}; expected uint8 images [N,H,W,3]")
    return shape, skip

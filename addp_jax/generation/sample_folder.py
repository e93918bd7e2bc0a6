"""The folder of generated images: what is written stays, what is missing is known, and all come from one setting.

    <folder>/settings.json      what the images depend on; other settings are refused
    <folder>/images/<name>.png  each appears by one rename, encoded on a thread beside the computation
    <folder>/samples.npz        `arr_0` uint8 [N,H,W,3], as ADM's evaluation reads it

Only a regular file, a PNG by its content, in colour and whole counts as an image; anything else is drawn anew.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
import zipfile
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from addp_jax import errors, files

READ_AT_ONCE = 64  # images read back, decoded, at a time


class SampleFolder:
    """Use it in a `with` block: at its end all images are on disk. Every write raises UserError on a full disk."""

    def __init__(self, path: str, settings: dict):
        """Raises UserError if the folder holds images of other settings, or cannot be written to."""
        self.path = pathlib.Path(path)
        self._images = self.path / "images"
        self._threads = concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "png")
        self._pending = []
        with self._explain():
            self._images.mkdir(parents=True, exist_ok=True)
            for leftover in self._images.glob(f"*{files.TEMPORARY}"):
                leftover.unlink()
            self._require(json.loads(json.dumps(settings)))

    def _require(self, settings: dict) -> None:
        file = self.path / "settings.json"
        advice = "give another config.generate.output, or delete that folder"
        if not file.exists():
            if any(self._images.iterdir()):
                raise errors.UserError(f"{self.path} holds images, but no settings.json that says of what: {advice}")
            files.replace(file, lambda out: out.write(json.dumps(settings, indent=1).encode()))
            return
        try:
            before = files.read_json(file)
        except ValueError as error:
            raise errors.UserError(f"{file} cannot be read: {advice}") from error
        before = before if isinstance(before, dict) else {}
        changed = [name for name in before | settings if before.get(name) != settings.get(name)]
        if changed:
            changes = "; ".join(f"{name} {before.get(name)}, now {settings.get(name)}" for name in changed)
            raise errors.UserError(f"{self.path} holds images made with other settings ({changes}): {advice}")

    def file(self, name: str) -> pathlib.Path:
        return self._images / f"{name}.png"

    def missing(self, names: Sequence[str]) -> np.ndarray:
        """bool [N]: no such image, or a damaged one."""
        return ~np.array(list(self._threads.map(is_intact, map(self.file, names))), bool)

    def write(self, name: str, make) -> None:
        """Have a thread write what `make()` returns, uint8 [H,W,3]."""
        save = lambda: files.replace(self.file(name), lambda out: Image.fromarray(make()).save(out, "png"))
        self._pending.append(self._threads.submit(save))

    def wait(self, allowed: int = 0) -> None:
        """Until at most `allowed` images are still to be written."""
        while len(self._pending) > allowed:
            with self._explain():
                self._pending.pop(0).result()

    def read(self, names: Sequence[str]) -> Iterator[np.ndarray]:
        """uint8 [H,W,3] each, in order."""
        for first in range(0, len(names), READ_AT_ONCE):
            paths = [self.file(name) for name in names[first : first + READ_AT_ONCE]]
            yield from self._threads.map(pixels, paths)

    def write_npz(self, names: Sequence[str], shape) -> pathlib.Path:
        """`samples.npz` from the written images, each of `shape` (H,W,3), never in memory together."""
        path, header = self.path / "samples.npz", dict(descr="|u1", fortran_order=False, shape=(len(names), *shape))

        def stream(out):
            with zipfile.ZipFile(out, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as array:
                np.lib.format.write_array_header_1_0(array, header)
                for image in self.read(names):
                    array.write(image.tobytes())

        with self._explain():
            files.replace(path, stream)
        return path

    def _explain(self):
        return files.explain(f"config.generate.output: cannot write to {self.path}")

    def __enter__(self) -> SampleFolder:
        return self

    def __exit__(self, kind, *_):
        self._threads.shutdown(cancel_futures=kind is not None)
        if kind is None:
            self.wait()


def pixels(path: pathlib.Path) -> np.ndarray:
    """uint8 [H,W,3] of a PNG. Raises OSError."""
    with files.open_regular(path) as file, Image.open(file, formats=("PNG",)) as picture:
        return np.asarray(picture)


def is_intact(path: pathlib.Path) -> bool:
    """Whether a PNG in colour is there and whole, by its checksums."""
    try:
        with files.open_regular(path) as file, Image.open(file, formats=("PNG",)) as picture:
            picture.verify()
            return picture.mode == "RGB"
    except Exception:  # a damaged file makes PIL raise nearly anything
        return False

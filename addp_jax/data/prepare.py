"""Makes the reference images of FID as the release does: `python -m addp_jax.data.prepare --input FOLDER --output FOLDER`.

The short side is resized to 256 pixels (bilinear, where training and generation are bicubic), the central square is
cut, and `00000.png` and so on are written. A folder with `meta/val.txt` is read in the order of that list, any other
with everything below it in the order of the paths.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import sys

from PIL import Image

from addp_jax import errors
from addp_jax.data import sources, transforms


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m addp_jax.data.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("--input", required=True, help="image folder, or folder with meta/val.txt")
    parser.add_argument("--output", required=True, help="folder for the PNGs")
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels (default 256)")
    arguments = parser.parse_args(argv)
    try:
        count = prepare(arguments.input, arguments.output, arguments.size)
    except errors.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.output}: {count} images of {arguments.size}x{arguments.size} pixels")
    return 0


def prepare(folder: str, output: str, size: int = 256) -> int:
    """Writes the images of `folder`, [size,size,3], to `output`; returns how many.

    Raises UserError: no images, one that cannot be decoded, by name, or an `output` that is not empty.
    """
    if size < 1:
        raise errors.UserError(f"--size={size}: use at least 1 pixel")
    listed = os.path.exists(os.path.join(folder, "meta", "val.txt"))
    source = sources.MetaList(folder, "val") if listed else sources.open_folder(folder, "--input")
    try:
        os.makedirs(output, exist_ok=True)
        if os.listdir(output):
            raise errors.UserError(f"--output: {output!r} is not empty; choose another folder")
    except OSError as error:
        raise errors.UserError(f"--output: cannot write to {output!r}: {error.strerror}") from error

    def write(i: int):
        example = source[i]
        image = transforms.decode(example["image"], example["path"], upright=False)
        image = transforms.centre_square(image, size, size, Image.Resampling.BILINEAR)
        Image.fromarray(image).save(os.path.join(output, f"{i:05d}.png"))

    # Threads suffice: decoding and encoding release the interpreter lock.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        jobs = [threads.submit(write, i) for i in range(len(source))]
        try:
            for job in jobs:
                job.result()
        finally:
            threads.shutdown(cancel_futures=True)
    return len(source)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

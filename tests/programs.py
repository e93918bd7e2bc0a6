"""Runs of the shipped configs at `:tiny` size, inside the test's process."""

import importlib
import pathlib
import sys

import numpy as np
from PIL import Image

from addp_jax import modes, program

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # configs import configs.base


ARGUMENTS = {"predictor": ("b", "l"), "in1k": ("b", "l"), "probe": ("b", "l"), "coco": ("b", "l"), "ade20k": ("b", "l"), "own": ("tokenizer", "predictor", "addp", "classification")}


def names() -> list[str]:
    """Every config that can be run, as on the command line: the files of configs/ with a get_config, with their arguments."""
    files = [file for file in sorted((ROOT / "configs").glob("*.py")) if "def get_config(" in file.read_text()]
    return [":".join(filter(None, (file.stem, arg))) for file in files for arg in ARGUMENTS.get(file.stem, ("",))]


def fields(name: str, arg: str = "tiny", **changes):
    """The ConfigDict of configs/<name>.py:<arg>; `changes` like model__tokenizer_weights="..."."""
    file, _, own = name.partition(":")
    config = importlib.import_module(f"configs.{file}").get_config(",".join(filter(None, (own, arg))))
    config.lock()
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


def config(name: str, arg: str = "tiny", **changes) -> program.Config:
    return modes.split(fields(name, arg, **changes).to_dict())[0]


def weights_for(name, trained) -> dict:
    """The fields of a config that name folders, pointed at the trained runs."""
    model = fields(name).model
    paths = {"tokenizer_weights": "tokenizer", "predictor_weights": "predictor", "encoder_weights": "addp", "cache": "features"}
    return {f"model__{field}": str(trained / run) for field, run in paths.items() if field in model}


def photos(folder, sizes: dict[str, tuple[int, int]]):
    """Files of random pixels: sizes by name, (height, width)."""
    for name, (height, width) in sizes.items():
        (folder / name).parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder

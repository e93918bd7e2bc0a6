"""Runs of the shipped configs at `:tiny` size, inside the test's process."""

import importlib
import pathlib
import sys

from addp_jax import modes, program

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # configs import configs.base


def names() -> list[str]:
    """Every config that can be run: the files of configs/ with a get_config."""
    files = sorted((ROOT / "configs").glob("*.py"))
    return [file.stem for file in files if "def get_config(" in file.read_text()]


def fields(name: str, arg: str = "tiny", **changes):
    """The ConfigDict of configs/<name>.py:<arg>; `changes` like model__tokenizer_weights="..."."""
    config = importlib.import_module(f"configs.{name}").get_config(arg)
    config.lock()
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


def config(name: str, arg: str = "tiny", **changes) -> program.Config:
    return modes.split(fields(name, arg, **changes).to_dict())[0]

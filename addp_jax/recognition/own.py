"""A folder of own images: the fields of the modes that read one, and what these modes share."""

from __future__ import annotations

import os
import pathlib

import numpy as np

from addp_jax import errors, files, parameters, schema, tasks
from addp_jax.data import class_names
from addp_jax.data.sources import image_folder

FORMATS = ("npz", "array_record")
MOST_NAMED = 20  # unreadable files in a message


@schema.config
class Config:
    """Fields of `config.predict`."""

    images: str = ""  # folder of own images
    output: str = ""  # folder; "" = <workdir>/predictions or <workdir>/features
    batch_size: int = schema.field(64, least=1)
    format: str = schema.field("npz", choices=FORMATS)  # of features


def paths_of(source, positions) -> list[str]:
    return [os.path.relpath(source.path(i), source.root) for i in positions]


def output_of(config: Config, default: str) -> str:
    """The folder to write to. Raises UserError if it cannot be written to or lies among the images."""
    output = config.output or default
    if config.images:
        images, folder = (pathlib.Path(path).resolve() for path in (config.images, output))
        if images in (folder, *folder.parents):
            place = f"{output} lies among the images of {config.images}"
            raise errors.UserError(f"config.predict.output: {place}; give another folder")
    files.require_writable(output, "config.predict.output")
    return output


def refuse_unreadable(source, readable) -> None:
    """Raises UserError naming the images that could not be read, once everything else is written."""
    if len(readable) < len(source):
        skipped = np.setdiff1d(np.arange(len(source)), readable)
        names = parameters.shortened([source.path(i) for i in skipped], MOST_NAMED)
        raise errors.UserError(f"config.predict.images: {len(skipped)} of {len(source)} files cannot be read: {names}")


def given_names(program) -> tuple[str, ...]:
    """Those in the file config.data.class_names, one per class of the network, else (). Raises UserError."""
    path = program.config.data.class_names
    names, count = class_names.read(path) if path else (), program.task.num_classes
    if path and len(names) != count:
        problem = f"{path} has {len(names)} names, but the network has {count} classes"
        raise errors.UserError(f"config.data.class_names: {problem}")
    return names


def recorded_names(program, identity: dict, workdir: str) -> tuple[str, ...]:
    """One per class of the network: those that the run has on record, else numbers."""
    if not identity.get("data", {}).get("classes"):
        print(f"classes are numbered: {workdir} has no names on record; name them with config.data.class_names")
    return tasks.class_names(program.task, identity)


def open_images(config: Config):
    """The source of the images. Raises UserError."""
    if not config.images:
        raise errors.UserError("config.predict.images is empty: give a folder of images")
    return image_folder.open_folder(config.images, "config.predict.images")

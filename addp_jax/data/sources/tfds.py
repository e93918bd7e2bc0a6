"""TensorFlow Datasets that were prepared beforehand; read without TensorFlow."""

import glob
import os

import numpy as np

from addp_jax import errors
from addp_jax.data import sources


def open_split(config, split: str, image_size: int) -> sources.Source:
    return Tfds(config.name, config.train_split if split == "train" else config.eval_split, config.path)


class Tfds(sources.Source):
    """A TensorFlow data set prepared as array_record.

    Args:
      name: e.g. "imagenet2012".
      split: a TFDS split, e.g. "train" or "validation[:1000]".
      data_dir: where it was prepared; "" = the TFDS default.
    Raises UserError: unknown, not prepared, prepared as TFRECORD, without such a split, or without images and labels.
    """

    labelled = True

    def __init__(self, name: str, split: str = "train", data_dir: str = ""):
        self.name, self.split = name, split
        self._data = _tfds_data(name, split, data_dir)
        features = self._data.dataset_info.features
        if "image" not in features or "label" not in features:
            raise errors.UserError(f"config.data.name: {name!r} has no image and label; it has {sorted(features)}")
        self.classes = tuple(features["label"].names or ())

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, i: int) -> dict:
        example = self._data[int(i)]
        where = f"{self.name} {self.split} example {i}"
        return {"image": example["image"], "label": np.int32(example["label"]), "index": np.int32(i), "path": where}

    def fingerprint(self, times: bool = False) -> str:
        """Changes with the prepared files and the split, with `times` also with their place and time of change."""
        prepared = sorted(glob.glob(os.path.join(glob.escape(self._data.dataset_info.data_dir), "*")))
        return sources.file_fingerprint(prepared, self.split.encode(), times)

    def __repr__(self) -> str:
        return f"Tfds({self.name!r}, {self.split!r}, {len(self)} images)"


def _tfds_data(name: str, split: str, data_dir: str):
    place = repr(data_dir) if data_dir else "the TFDS default folder"
    build = f"run tfds build {name} --file_format=array_record"
    try:
        import tensorflow_datasets as tfds

        builder = tfds.builder(name, data_dir=data_dir or None)
    except ImportError as error:
        raise errors.UserError("config.data.source=tfds: run pip install tensorflow-datasets") from error
    except Exception as error:  # every failure has its own type; the message lists all data sets
        raise errors.UserError(f"config.data.name: TFDS knows no {name!r}, nor is it in {place}") from error
    if not builder.info.splits:
        raise errors.UserError(f"config.data.name: {name!r} is not in {place}; set config.data.path or {build}")
    try:
        return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    except NotImplementedError as error:
        raise errors.UserError(f"config.data.name: {name!r} in {place} is stored as TFRECORD; {build}") from error
    except Exception as error:  # a wrong split raises KeyError or ValueError, depending on its form
        have = f"has no {split!r}, it has {', '.join(builder.info.splits)}"
        raise errors.UserError(f"config.data.train_split/eval_split: {name!r} {have}") from error

"""Weight files of other codes that hold one network for dense recognition and nothing else.

    detectron2     ViTDet's Mask R-CNN: detector
    mmsegmentation MAE with UperNet: segmenter
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from addp_jax import errors, files, schema
from addp_jax.models import detector, segmenter
from addp_jax.weights import detectron2, mmsegmentation, weight_files


class Format(NamedTuple):
    network: str  # under which a run stores it
    config: type  # of the network
    of: str  # whose weights these are, for messages
    read_config: Callable  # {name: shape} -> config
    from_tensors: Callable  # (tensors, config) -> parameters
    to_tensors: Callable  # (parameters, config) -> tensors
    signature: str  # a tensor that only this format has
    wrapper: str  # key of the dict around the tensors in a .pth file

    def config_of(self, shapes: dict):
        """The config that tensors of these shapes belong to. Raises UserError unless they are of this format."""
        try:
            return self.read_config(shapes)
        except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
            reason = f"no tensor {error.args[0]}" if isinstance(error, KeyError) else files.reason(error)
            raise errors.UserError(f"these are not the weights of {self.of}: {reason}") from error

    def parse(self, path: str, tensors: dict, values: bool = True):
        """`(config, parameters)` of a file's tensors; None for parameters without `values`, which are not read then.

        Raises UserError naming the file.
        """
        try:
            config = self.config_of({name: tensor.shape for name, tensor in tensors.items()})
            return config, self.from_tensors(tensors, config) if values else None
        except errors.UserError as error:
            raise errors.UserError(f"{path}: {error}") from error


FORMATS = {
    "detectron2": Format(
        "detector", detector.Config, "a ViTDet Mask R-CNN of detectron2", detectron2.read_config,
        detectron2.from_detectron2, detectron2.to_detectron2, f"{detectron2.RPN}.objectness_logits.weight", "model",
    ),
    "mmsegmentation": Format(
        "segmenter", segmenter.Config, "mmsegmentation's MAE with UperNet", mmsegmentation.read_config,
        mmsegmentation.from_mmsegmentation, mmsegmentation.to_mmsegmentation, f"{mmsegmentation.HEAD}.conv_seg.weight",
        "state_dict",
    ),
}  # fmt: skip


def open_file(path: str) -> tuple[Format | None, dict]:
    """(format, tensors by name) of a weight file; None for the format if it is none of these. Reads no values."""
    if os.path.splitext(path)[1].lower() == ".pkl":
        return FORMATS["detectron2"], detectron2.read_pickle(path)
    tensors = weight_files.read(path)
    return next((each for each in FORMATS.values() if each.signature in tensors), None), tensors


def read(path: str) -> dict[str, dict] | None:
    """{network: parameters} of a weight file; None if it is none of these. Raises UserError naming the file."""
    found, tensors = open_file(path)
    return found and {found.network: found.parse(path, tensors)[1]}


def configs(path: str) -> dict | None:
    """{network: the Config of its sizes}, as `layouts.configs`; None if it is none of these. Reads no values."""
    found, tensors = open_file(path)
    return found and {found.network: found.parse(path, tensors, values=False)[0]}


def arrange(name: str, params: dict, fields: dict) -> dict[str, np.ndarray]:
    """All tensors of a file of the format `name`. fields: `config.model` of the run, whose `net` is the network's."""
    kind = FORMATS[name]
    if "token_embed" in params[kind.network]["encoder"]:
        raise errors.UserError(f"layout={name}: this {kind.network} reads tokens, {kind.of} pixels")
    return kind.to_tensors(params[kind.network], schema.build(kind.config, fields["net"], "config.model.net"))

"""Weight files of other codes that hold one network for dense recognition and nothing else.

    detectron2     ViTDet's Mask R-CNN: detector
    mmsegmentation MAE with UperNet: segmenter
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from addp_jax import schema
from addp_jax.models import detector, segmenter
from addp_jax.weights import detectron2, mmsegmentation, weight_files


class Format(NamedTuple):
    network: str  # under which a run stores it
    config: type  # of the network
    read: Callable  # path -> (config, parameters)
    arrange: Callable  # (parameters, config) -> tensors
    signature: str  # a tensor that only this format has
    wrapper: str  # key of the dict around the tensors in a .pth file


FORMATS = {
    "detectron2": Format(
        "detector", detector.Config, detectron2.read, detectron2.to_detectron2,
        f"{detectron2.RPN}.objectness_logits.weight", "model",
    ),
    "mmsegmentation": Format(
        "segmenter", segmenter.Config, mmsegmentation.read, mmsegmentation.to_mmsegmentation,
        f"{mmsegmentation.HEAD}.conv_seg.weight", "state_dict",
    ),
}  # fmt: skip


def recognise(path: str) -> Format | None:
    """The format of a weight file; None if it is none of these. Reads no values."""
    if os.path.splitext(path)[1].lower() == ".pkl":
        return FORMATS["detectron2"]
    names = weight_files.read(path)
    return next((each for each in FORMATS.values() if each.signature in names), None)


def read(path: str) -> dict[str, dict] | None:
    """{network: parameters} of a weight file; None if it is none of these. Raises UserError naming the file."""
    found = recognise(path)
    return found and {found.network: found.read(path)[1]}


def configs(path: str) -> dict | None:
    """{network: the Config of its sizes}, as `layouts.configs`; None if it is none of these."""
    found = recognise(path)
    return found and {found.network: found.read(path)[0]}


def arrange(name: str, params: dict, fields: dict) -> dict[str, np.ndarray]:
    """All tensors of a file of the format `name`. fields: `config.model` of the run, whose `net` is the network's."""
    kind = FORMATS[name]
    return kind.arrange(params[kind.network], schema.build(kind.config, fields["net"], "config.model.net"))

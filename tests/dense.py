"""The small Mask R-CNN of golden/dense: its config, its weights, and how its numbers are compared."""

import functools
import json
import pathlib

import numpy as np

from addp_jax.models import detector, vitdet

FOLDER = pathlib.Path(__file__).parent / "golden" / "dense"
SIZES = json.loads((FOLDER / "config.json").read_text())
CONFIG = detector.Config(
    vitdet.Config(
        width=SIZES["width"], depth=SIZES["depth"], heads=SIZES["heads"], mlp_ratio=SIZES["mlp_ratio"], image_size=SIZES["image_size"],
        pretrain_size=16 * SIZES["pretrain_grid"], window=SIZES["window"], global_blocks=len(SIZES["global_blocks"]), drop_path=0.0,
    ),
    channels=SIZES["channels"], box_width=SIZES["fc"], num_classes=SIZES["classes"],
)  # fmt: skip


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def checksum(array) -> np.ndarray:
    flat = np.asarray(array, np.float64).reshape(-1)
    return np.array([flat.sum(), np.abs(flat).sum(), np.sqrt((flat**2).sum()), (flat * np.cos(0.1 * np.arange(flat.size))).sum()])


def assert_checksum(array, expected, rtol=1e-5, name=""):
    """Within `rtol` of the sum of absolute values."""
    np.testing.assert_allclose(checksum(array), expected, rtol=0, atol=rtol * max(expected[1], 1e-30), err_msg=name)


def cotangent(shape) -> np.ndarray:
    size = int(np.prod(shape))
    return (np.cos(0.1 * np.arange(size)) / size).reshape(shape).astype(np.float32)


def torch_order(array):
    """[B,H,W,C] -> [B,C,H,W]."""
    return array.transpose(0, 3, 1, 2)


def our_order(array):
    return array.transpose(0, 2, 3, 1)

"""The small UperNet of golden/dense: its config and its weights."""

import functools

import dense

from addp_jax.weights import dense as formats
from addp_jax.weights import mmsegmentation


def named(arrays, kind: str) -> dict:
    """The arrays named `kind:...`, without it."""
    return {name.partition(":")[2]: array for name, array in arrays.items() if name.startswith(kind + ":")}


# The backbone's and the heads' numbers were made one by one, at one width.
WEIGHTS = {f"backbone.{name}": array for name, array in named(dense.arrays("mae_seg_backbone"), "param").items()}
WEIGHTS |= named(dense.arrays("upernet"), "param")
FORMAT = formats.FORMATS["mmsegmentation"]
CONFIG = FORMAT.config_of({name: array.shape for name, array in WEIGHTS.items()})


@functools.cache
def params():
    return mmsegmentation.from_mmsegmentation(WEIGHTS, CONFIG)

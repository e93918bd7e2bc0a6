"""NumPy arrays out of pickles, read as data: no code of the file runs, and no array is larger than its bytes."""

from __future__ import annotations

import math
import re
from typing import IO

import numpy as np

from addp_jax.weights import pickles

DEPTH = 8  # dicts within dicts
RECONSTRUCT = re.compile(r"numpy\.(core|_core)\.multiarray\._reconstruct")
FROM_BUFFER = re.compile(r"numpy\.(core|_core)\.numeric\._frombuffer")
DTYPE = re.compile(r"[fiu][1248]|b1")


def load(file: IO[bytes]):
    """What a pickle holds: plain values, and arrays of numbers where it has such; the rest stays a `pickles.Made`.

    file: in memory or memory-mapped. Raises ValueError for what is no pickle, or an array that is not whole.
    """
    return with_arrays(pickles.load(file)[0], DEPTH)


def with_arrays(value, depth: int):
    if isinstance(value, dict) and depth:
        return {key: with_arrays(entry, depth - 1) for key, entry in value.items()}
    if isinstance(value, pickles.Made) and value.args is not None:
        if RECONSTRUCT.fullmatch(value.name):  # (version, shape, dtype, column-major, bytes)
            _, shape, dtype, column_major, data = parts(value.state, 5)
            return array(data, dtype, shape, "F" if column_major else "C")
        if FROM_BUFFER.fullmatch(value.name):
            return array(*parts(value.args, 4))
    return value


def parts(value, count: int) -> tuple:
    if not isinstance(value, tuple) or len(value) != count:
        raise ValueError("its pickle has an array in an unknown form")
    return value


def array(data, dtype, shape, order) -> np.ndarray:
    data, dtype = bytes_of(data), dtype_of(dtype)
    sides = shape if isinstance(shape, tuple) else (None,)
    if len(sides) > 32 or not all(isinstance(side, int) and side >= 0 for side in sides):
        raise ValueError("its pickle has an array of an impossible shape")
    if math.prod(shape) * dtype.itemsize != len(data) or order not in ("C", "F"):
        raise ValueError("its pickle has an array that is not whole")
    return np.frombuffer(data, dtype).reshape(shape, order=order)


def bytes_of(data) -> bytes:
    """Of bytes as each protocol and version of Python writes them."""
    if isinstance(data, pickles.Made) and data.name == "_codecs.encode" and data.args and len(data.args) == 2:
        data = data.args[0]
    if isinstance(data, pickles.Made) and data.name in ("__builtin__.bytes", "builtins.bytes") and data.args == ():
        return b""
    if isinstance(data, str):
        return data.encode("latin-1")  # a UnicodeEncodeError is a ValueError
    if not isinstance(data, (bytes, bytearray)):
        raise ValueError("its pickle has an array without bytes")
    return bytes(data)


def dtype_of(made) -> np.dtype:
    if not isinstance(made, pickles.Made) or made.name != "numpy.dtype" or not isinstance(made.args, tuple):
        raise ValueError("its pickle has an array of an unknown type")
    name, state = made.args[:1], made.state
    big = isinstance(state, tuple) and len(state) > 1 and state[1] == ">"
    if not name or not isinstance(name[0], str) or not DTYPE.fullmatch(name[0]) or big:
        raise ValueError("its pickle has an array of a type that no weights have")
    return np.dtype(name[0])

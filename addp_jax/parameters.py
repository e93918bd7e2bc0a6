"""Trees of parameters: their names, what differs between two, their content hash."""

import hashlib
import math
import re

import jax
import numpy as np
from flax import traverse_util

from addp_jax import errors

RUNNING = ("running_mean", "running_var")  # parameters that every training step measures (models.batch_norm)
FOLDED = ("norm_scale", "norm_bias")  # parameters that are measured once (heads.LinearProbe)
STATISTICS = (*FOLDED, *RUNNING)  # nothing trains or decays them
COMBINED = "upsample"  # beginning of the name of modules that compute with their kernels before these are converted


def match(loaded, expected, *, where, allow_missing=(), allow_unexpected=()):
    """`loaded` restricted to the names in `expected`; names allowed to be missing stay missing.

    loaded, expected: nested dicts; leaves of `expected` need only a `.shape`. where: file or config
    field for the message. allow_missing, allow_unexpected: regular expressions for the beginning
    of a leaf's path ("head/"). Raises UserError listing names and shapes of whatever else differs.
    """
    found, wanted = named_leaves(loaded), named_leaves(expected)
    missing, unexpected = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    allowed = {name for name in missing if any(re.match(pattern, name) for pattern in allow_missing)}
    allowed |= {name for name in unexpected if any(re.match(pattern, name) for pattern in allow_unexpected)}
    lines = differences(found, wanted, lambda leaf: list(leaf.shape), allowed)
    if lines:
        raise errors.UserError(f"{where}: parameters do not fit: {shortened(lines, 8)}")
    kept = {name: leaf for name, leaf in found.items() if name in wanted}
    return traverse_util.unflatten_dict(kept, sep="/")


def compact(networks: dict, names, dtype) -> dict:
    """The networks `names` with those kernels in `dtype` that are converted to it as they are: no result changes.

    The kernels of `tokenizer.Upsample` stay, since sums of them are converted, and sums of rounded ones are others.
    """

    def one(path, leaf):
        as_it_is = path[-1].key == "kernel" and not any(part.key.startswith(COMBINED) for part in path[:-1])
        return leaf.astype(dtype) if as_it_is else leaf

    return {name: jax.tree_util.tree_map_with_path(one, net) if name in names else net for name, net in networks.items()}


def replaced(params, new):
    """`params` with the leaves of `new`, a part of the same tree, in their places."""
    return traverse_util.unflatten_dict({**traverse_util.flatten_dict(params), **traverse_util.flatten_dict(new)})


def running(params):
    """The part of `params` that is named in `RUNNING`; {} if there is none."""
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict({path: leaf for path, leaf in flat.items() if path[-1] in RUNNING})


def content_hash(params):
    """16 hex digits from the names, dtypes, shapes and bytes of a pytree, whatever its key order."""
    digest = hashlib.blake2b(digest_size=8)
    for name, leaf in sorted(named_leaves(params).items()):
        array = np.asarray(leaf)
        digest.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def size(tree) -> int:
    """Bytes of all arrays, or shapes with a dtype, of a pytree."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def named_leaves(tree):
    """{path with slashes: leaf} of any pytree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def differences(found, expected, describe, allowed=frozenset()):
    """One line per leaf that is missing, unexpected, or that `describe` tells apart."""
    lines = []
    for name in sorted((found.keys() | expected.keys()) - allowed):
        if name not in found:
            lines.append(f"{name} {describe(expected[name])} is missing")
        elif name not in expected:
            lines.append(f"{name} {describe(found[name])} is not expected")
        elif describe(found[name]) != describe(expected[name]):
            lines.append(f"{name} is {describe(found[name])}, expected {describe(expected[name])}")
    return lines


def shortened(items, limit):
    """The first `limit` items in one line, and how many more there are."""
    rest = f"; and {len(items) - limit} more" if len(items) > limit else ""
    return "; ".join(items[:limit]) + rest

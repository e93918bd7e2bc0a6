"""Weights of a frozen or initial network, from wherever the user has them."""

from __future__ import annotations

import os

import jax
import numpy as np

from addp_jax import checkpoint, errors, parameters
from addp_jax.interop import layouts

RANDOM = "random"  # instead of a path: freshly initialised weights, for benchmarks and memory checks only
SHAPES = "shapes"  # instead of a path: shapes without values, for plans
TRAIN_FIRST = {
    "tokenizer": "train one with --config=configs/tokenizer.py (or configs/demo_tokenizer.py)",
    "token_predictor": "train one with --config=configs/predictor_vitb.py (or configs/demo_predictor.py)",
    "pixel_to_token": "train one with --config=configs/vitb.py (or configs/demo_addp.py)",
}


def load(path: str, network: str, init, field: str) -> dict:
    """Parameters of `network` as nested numpy arrays.

    Args:
      path: a weight file (see `layouts`), a run's work directory, its checkpoints folder or one checkpoint; or "random".
      network: the name under which a run stores it: tokenizer, token_predictor, pixel_to_token.
      init: `rng -> params` of the module; gives the names and shapes that must be there.
      field: the config field that holds `path`, for messages.
    Raises UserError naming the field when the path is empty, missing or holds other weights.
    """
    if path == SHAPES:
        return jax.eval_shape(lambda: init(jax.random.key(0)))
    if path == RANDOM:
        return jax.tree.map(np.asarray, jax.jit(init)(jax.random.key(0)))
    hint = f"{TRAIN_FIRST[network]} and give its work directory, or give a weight file"
    if not path:
        raise errors.UserError(f"{field} is empty: this run needs a trained {network}; {hint}")
    if not os.path.exists(path):
        raise errors.UserError(f"{field}: nothing at {path}; {hint}")
    params = read(path, (network,), f"{field}: ")
    if network not in params:
        raise errors.UserError(f"{field}: {path} holds {', '.join(params) or 'other networks'}, not a {network}; {hint}")
    return parameters.match(params[network], jax.eval_shape(init, jax.random.key(0)), where=f"{field} ({path})")


def read(path: str, wanted=None, field: str = "") -> dict[str, dict]:
    """`{network: parameters}` of a weight file (of `wanted` only, if given) or a run folder (averaged where there is one)."""
    if not os.path.exists(path):
        raise errors.UserError(f"{field}nothing at {path}")
    try:
        return layouts.read(path, wanted) if os.path.isfile(path) else checkpoint.load_params(path, ema=True)[0]
    except errors.UserError as error:
        raise errors.UserError(f"{field}{error}") from error


def fit(found: dict, shapes: dict, where: str) -> dict:
    """Those of the networks `found` that a task trains, whose `shapes` they must have; UserError naming `where` if not.

    Only an adversary may be missing: no weight file has one, and nothing but training uses it.
    """
    wanted = {name: tree for name, tree in shapes.items() if name in found or name != "adversary"}
    return parameters.match({name: found[name] for name in wanted if name in found}, wanted, where=where)

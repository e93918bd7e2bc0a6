"""Weights of a frozen or initial network, from wherever the user has them."""

from __future__ import annotations

import os

import jax
import numpy as np

from addp_jax import errors, parameters, schema
from addp_jax.weights import buckets, checkpoint, dense, layouts, provenance

RANDOM = "random"  # instead of a path: freshly initialised weights, for benchmarks and memory checks only
SHAPES = "shapes"  # instead of a path: shapes without values, for plans
TRAINING_ONLY = ("discriminator", "alignment")  # networks that no weight file has, and nothing but training uses
TRAIN_FIRST = {
    "tokenizer": "train one with configs/tokenizer.py (or configs/demo_tokenizer.py)",
    "token_predictor": "train one with configs/predictor.py (or configs/demo_predictor.py)",
    "pixel_to_token": "train one with configs/vitb.py (or configs/demo_addp.py)",
}


def load(path: str, network: str, init, config, field: str, tokenizer: dict | None = None) -> dict:
    """Parameters of `network` as nested numpy arrays.

    Args:
      path: a weight file (see `layouts`), a work directory, its checkpoints folder or one checkpoint; or "random".
      network: the name under which a run stores it: tokenizer, token_predictor, pixel_to_token.
      init: `rng -> params` of the module; gives the names and shapes that must be there.
      config: of the network; a run that trained it must have had the same.
      field: the config field that holds `path`, for messages.
      tokenizer: parameters of the tokenizer that the network is used with; it must be the one it was trained with.
    Raises UserError naming the field when the path is empty, missing or holds other weights.
    """
    if path == SHAPES:
        return jax.eval_shape(lambda: init(jax.random.key(0)))
    if path == RANDOM:
        return jax.tree.map(np.asarray, jax.jit(init)(jax.random.key(0)))
    hint = f"{TRAIN_FIRST[network]} and give its work directory, or give a weight file"
    if not path:
        raise errors.UserError(f"{field} is empty: this run needs a trained {network}; {hint}")
    path = buckets.fetched(path, f"{field}: ")
    if not os.path.exists(path):
        raise errors.UserError(f"{field}: nothing at {path}; {hint}")
    params, identity = read_with_identity(path, (network,), f"{field}: ")
    if network not in params:
        held = ", ".join(params) or "other networks"
        raise errors.UserError(f"{field}: {path} holds {held}, not a {network}; {hint}")
    where = f"{field} ({path})"
    loaded = parameters.match(params[network], jax.eval_shape(init, jax.random.key(0)), where=where)
    saved = identity.get("model", {}).get("net")
    if isinstance(saved, dict):  # imported weights have no record of their settings
        own, usual = (schema.identity(each, "network") for each in (config, type(config)()))
        provenance.require_settings(where, provenance.completed(saved, own, usual), own)
    check_frozen(where, identity, {} if tokenizer is None else {"tokenizer": tokenizer})
    return loaded


def check_frozen(where: str, identity: dict, networks: dict) -> None:
    """Raises UserError if the run in `where`, by its `identity`, was trained with others than these `networks`."""
    for name, params in networks.items():
        expected = identity.get("frozen", {}).get(name)
        if expected and parameters.content_hash(params) != expected:
            raise errors.UserError(f"{where} was trained with another {name} than the one given")


def read(path: str, wanted=None, field: str = "") -> dict[str, dict]:
    """`{network: parameters}` of a weight file (of `wanted` only, if given) or a run (averaged where there are)."""
    return read_with_identity(path, wanted, field)[0]


def read_with_identity(path: str, wanted=None, field: str = "") -> tuple[dict[str, dict], dict]:
    """As `read`, and the record that a run keeps of itself; {} for a weight file."""
    path = buckets.fetched(path, field)
    if not os.path.exists(path):
        raise errors.UserError(f"{field}nothing at {path}")
    try:
        if not os.path.isdir(path):
            return dense.read(path) or layouts.read(path, wanted), {}
        params, info = checkpoint.load_params(path, ema=True)
        return params, info["identity"]
    except errors.UserError as error:
        raise errors.UserError(f"{field}{error}", error.passing) from error


def fit(networks: dict, shapes: dict, where: str) -> dict:
    """Those of `networks` that a task trains, whose `shapes` they must have. Raises UserError naming `where` if not.

    Only those of `TRAINING_ONLY` may be missing.
    """
    expected = {name: tree for name, tree in shapes.items() if name in networks or name not in TRAINING_ONLY}
    return parameters.match({name: networks[name] for name in expected if name in networks}, expected, where=where)

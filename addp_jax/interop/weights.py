"""Weights of a frozen or initial network, from wherever the user has them."""

from __future__ import annotations

import os

import jax
import numpy as np

from addp_jax import checkpoint, errors, parameters

RANDOM = "random"  # instead of a path: freshly initialised weights, for benchmarks and memory checks only
TRAIN_FIRST = {
    "tokenizer": "train one with --config=configs/tokenizer.py (or configs/demo_tokenizer.py)",
    "token_predictor": "train one with --config=configs/predictor_vitb.py (or configs/demo_predictor.py)",
    "pixel_to_token": "train one with --config=configs/vitb.py (or configs/demo_addp.py)",
}


def load(path: str, network: str, init, field: str) -> dict:
    """Parameters of `network` as nested numpy arrays.

    Args:
      path: a run's work directory, its checkpoints folder or one checkpoint; or "random".
      network: the name under which a run stores it: tokenizer, token_predictor, pixel_to_token.
      init: `rng -> params` of the module; gives the names and shapes that must be there.
      field: the config field that holds `path`, for messages.
    Raises UserError naming the field when the path is empty, missing or holds other weights.
    """
    if path == RANDOM:
        return jax.tree.map(np.asarray, jax.jit(init)(jax.random.key(0)))
    hint = f"{TRAIN_FIRST[network]} and give its work directory"
    if not path:
        raise errors.UserError(f"{field} is empty: this run needs a trained {network}; {hint}")
    if not os.path.exists(path):
        raise errors.UserError(f"{field}: nothing at {path}; {hint}")
    params, _ = checkpoint.load_params(path, ema=True)
    if network not in params:
        raise errors.UserError(f"{field}: {path} holds {', '.join(params)}, not a {network}; {hint}")
    return parameters.match(params[network], jax.eval_shape(init, jax.random.key(0)), where=f"{field} ({path})")

"""The recognition encoder out of a run that trained one, fitted to the network that takes it over."""

from __future__ import annotations

import os

import jax
import numpy as np

from addp_jax import errors, parameters, weights
from addp_jax.models import beit, vit, vitdet
from addp_jax.weights import buckets

HOLDERS = ("pixel_to_token", "classifier", "vit")  # networks with such an encoder
OPTIONAL = ("input_norm/", "final_norm/", "class_token")  # left behind where the network has none
# What starts new, as no such run has it.
FRESH = (".*/rel_pos_[hw]", ".*/relative_positions", ".*/block/(attention|mlp)_scale")
SETTINGS = ("heads", "patch_size")  # that must be those of the run; other image sizes and norms are fitted


def pretrained(path: str, network: str, init, config) -> dict:
    """What `load_pretrained` gives of a `network` with an encoder; {} without a path. init: of the network."""
    if not path:
        return {}
    return {network: {"encoder": load(path, lambda rng: init(rng)["encoder"], config, "config.model.encoder_weights")}}


def load(path: str, init, config: vit.Config | vitdet.Config | beit.Config, field: str) -> dict:
    """Encoder parameters as nested numpy arrays; position embeddings are resized to the network's grid.

    Relative positions and factors of residual branches are left out, since the run has none.

    Args:
      path: run folder of the tasks `addp` or `classification`, or a weight file of ADDP or MAE; or "random".
      init: `rng -> params` of the encoder.
      config: of the encoder; a norm that it does not have is left behind.
      field: the config field that holds `path`, for messages.
    Raises UserError naming the field when the path is missing or holds no encoder of these sizes.
    """
    if path == weights.SHAPES:
        return jax.eval_shape(init, jax.random.key(0))
    if path == weights.RANDOM:
        return jax.tree.map(np.asarray, jax.jit(init)(jax.random.key(0)))
    path = buckets.fetched(path, f"{field}: ")
    if not os.path.exists(path):
        hint = f"{weights.TRAIN_FIRST['pixel_to_token']} and give its work directory, or give a weight file"
        raise errors.UserError(f"{field}: nothing at {path!r}; {hint}")
    params, identity = weights.read_with_identity(path, HOLDERS, f"{field}: ")
    holder = next((name for name in HOLDERS if name in params), None)
    if holder is None:
        held = ", ".join(params) or "other networks"
        raise errors.UserError(f"{field}: {path} holds {held}, no encoder of images; give a run of the task addp")
    settings = {"model": {"net": identity.get("model", {}).get("net", {}).get("encoder")}}
    weights.check_settings(settings, config, f"{field} ({path})", names=SETTINGS)
    encoder = dict(params[holder]["encoder"])
    encoder["pos_embed"] = vit.resize_pos_embed(encoder["pos_embed"], config.length)
    expected = jax.eval_shape(init, jax.random.key(0))
    where = f"{field} ({path})"
    return parameters.match(encoder, expected, where=where, allow_missing=FRESH, allow_unexpected=OPTIONAL)

"""The recognition encoder out of a run that trained one, fitted to the network that takes it over."""

from __future__ import annotations

import os

import jax
import numpy as np

from addp_jax import errors, parameters, weights
from addp_jax.models import beit, token_predictor, vit, vitdet
from addp_jax.weights import buckets, provenance

# Networks with such an encoder, by what it reads; the first is the one that pre-training makes.
HOLDERS = {"pixels": ("pixel_to_token", "classifier", "vit"), "tokens": ("token_predictor", "classifier")}
OPTIONAL = ("input_norm/", "final_norm/", "class_token")  # left behind where the network has none
# What starts new, as no such run has it.
FRESH = (".*/rel_pos_[hw]", ".*/relative_positions", ".*/block/(attention|mlp)_scale")
SETTINGS = ("heads", "patch_size")  # that must be those of the run; other image sizes and norms are fitted


def pretrained(path: str, network: str, init, config, frozen: dict) -> dict:
    """What `load_pretrained` gives of a `network` with an encoder; {} without a path. init: of the network."""
    if not path:
        return {}
    of_encoder, field = lambda rng: init(rng)["encoder"], "config.model.encoder_weights"
    return {network: {"encoder": load(path, of_encoder, config, field, frozen)}}


def load(
    path: str, init, config: vit.Config | vitdet.Config | beit.Config, field: str, frozen: dict | None = None
) -> dict:
    """Encoder parameters as nested numpy arrays; position embeddings are resized to the network's grid.

    Relative positions and factors of residual branches are left out, since the run has none.

    Args:
      path: run folder of the tasks `addp` or `classification`, or a weight file of ADDP or MAE; or "random". For an
        encoder of tokens a run of `token_predictor` or `classification`, or a weight file of MAGE.
      init: `rng -> params` of the encoder; they say what it reads.
      config: of the encoder; a norm that it does not have is left behind.
      field: the config field that holds `path`, for messages.
      frozen: {"tokenizer": parameters} of an encoder of tokens; a run must have been trained with the very same.
    Raises UserError naming the field when the path is missing or holds no encoder of these sizes or of other inputs.
    """
    if path == weights.SHAPES:
        return jax.eval_shape(init, jax.random.key(0))
    if path == weights.RANDOM:
        return jax.tree.map(np.asarray, jax.jit(init)(jax.random.key(0)))
    path, expected = buckets.fetched(path, f"{field}: "), jax.eval_shape(init, jax.random.key(0))
    where, kind = f"{field} ({path})", reads(expected)
    hint = f"{weights.TRAIN_FIRST[HOLDERS[kind][0]]} and give its work directory, or give a weight file"
    if not os.path.exists(path):
        raise errors.UserError(f"{field}: nothing at {path!r}; {hint}")
    params, identity = weights.read_with_identity(path, HOLDERS[kind], f"{field}: ")
    net = identity.get("model", {}).get("net", {})
    holder = next((name for name in HOLDERS[kind] if name in params), "")
    encoder = params[holder]["encoder"] if holder else {}
    if holder == "token_predictor":
        encoder = of_predictor(params[holder], net, expected["token_embed"].shape[0], where)
    if not holder or reads(encoder) != kind:
        raise errors.UserError(f"{field}: {path} holds {described(params or weights.read(path), kind)}; {hint}")
    if isinstance(saved := net.get("encoder"), dict):  # imported weights have no record of their settings
        known = [name for name in SETTINGS if name in saved]
        own = {name: getattr(config, name) for name in known}
        provenance.require_settings(where, {name: saved[name] for name in known}, own)
    weights.check_frozen(where, identity, frozen or {})
    encoder = encoder | {"pos_embed": vit.resize_pos_embed(encoder["pos_embed"], config.length)}
    return parameters.match(encoder, expected, where=where, allow_missing=FRESH, allow_unexpected=OPTIONAL)


def reads(encoder: dict) -> str:
    """What an encoder of these parameters reads: pixels or tokens."""
    return "tokens" if "token_embed" in encoder else "pixels"


def of_predictor(params: dict, net: dict, num_codes: int, where: str) -> dict:
    """The encoder of a token predictor by our names. net: its settings where a run has them; else they are MAGE's."""
    table, class_id = params["token_embed"], net.get("class_id", token_predictor.Config().class_id)
    if class_id >= len(table):
        raise errors.UserError(f"{where}: {len(table)} rows of the vocabulary; MAGE's class slot is row {class_id}")
    return {
        "token_embed": table[:num_codes], "class_token": table[class_id], "pos_embed": params["pos_embed"],
        "input_norm": params["embed_norm"], "blocks": params["encoder"], "final_norm": params["encoder_norm"],
    }  # fmt: skip


def described(networks: dict, kind: str) -> str:
    """The names of `networks` of which none has an encoder of the `kind`, and why, for messages."""
    (other,) = HOLDERS.keys() - {kind}
    known = any(name in networks for name in HOLDERS[other])
    what = f"whose encoder reads {other}, not {kind}" if known else f"no encoder of {kind}"
    return f"{', '.join(networks) or 'other networks'}, {what}"

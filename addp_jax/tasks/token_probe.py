"""As `linear_probe`, of MAGE's encoder: images -> frozen tokenizer -> token ids -> encoder of the token predictor.

The baseline whose input are tokens, where ADDP's encoder reads pixels. Nothing is masked; the class slot is as in
pre-training.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp

from addp_jax import codecs, schema, weights
from addp_jax.codecs import vqgan
from addp_jax.models import heads, token_predictor
from addp_jax.ops import images
from addp_jax.tasks import linear_probe


@schema.config
class Config(linear_probe.Common):
    """Fields of `config.model`."""

    predictor: token_predictor.Config = token_predictor.Config()
    tokenizer: codecs.Config = vqgan.Config()
    # Run folders or weight files; "random" for the chance level. Their content matters, not their paths.
    predictor_weights: str = schema.frozen_weights()
    tokenizer_weights: str = schema.frozen_weights()


class Task(linear_probe.Probe):
    """See `addp_jax.tasks`."""

    def __init__(self, config: Config, dtype):
        length, num_codes = config.predictor.length, config.predictor.num_codes
        codecs.check_pair(config.tokenizer, length, num_codes, "config.model.predictor")
        self.tokenizer = codecs.create(config.tokenizer, dtype)
        self.predictor = token_predictor.TokenPredictor(config.predictor, dtype)
        settings = config.tokenizer, config.predictor
        super().__init__(config, dtype, config.tokenizer.image_size, config.predictor.encoder.width, settings)

    @functools.cached_property
    def _encoder(self):
        config, init = self.config, functools.partial(codecs.init, self.tokenizer)
        field = "config.model.tokenizer_weights"
        tokenizer = weights.load(config.tokenizer_weights, "tokenizer", init, config.tokenizer, field)
        init, field = functools.partial(token_predictor.init, self.predictor), "config.model.predictor_weights"
        path, network = config.predictor_weights, "token_predictor"
        return {"tokenizer": tokenizer, network: weights.load(path, network, init, config.predictor, field, tokenizer)}

    def features(self, params, frozen, image):
        networks = frozen["encoder"]
        token_ids = codecs.bind(self.tokenizer, networks["tokenizer"]).encode(images.to_unit(image))
        nothing = jnp.zeros(token_ids.shape, bool)
        tokens = self.predictor.apply({"params": networks["token_predictor"]}, token_ids, nothing, method="encode")
        return heads.pool(tokens, self.config.pooling)

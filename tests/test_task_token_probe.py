"""Frozen features of the token predictor's encoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from addp_jax import codecs, errors
from addp_jax.codecs import vqgan
from addp_jax.data import pipeline
from addp_jax.models import layers, token_predictor
from addp_jax.tasks import token_probe

TOKENIZER = vqgan.Config(image_size=16, num_codes=32, channels=8, multipliers=(1, 1, 1), num_res_blocks=1, num_groups=4, code_width=8)
PREDICTOR = token_predictor.Config(
    layers.TransformerConfig(16, 2, 2), layers.TransformerConfig(16, 1, 2), num_codes=32, vocab_size=36, class_id=34, length=16
)
CONFIG = token_probe.Config(
    num_classes=8, predictor=PREDICTOR, tokenizer=TOKENIZER, predictor_weights="random", tokenizer_weights="random"
)
SHAPES = pipeline.Config(num_train=16, num_eval=8, threads=0)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return token_probe.Task(dataclasses.replace(CONFIG, cache=str(tmp_path_factory.mktemp("features"))), jnp.float32)


def test_features_are_those_of_the_tokens(task):
    """Two images of the same tokens have the same features; the mean leaves out the class slot."""
    frozen, image = task.load_frozen(), np.stack([pipeline.open_source(SHAPES, "eval", 16)[i]["image"] for i in range(4)])
    features = np.asarray(jax.jit(task.features)({}, frozen, image))
    assert features.shape == (4, 16) and features.dtype == np.float32
    networks = frozen["encoder"]
    token_ids = codecs.bind(task.tokenizer, networks["tokenizer"]).encode(image / 255.0)
    tokens = task.predictor.apply(
        {"params": networks["token_predictor"]}, token_ids, jnp.zeros((4, 16), bool), method="encode"
    )
    np.testing.assert_allclose(features, np.asarray(tokens)[:, 1:].mean(1), atol=1e-5)


def test_features_are_cached_with_their_labels(task):
    found = task.open_source("train", SHAPES)
    assert found.features.shape == (16, 16)
    np.testing.assert_array_equal(found.labels, np.arange(16) % 8)
    assert task.example["features"].shape == (16,)


def test_networks_that_do_not_fit_are_refused():
    with pytest.raises(errors.UserError, match="config.model.predictor"):
        token_probe.Task(dataclasses.replace(CONFIG, predictor=dataclasses.replace(PREDICTOR, length=9)), jnp.float32)
    with pytest.raises(errors.UserError, match="config.model.predictor_weights is empty"):
        token_probe.Task(dataclasses.replace(CONFIG, predictor_weights=""), jnp.float32).load_frozen()

"""Exact sizes of the networks of configs/vitb.py and configs/vitl.py; nothing is computed."""

import functools

import jax
import jax.numpy as jnp
import programs
import pytest

from addp_jax import diffusion, schema
from addp_jax.codecs import vqgan
from addp_jax.models import pixel_to_token, token_predictor
from addp_jax.tasks import addp
from addp_jax.tasks import token_predictor as predictor_task

SIZES = {"vitb": (768, 12), "vitl": (1024, 24)}  # width and depth of the encoder
DECODER_DEPTH, LENGTH, VOCABULARY, PATCH = 8, 256, 2025, 16 * 16 * 3
# Published sizes in millions; the PyTorch totals contain parameters that no forward pass reads.
ENCODER = {"vitb": 85.846, "vitl": 303.365}
DECODER_SIDE = {"vitb": 60.04, "vitl": 105.74}
ADDP_WITH_UNREAD = {"vitb": 147.07, "vitl": 410.68}
PREDICTOR_WITH_UNREAD = {"vitb": 146.47, "vitl": 409.89}


def config(name):
    return programs.fields(name, "").model.to_dict()


@functools.cache
def task(name):
    return addp.Task(schema.build(addp.Config, config(name), "config.model"), jnp.bfloat16)


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def millions(number: int, digits: int) -> float:
    return round(number / 1e6, digits)


@functools.cache
def shapes(name):
    inits = {
        "net": functools.partial(pixel_to_token.init, task(name).net),
        "predictor": functools.partial(token_predictor.init, task(name).predictor),
        "tokenizer": functools.partial(vqgan.init, task(name).tokenizer),
    }
    return {part: jax.eval_shape(init, jax.random.key(0)) for part, init in inits.items()}


def linear(inputs, outputs):
    return inputs * outputs + outputs


def norm(width):
    return 2 * width


def block(width):
    attention = linear(width, 3 * width) + linear(width, width)
    return attention + linear(width, 4 * width) + linear(4 * width, width) + 2 * norm(width)


def decoder(width):
    """Embedding, blocks, norm; head: dense, norm, bias."""
    body = linear(width, width) + DECODER_DEPTH * block(width) + norm(width)
    return body + linear(width, width) + norm(width) + VOCABULARY


def unread(width):
    """In both PyTorch state dicts: one position table and a pixel head of the masked autoencoder they started from."""
    return (1 + LENGTH) * width + linear(width, PATCH)


def test_tokenizer_has_the_parameters_of_maskgits():
    parts = shapes("vitb")["tokenizer"]
    assert count(parts) == 54_515_587
    assert count(parts["codebook"]) == 1024 * 256
    assert millions(count(parts["encoder"]), 3) == 23.775 and millions(count(parts["decoder"]), 3) == 30.478
    assert len(jax.tree.leaves(parts)) == 168


@pytest.mark.parametrize("name", SIZES)
def test_addp_network(name):
    width, depth = SIZES[name]
    params = shapes(name)["net"]
    encoder = linear(PATCH, width) + width + (1 + LENGTH) * width + depth * block(width) + 2 * norm(width)
    own = VOCABULARY * width + width + 3 * (1 + LENGTH) * width  # token embedding, mask token, positions
    assert count(params["encoder"]) == encoder
    assert count(params) == encoder + own + decoder(width)
    assert millions(encoder, 3) == ENCODER[name]
    assert millions(count(params) - encoder, 2) == DECODER_SIDE[name]
    two_more_tables = 2 * (1 + LENGTH) * width
    assert millions(count(params) + unread(width) + two_more_tables, 2) == ADDP_WITH_UNREAD[name]


@pytest.mark.parametrize("name", SIZES)
def test_token_predictor(name):
    width, depth = SIZES[name]
    embedding = VOCABULARY * width + (1 + LENGTH) * width + norm(width)
    expected = embedding + depth * block(width) + norm(width) + (1 + LENGTH) * width + decoder(width)
    assert count(shapes(name)["predictor"]) == expected
    pixel_side = linear(PATCH, width) + 2 * width + (1 + LENGTH) * width  # patches, class and mask token, positions
    assert millions(expected + unread(width) + pixel_side, 2) == PREDICTOR_WITH_UNREAD[name]


@pytest.mark.parametrize("name", SIZES)
def test_stage_two_trains_the_predictor_that_stage_three_loads(name):
    fields = schema.build(predictor_task.Config, config(f"predictor:{name[-1]}"), "config.model")
    assert fields.net == task(name).config.predictor
    assert fields.tokenizer == task(name).config.tokenizer


@pytest.mark.parametrize("name", SIZES)
def test_decoder_has_room_for_the_known_tokens_of_the_cleanest_mask(name):
    assert task(name).capacity == 125 == LENGTH - diffusion.grid_num_masked(diffusion.MaskSchedule(), LENGTH).min()


@pytest.mark.medium
@pytest.mark.parametrize("name", SIZES)
def test_shapes_of_the_whole_path(name):
    """Image -> tokens -> image and logits; the latter float32 though the computation is bfloat16."""
    nets, parts = task(name), shapes(name)
    image, mask = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.float32), jax.ShapeDtypeStruct((2, LENGTH), bool)

    def apply(net, part, *args, **static):
        return jax.eval_shape(lambda params, *args: net.apply({"params": params}, *args, **static), parts[part], *args)

    token_ids = apply(nets.tokenizer, "tokenizer", image, method="encode")
    assert (token_ids.shape, token_ids.dtype) == ((2, LENGTH), jnp.int32)
    latents = apply(nets.tokenizer, "tokenizer", token_ids, method="lookup")
    assert apply(nets.tokenizer, "tokenizer", latents, method="decode").shape == image.shape
    predicted = apply(nets.predictor, "predictor", token_ids, mask)
    logits = apply(nets.net, "net", image, token_ids, mask, capacity=nets.capacity)
    for array in (predicted, logits):
        assert (array.shape, array.dtype) == ((2, LENGTH, VOCABULARY), jnp.float32)

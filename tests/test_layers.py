"""Transformer parts, and what may and may not influence the networks built of them."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from addp_jax.models import layers, pixel_to_token, token_predictor, vit

ROUNDING = 1e-5  # absolute, of activations of size 1
CONFIG = layers.TransformerConfig(width=8, depth=3, heads=2, dropout=0.2)
SMALL = dict(width=8, depth=2, heads=2, dropout=0.2)
ADDP = pixel_to_token.PixelToToken(
    pixel_to_token.Config(vit.Config(**SMALL, image_size=8, patch_size=2), layers.TransformerConfig(**SMALL), 6, 9)
)
PREDICTOR = token_predictor.TokenPredictor(
    token_predictor.Config(layers.TransformerConfig(**SMALL), layers.TransformerConfig(**SMALL), 6, 9, 7, length=16)
)
LENGTH = 16
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def random_params(init):
    """Of size 0.3, so that everything shows in the outputs."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), jax.eval_shape(init, jax.random.key(0)))


# --- the stack of blocks --------------------------------------------------------------------------


@functools.cache
def stack(**changes):
    """`(config, params, apply)` of a stack; apply(params, tokens, key_mask, train, key) -> tokens."""
    config = dataclasses.replace(CONFIG, **changes)
    blocks = layers.Blocks(config, jnp.float32)

    @functools.partial(jit, static_argnums=3)
    def apply(params, tokens, key_mask=None, train=False, key=jax.random.key(0)):
        return blocks.apply({"params": params}, tokens, key_mask, train, rngs={"dropout": key})

    return config, random_params(lambda rng: blocks.init(rng, random(2, 5, 8))["params"]), apply


def test_a_class_token_in_front_of_full_tiles_changes_nothing():
    """Its query runs apart from the others in evaluation. Without dropout, training computes them all at once."""
    _, params, apply = stack(dropout=0.0)
    tokens, key_mask = random(2, layers.TILE + 1, 8), np.arange(layers.TILE + 1)[None] % 5 != np.array([[2], [4]])
    for mask in (None, jnp.asarray(key_mask)):
        np.testing.assert_allclose(apply(params, tokens, mask), apply(params, tokens, mask, True), atol=ROUNDING)


def test_the_scanned_stack_is_its_blocks_one_after_the_other():
    config, params, apply = stack()
    block = jit(lambda params, tokens: layers.Block(config, jnp.float32).apply({"params": params}, tokens, 0.0, None, False))
    tokens = expected = random(2, 5, 8)
    for layer in range(config.depth):
        expected = block(jax.tree.map(lambda leaf: leaf[layer], params["block"]), expected)
    np.testing.assert_allclose(apply(params, tokens), expected, atol=ROUNDING)


@pytest.mark.parametrize("remat", ("none", "full"))
def test_a_tapped_block_gives_its_output_and_changes_nothing(remat):
    config, params, apply = stack(remat=remat)
    blocks = layers.Blocks(config, jnp.float32)
    tapping = functools.partial(jit, static_argnums=(1, 2))(
        lambda params, tap, train: blocks.apply({"params": params}, random(2, 5, 8), None, train, tap, rngs={"dropout": jax.random.key(0)})
    )
    tokens, tapped = tapping(params, 2, False)
    shorter = layers.Blocks(dataclasses.replace(config, depth=2), jnp.float32)
    np.testing.assert_array_equal(tokens, apply(params, random(2, 5, 8)))
    np.testing.assert_allclose(
        tapped, jit(shorter.apply)({"params": jax.tree.map(lambda leaf: leaf[:2], params)}, random(2, 5, 8)), atol=ROUNDING
    )
    tokens, tapped = tapping(params, 3, True)  # with dropout
    np.testing.assert_array_equal(tokens, apply(params, random(2, 5, 8), None, True))
    np.testing.assert_array_equal(tapped, tokens)


def test_each_layer_starts_from_its_own_random_parameters():
    init = jit(lambda rng: layers.Blocks(CONFIG, jnp.float32).init(rng, random(1, 2, 8))["params"]["block"]["mlp"]["fc1"]["kernel"])
    kernel = init(jax.random.key(0))
    assert kernel.shape == (3, 8, 32)
    assert not np.allclose(kernel[0], kernel[1]) and not np.allclose(kernel[1], kernel[2])


def stack_loss(remat):
    """`(loss of the parameters, parameters)`, with dropout on."""
    _, params, apply = stack(remat=remat)
    return lambda params: (apply.__wrapped__(params, random(2, 5, 8), None, True) ** 2).sum(), params


@functools.cache
def value_and_gradients(remat):
    loss, params = stack_loss(remat)
    return jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_the_backward_pass_computes_again_where_asked(remat):
    loss, params = stack_loss(remat)
    assert ("remat" in str(jax.make_jaxpr(loss)(params))) == (remat != "none")


@pytest.mark.medium
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_what_the_backward_pass_computes_again_changes_nothing(remat):
    """Dropout is on: what is computed again must see the same masks."""
    (value, gradients), (expected, expected_gradients) = value_and_gradients(remat), value_and_gradients("none")
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(other).max()) + 1e-6)


def test_ignored_keys_have_no_influence():
    _, params, apply = stack()
    tokens, key_mask = random(2, 5, 8), np.array([[1, 1, 0, 1, 0], [1, 0, 0, 1, 1]], bool)
    changed = jnp.where(key_mask[..., None], tokens, 100 * random(2, 5, 8, seed=1))
    out, other = (np.asarray(apply(params, array, key_mask)) for array in (tokens, changed))
    np.testing.assert_array_equal(out[key_mask], other[key_mask])
    shorter = apply(params, tokens[:, :4], key_mask[:, :4])
    np.testing.assert_allclose(out[0, :4], shorter[0], atol=ROUNDING)  # the last key of example 0 is ignored
    assert np.abs(out[key_mask] - np.asarray(apply(params, tokens))[key_mask]).max() > 0.01


def test_attention_is_its_formula():
    attention = layers.Attention(2, 0.0, jnp.float32)
    tokens = random(1, 4, 6)
    params = random_params(lambda rng: attention.init(rng, tokens, None, False)["params"])
    out = attention.apply({"params": params}, tokens, None, False)
    linear = lambda name, array: array @ params[name]["kernel"] + params[name]["bias"][None]
    query, key, value = (np.asarray(linear(name, tokens[0])) for name in ("query", "key", "value"))
    heads = []
    for head in (slice(0, 3), slice(3, 6)):
        weights = np.exp(query[:, head] @ key[:, head].T / np.sqrt(3))
        heads.append(weights / weights.sum(-1, keepdims=True) @ value[:, head])
    np.testing.assert_allclose(out[0], linear("out", np.concatenate(heads, -1)), atol=ROUNDING)


def test_gelu_is_exact():
    inputs = np.linspace(-12, 12, 2001, dtype=np.float32)
    exact = np.array([0.5 * x * math.erfc(-x / math.sqrt(2)) for x in inputs.astype(np.float64)])
    np.testing.assert_allclose(layers.gelu(jnp.asarray(inputs)), exact, atol=1e-6)
    half = layers.gelu(jnp.asarray(inputs, jnp.bfloat16))
    exact = layers.gelu(jnp.asarray(inputs, jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(half.astype(jnp.float32), exact, rtol=2**-8)  # one rounding, of the result


@pytest.mark.parametrize("mean", [0, 30])  # in deviations
def test_layer_norm_in_bfloat16_is_that_of_float32(mean):
    features = (random(2, 3, 256) + mean).astype(jnp.bfloat16)
    params = {"scale": jnp.ones(256), "bias": jnp.zeros(256)}
    out = layers.layer_norm(dtype=jnp.bfloat16).apply({"params": params}, features)
    expected = layers.layer_norm(dtype=jnp.float32).apply({"params": params}, features)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=2**-8, atol=2**-8)


# --- randomness -----------------------------------------------------------------------------------


def test_evaluation_draws_nothing_and_training_depends_on_the_key():
    _, params, apply = stack()
    tokens, one, two = random(2, 5, 8), jax.random.key(1), jax.random.key(2)
    np.testing.assert_array_equal(apply(params, tokens, None, False, one), apply(params, tokens, None, False, two))
    np.testing.assert_array_equal(apply(params, tokens, None, True, one), apply(params, tokens, None, True, one))
    assert not np.allclose(apply(params, tokens, None, True, one), apply(params, tokens, None, True, two))
    assert not np.allclose(apply(params, tokens, None, True, one), apply(params, tokens, None, False, one))


def test_without_dropout_training_is_evaluation():
    _, params, apply = stack(dropout=0.0)
    np.testing.assert_allclose(apply(params, random(2, 5, 8), None, True), apply(params, random(2, 5, 8)), atol=ROUNDING)


def test_each_layer_drops_its_own():
    """Blocks that only copy what their dropout lets through: the layers' masks differ."""
    config, params, apply = stack(depth=2, dropout=0.5)
    params = jax.tree.map(jnp.zeros_like, params)
    params["block"]["mlp"]["fc2"]["bias"] = jnp.ones((2, 8))
    added = apply(params, jnp.zeros((4, 50, 8)), None, True)  # 0, 2 or 4: how many layers let it through
    share = np.array([(np.asarray(added) == value).mean() for value in (0, 2, 4)])
    np.testing.assert_allclose(share, [0.25, 0.5, 0.25], atol=0.06)


def test_drop_path_drops_whole_examples_and_keeps_the_expectation():
    drop_path = layers.DropPath()
    branch = random(4000, 2, 3) + 5
    out = np.asarray(drop_path.apply({}, branch, jnp.float32(0.25), rngs={"dropout": jax.random.key(0)}))
    dropped = (out == 0).all((1, 2))
    assert abs(dropped.mean() - 0.25) < 0.03
    np.testing.assert_allclose(out[~dropped], np.asarray(branch)[~dropped] / 0.75, rtol=1e-6)
    np.testing.assert_allclose(out.mean(0), branch.mean(0), rtol=0.04)


def test_drop_path_grows_from_nothing_at_the_first_block():
    _, params, apply = stack(depth=2, dropout=0.0, drop_path=0.5)
    params = jax.tree.map(jnp.zeros_like, params)
    params["block"]["mlp"]["fc2"]["bias"] = jnp.asarray([[1.0] * 8, [10.0] * 8])
    out = np.asarray(apply(params, jnp.zeros((400, 5, 8)), None, True))[:, 0, 0]
    assert set(out) == {1.0, 21.0}  # the first block's 1 is always there; the second's 10 is dropped or doubled
    assert abs((out == 21).mean() - 0.5) < 0.1
    np.testing.assert_array_equal(np.asarray(apply(params, jnp.zeros((4, 5, 8)))), 11.0)


# --- the ADDP network -----------------------------------------------------------------------------


@functools.cache
def addp():
    params = random_params(functools.partial(pixel_to_token.init, ADDP))

    @functools.partial(jit, static_argnums=3)
    def decode(features, token_ids, mask, capacity):
        return ADDP.apply({"params": params}, features, token_ids, mask, capacity, method="decode")

    return params, decode


def masked_case(seed=0):
    """`(token_ids, mask)` of 3 examples with 4, 9 and 16 of 16 tokens masked."""
    rng = np.random.default_rng(seed)
    mask = rng.permuted(np.arange(LENGTH)[None] < np.array([[4], [9], [16]]), axis=1)
    return jnp.asarray(rng.integers(0, 6, mask.shape), jnp.int32), jnp.asarray(mask)


def test_the_class_feature_and_those_under_the_mask_never_reach_the_logits():
    _, decode = addp()
    token_ids, mask = masked_case()
    features = random(3, 1 + LENGTH, 8)
    hidden = jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True)
    changed = jnp.where(hidden[..., None], 100 * random(3, 1 + LENGTH, 8, seed=1), features)
    np.testing.assert_array_equal(decode(changed, token_ids, mask, 12), decode(features, token_ids, mask, 12))


def test_known_features_and_known_tokens_reach_the_logits():
    _, decode = addp()
    token_ids, mask = masked_case()
    features = random(3, 1 + LENGTH, 8)
    before = np.asarray(decode(features, token_ids, mask, 12))
    for after in (decode(-features, token_ids, mask, 12), decode(features, 5 - token_ids, mask, 12)):
        changed = np.abs(np.asarray(after) - before).max((1, 2)) > 1e-3
        assert changed.tolist() == [True, True, False]  # in the last example everything is masked


def test_an_untold_network_reads_known_tokens_from_the_pixels_alone():
    params, _ = addp()
    token_ids, mask = masked_case()
    image = jax.random.uniform(jax.random.key(0), (3, 8, 8, 3))
    told, untold = (jit(pixel_to_token.bind(ADDP, params, known), static_argnums=3) for known in (True, False))
    assert np.abs(told(image, token_ids, mask, 12) - told(image, 5 - token_ids, mask, 12)).max() > 1e-3
    before = untold(image, token_ids, mask, 12)
    np.testing.assert_array_equal(before, untold(image, 5 - token_ids, mask, 12))
    assert np.abs(before - untold(1 - image, token_ids, mask, 12)).max() > 1e-3


def test_token_ids_under_the_mask_never_reach_the_logits():
    _, decode = addp()
    token_ids, mask = masked_case()
    features = random(3, 1 + LENGTH, 8)
    changed = jnp.where(mask, 5 - token_ids, token_ids)
    np.testing.assert_array_equal(decode(features, changed, mask, LENGTH), decode(features, token_ids, mask, LENGTH))


def test_logits_do_not_depend_on_the_capacity_once_it_holds_the_known_tokens():
    _, decode = addp()
    token_ids, mask = masked_case()  # 12 known at most
    features = random(3, 1 + LENGTH, 8)
    expected = decode(features, token_ids, mask, 12)
    for capacity in (13, 16):
        np.testing.assert_allclose(decode(features, token_ids, mask, capacity), expected, atol=ROUNDING)
    assert np.abs(np.asarray(decode(features, token_ids, mask, 11) - expected))[0].max() > 1e-3
    everything = jnp.ones_like(mask)
    none, some = (decode(features, token_ids, everything, capacity) for capacity in (0, 12))
    np.testing.assert_allclose(none, some, atol=ROUNDING)


def test_each_table_of_positions_serves_its_own_places():
    params, _ = addp()
    token_ids, mask = (array[1:2] for array in masked_case())  # 9 of 16 masked
    features = random(1, 1 + LENGTH, 8)
    names = ("pos_visible", "pos_masked", "pos_token")

    def loss(tables):
        logits = ADDP.apply({"params": params | tables}, features, token_ids, mask, 12, method="decode")
        return (logits**2).sum()

    gradients = jit(jax.grad(loss))({name: params[name] for name in names})
    read = {name: np.abs(gradients[name]).max(-1) > 1e-6 for name in names}
    known = ~np.asarray(mask[0])
    np.testing.assert_array_equal(read["pos_visible"], [True, *known])  # the first is the class slot
    np.testing.assert_array_equal(read["pos_masked"], [False, *~known])
    np.testing.assert_array_equal(read["pos_token"], [False, *known])


def test_the_encoder_clips_its_image():
    net, image = ADDP, 3 * random(2, 8, 8, 3)
    encode = jit(lambda image: net.apply({"params": addp()[0]}, image, method="encode"))
    np.testing.assert_array_equal(encode(image), encode(jnp.clip(image, 0, 1)))
    assert encode(image).shape == (2, 1 + LENGTH, 8)


def test_patches_are_in_raster_order():
    """A change of one patch changes the embedding of its place in the grid of tokens."""
    net = vit.VisionTransformer(vit.Config(width=8, depth=1, heads=2, image_size=8, patch_size=2, input_norm=False))
    params = random_params(lambda rng: net.init(rng, jnp.zeros((1, 8, 8, 3)))["params"])
    params["blocks"] = jax.tree.map(jnp.zeros_like, params["blocks"])  # the blocks add nothing: places do not mix
    encode = jit(lambda image: net.apply({"params": params}, image))
    image = jnp.full((1, 8, 8, 3), 0.5)
    changed = np.abs(encode(image.at[0, 2, 7].set(1.0)) - encode(image)).max(-1)[0] > 1e-3
    assert np.flatnonzero(changed).tolist() == [1 + 1 * 4 + 3]  # after the class token: row 1, column 3 of 4 x 4


def test_the_token_head_sends_no_gradient_into_the_embedding():
    head, table = layers.TokenHead(jnp.float32), random(9, 8)
    params = random_params(lambda rng: head.init(rng, random(1, 3, 8), table)["params"])
    gradient = jax.grad(lambda table: head.apply({"params": params}, random(1, 3, 8), table).sum())(table)
    np.testing.assert_array_equal(gradient, 0)


# --- the token predictor --------------------------------------------------------------------------


@functools.cache
def predictor():
    params = random_params(functools.partial(token_predictor.init, PREDICTOR))
    return jit(lambda token_ids, mask, kept=None: PREDICTOR.apply({"params": params}, token_ids, mask, kept))


def test_token_ids_under_the_mask_never_reach_the_predictor():
    token_ids, mask = masked_case()
    kept = jnp.argsort(mask, axis=-1, stable=True)[:, :13]
    changed = jnp.where(mask, 5 - token_ids, token_ids)
    for positions in (None, kept):
        np.testing.assert_array_equal(predictor()(changed, mask, positions), predictor()(token_ids, mask, positions))
    before, after = (np.asarray(predictor()(ids, mask, None)) for ids in (token_ids, 5 - token_ids))
    assert (np.abs(after - before).max((1, 2)) > 1e-3).tolist() == [True, True, False]


def test_keeping_every_position_is_keeping_none_out_in_whatever_order():
    token_ids, mask = masked_case()
    expected = predictor()(token_ids, mask)
    rng = np.random.default_rng(0)
    for positions in (np.tile(np.arange(LENGTH), (3, 1)), rng.permuted(np.tile(np.arange(LENGTH), (3, 1)), axis=1)):
        np.testing.assert_allclose(predictor()(token_ids, mask, positions), expected, atol=ROUNDING)


def test_which_masked_positions_enter_the_encoder_matters():
    """So training, which leaves half of the positions out, is not evaluation with a mask."""
    token_ids, mask = masked_case()
    kept = jnp.argsort(mask, axis=-1, stable=True)[:, :13]
    difference = np.abs(np.asarray(predictor()(token_ids, mask, kept) - predictor()(token_ids, mask)))
    assert (difference.max((1, 2)) > 1e-3).all()


# --- how an encoder begins ------------------------------------------------------------------------


def test_the_mean_colour_of_a_patch_counts_as_much_as_said_and_edges_as_always():
    config = vit.Config(**SMALL, image_size=8, patch_size=4)
    kernel, scaled = (
        vit.init(dataclasses.replace(config, colour_scale=scale), jax.random.key(0))["patch_embed"]["kernel"] for scale in (1.0, 0.1)
    )
    colour = jnp.tile(random(3), 16)
    np.testing.assert_allclose(colour @ scaled, 0.1 * (colour @ kernel), atol=ROUNDING)
    edges = random(16, 3)
    edges = (edges - edges.mean(0)[None]).reshape(-1)
    np.testing.assert_allclose(edges @ scaled, edges @ kernel, atol=ROUNDING)


def test_position_embeddings_begin_with_the_deviation_said():
    config = vit.Config(width=64, depth=1, heads=2, image_size=32, patch_size=2, pos_std=0.5)
    assert abs(np.std(vit.init(config, jax.random.key(0))["pos_embed"]) - 0.5) < 0.02

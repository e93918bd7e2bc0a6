"""Every network, loss and gradient agrees with the released PyTorch code, from its weights under its names."""

import fnmatch
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import released

from addp_jax import diffusion, optim
from addp_jax.codecs import vqgan
from addp_jax.models import pixel_to_token, token_predictor
from addp_jax.weights import pytorch

pytestmark = pytest.mark.golden

# Largest deviation over largest magnitude. The released code's own float32 noise, measured against float64,
# is 1e-6 to 2e-5 on these quantities.
NETWORK = 3e-5
LOSS = 2e-6
GRADIENT = 2e-4
CHECKSUM = 5e-6  # of the sum of magnitudes
CAPACITY = 125  # decoder slots for known tokens

TOKENIZER = vqgan.Tokenizer(released.TOKENIZER)
PREDICTOR = token_predictor.TokenPredictor(released.PREDICTOR)
ADDP = pixel_to_token.PixelToToken(released.ADDP)


def assert_close(ours, theirs, tolerance=NETWORK):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def assert_checksums(ours, theirs, tolerance=CHECKSUM):
    """`ours`: arrays; `theirs` [n,4]. Every entry within `tolerance` of the sum of magnitudes."""
    for array, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(released.checksum(array), expected, rtol=0, atol=tolerance * expected[1])


@functools.partial(jax.jit, static_argnames="method")
def tokenize(params, array, method):
    return TOKENIZER.apply({"params": params}, array, method=method)


@jax.jit
def teach(params, token_ids, mask):
    logits = PREDICTOR.apply({"params": params}, token_ids, mask)
    return jax.nn.softmax(logits[..., : released.PREDICTOR.num_codes])


@functools.partial(jax.jit, static_argnames="label_smoothing")
def loss_and_grads(params, image, token_ids, mask, target, label_smoothing=0.1):
    def loss(params):
        logits = ADDP.apply({"params": params}, image, token_ids, mask, CAPACITY)
        return diffusion.soft_cross_entropy(target, logits, mask, label_smoothing).mean(), logits

    (value, logits), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return value, logits, grads


@pytest.fixture(scope="module")
def pair():
    """One training pair as the release makes it: ids, masks, corrupted image, target."""
    token_ids = jnp.asarray(released.outputs()["token_ids"], jnp.int32)
    return training_pair(token_ids, jnp.asarray(released.masks("mask_t")), jnp.asarray(released.masks("mask_s")))


def training_pair(token_ids, mask_t, mask_s):
    teacher = lambda mask, rng: teach(released.predictor_params(), token_ids, mask)
    codebook = jnp.asarray(released.tokenizer_params()["codebook"])
    latents, target = diffusion.corrupt(teacher, token_ids, mask_t, mask_s, codebook, jax.random.key(0))
    corrupted = tokenize(released.tokenizer_params(), latents, "decode")
    return dict(image=corrupted, token_ids=token_ids, mask=mask_s, target=target)


def test_tokenizer_finds_the_released_tokens():
    token_ids = tokenize(released.tokenizer_params(), released.images(), "encode")
    np.testing.assert_array_equal(token_ids, released.outputs()["token_ids"])


def test_tokenizer_features_agree():
    features = tokenize(released.tokenizer_params(), released.images(), "features")
    expected = released.outputs()["features"]  # every 8th channel of image 0
    assert_close(features[0].T.reshape(-1, 16, 16)[::8], expected)


@pytest.mark.medium
def test_reconstruction_agrees(pair):
    latents = released.tokenizer_params()["codebook"][pair["token_ids"]]
    image = np.asarray(tokenize(released.tokenizer_params(), latents, "decode")).transpose(0, 3, 1, 2)
    assert_close(image[0][:, ::4, ::4], released.outputs()["reconstruction"])
    assert_checksums([image], [released.outputs()["reconstruction_checksum"]])


def test_token_predictor_agrees(pair):
    gold = released.outputs()
    params = {"params": released.predictor_params()}
    features = jax.jit(functools.partial(PREDICTOR.apply, method="encode"))(params, pair["token_ids"], pair["mask"])
    logits = jax.jit(functools.partial(PREDICTOR.apply, method="decode"))(params, features, pair["mask"])
    assert_close(features[:, ::8], gold["teacher_latent"])
    assert_close(logits[:, :3], gold["teacher_logits"])  # sequence positions 1..3; 0 is the class slot


def test_soft_targets_and_soft_embeddings_agree(pair):
    gold = released.outputs()
    probs = np.asarray(pair["target"])[0].T.reshape(-1, 16, 16)
    assert_close(probs[:, ::4, ::4], gold["teacher_probs"])
    soft = teach(released.predictor_params(), pair["token_ids"], released.masks("mask_t"))
    soft = np.asarray(soft @ released.tokenizer_params()["codebook"]).transpose(0, 2, 1).reshape(2, -1, 16, 16)
    assert_close(soft[:, ::8, ::2, ::2], gold["teacher_soft"])


def test_corrupted_image_agrees(pair):
    assert_close(pair["image"].transpose(0, 3, 1, 2)[:, :, ::8, ::8], released.outputs()["corrupted"])


def test_encoder_agrees(pair):
    _, state = jax.jit(functools.partial(ADDP.apply, method="encode", capture_intermediates=True))(
        {"params": released.addp_params()}, pair["image"]
    )
    encoder = state["intermediates"]["encoder"]
    assert_close(encoder["input_norm"]["__call__"][0][:, ::16], released.outputs()["input_embeddings"])
    assert_close(encoder["final_norm"]["__call__"][0][:, ::16], released.outputs()["latent"])


@pytest.mark.medium
def test_logits_loss_and_gradients_agree(pair):
    gold = released.outputs()
    loss, logits, grads = loss_and_grads(released.addp_params(), **pair)
    assert_close(logits[0, 1::16], gold["logits"])  # sequence positions 2, 18, 34...
    assert_close(logits[1, 7::64], gold["logits_img1"])  # 8, 72...
    np.testing.assert_allclose(loss, gold["loss"], rtol=LOSS)

    grads = pytorch.to_torch(grads, pytorch.addp_rules())
    names = [str(name) for name in gold["grad_names"]]
    assert set(names) == set(grads)
    assert_checksums([without_key_bias(name, grads[name]) for name in names if "qkv.bias" not in name],
                     [row for name, row in zip(names, gold["grad_checksums"]) if "qkv.bias" not in name], GRADIENT)  # fmt: skip
    for name in names:
        if f"grad:{name}" in gold:
            assert_close(grads[name], gold[f"grad:{name}"], GRADIENT)
    np.testing.assert_allclose(optax.tree.norm(grads), gold["grad_norm"], rtol=GRADIENT)


def without_key_bias(name, array):
    """The gradient of the key bias is zero in exact arithmetic; what is computed is noise."""
    return np.delete(array.reshape(3, -1), 1, 0) if name.endswith("qkv.bias") else array


@pytest.mark.medium
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_label_smoothing_agrees(pair, label_smoothing):
    loss, _, _ = loss_and_grads(released.addp_params(), **pair, label_smoothing=label_smoothing)
    np.testing.assert_allclose(loss, released.outputs()[f"loss_ls{label_smoothing}"], rtol=LOSS)


def test_everything_masked_agrees_and_gives_the_encoder_no_gradient(pair):
    gold = released.outputs()
    everything = jnp.ones_like(pair["mask"])
    pair = training_pair(pair["token_ids"], everything, everything)
    loss, logits, grads = loss_and_grads(released.addp_params(), **pair)
    np.testing.assert_allclose(loss, gold["full_mask_loss"], rtol=LOSS)
    assert_close(logits[0, :2], gold["full_mask_logits"])
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(grads["encoder"]))


@pytest.mark.medium
def test_three_adamw_steps_agree(pair):
    """Losses, gradient norms and parameters after three steps of the release's optimizer, from its own masks."""
    gold = released.outputs()
    lr, *betas, eps, weight_decay, clip = (float(value) for value in gold["adamw_hyper"])
    optimizer = optim.build(optim.Config(betas=tuple(betas), eps=eps, weight_decay=weight_decay, clip_norm=clip), lr)
    params = jax.tree.map(jnp.asarray, released.addp_params())
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for index in range(3):
        masks = (jnp.asarray(released.masks(name)[index]) for name in ("adamw_masks_t_next", "adamw_masks_t"))
        loss, _, grads = loss_and_grads(params, **training_pair(pair["token_ids"], *masks))
        np.testing.assert_allclose(loss, gold["adamw_loss"][index], rtol=1e-5)
        np.testing.assert_allclose(optax.tree.norm(grads), gold["adamw_grad_norm"][index], rtol=GRADIENT)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    ours = pytorch.to_torch(params, pytorch.addp_rules())
    for name in ours:
        expected = gold.get(f"adamw_step3:{name}")
        if expected is not None:
            # Adam's first steps are lr * g / |g|: where g is noise, so is the step.
            assert np.mean(np.abs(ours[name] - expected) <= 5e-6) > 0.995
            np.testing.assert_allclose(ours[name], expected, rtol=0, atol=6 * lr)


def test_weight_decay_falls_on_the_released_names():
    gold = released.outputs()
    decayed = optim.decay_mask(released.addp_params())
    flags = jax.tree.map(lambda leaf, flag: np.full(np.shape(leaf), flag), released.addp_params(), decayed)
    ours = {name: bool(value.all()) for name, value in pytorch.to_torch(flags, pytorch.addp_rules()).items()}
    theirs = {str(name): True for name in gold["adamw_group_decay"]} | {str(name): False for name in gold["adamw_group_no_decay"]}
    assert ours == {name: flag for name, flag in theirs.items() if name not in pytorch.ADDP_DEAD}


@functools.cache
def probe_scale(name: str) -> float:
    gold = released.outputs()
    hit = any(fnmatch.fnmatch(name, str(rule)) for rule in gold["eps_rules"])
    return float(gold["eps_scale"]) if hit else 1.0


@pytest.mark.medium
def test_norm_epsilons_agree(pair):
    """With inputs of the norms scaled to a variance near 1e-6, a wrong epsilon shows."""
    gold = released.outputs()
    addp, predictor = released.addp_params(probe_scale), released.predictor_params(probe_scale)
    inputs = (pair["image"], pair["token_ids"], pair["mask"])
    logits, state = ADDP.apply({"params": addp}, *inputs, CAPACITY, capture_intermediates=True)
    encoder = state["intermediates"]["encoder"]
    assert_close(encoder["input_norm"]["__call__"][0][0, ::64], gold["eps_addp_input_embeddings"])
    assert_close(encoder["final_norm"]["__call__"][0][0, ::64], gold["eps_addp_latent"])
    assert_close(logits[0, 63::64], gold["eps_addp_logits"][1:])
    _, state = PREDICTOR.apply({"params": predictor}, *inputs[1:], capture_intermediates=True)
    state = state["intermediates"]
    assert_close(state["encoder_norm"]["__call__"][0][0, ::64], gold["eps_mage_latent"])
    assert_close(state["decoder_norm"]["__call__"][0][0, 63::64], gold["eps_mage_decoder_norm"][1:])
    assert_close(state["head"]["norm"]["__call__"][0][0, 63::64], gold["eps_mage_mlm_hidden"][1:])


def test_torch_names_round_trip_bit_exactly():
    tables = (
        (released.tokenizer_params(), pytorch.tokenizer_rules(released.TOKENIZER), "vqgan."),
        (released.predictor_params(), pytorch.predictor_rules(), "token_predictor."),
        (released.addp_params(), pytorch.addp_rules(), ""),
    )
    for params, rules, prefix in tables:
        for name, array in pytorch.to_torch(params, rules).items():
            np.testing.assert_array_equal(array, released.state_dict()[prefix + name])

"""The tokenizer's training task."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from addp_jax import errors, partition, schema
from addp_jax.codecs import vqgan
from addp_jax.data import pipeline
from addp_jax.models import discriminator, perceptual
from addp_jax.tasks import tokenizer as task_tokenizer

NET = vqgan.Config(
    image_size=8, channels=4, multipliers=(1, 1), num_res_blocks=0, num_codes=12, code_width=6, num_groups=2
)
ALONE = task_tokenizer.Config(net=NET, discriminator_weight=0.0)
FULL = task_tokenizer.Config(net=NET, discriminator=discriminator.Config(channels=4, max_channels=4), discriminator_weight=0.5)
# Term of the loss -> its weight in FULL.
ADVERSARYS = {"discriminator": 1.0, "r1": 10.0}
TOKENIZERS = {"mse": 1.0, "codebook": 1.0, "commitment": 0.25, "entropy": 0.1, "adversarial": 0.5}
RTOL = 1e-4


@functools.cache
def make(config):
    """Task and random parameters, without the seconds that compiling `init` takes; numpy arrays fit any mesh."""
    task, rng = task_tokenizer.Task(config, jnp.float32), np.random.default_rng(0)

    def draw(path, leaf):
        if leaf.ndim == 1:
            return np.full(leaf.shape, partition.path_name(path).endswith("scale"), np.float32)
        return rng.normal(0, math.prod(leaf.shape[:-1]) ** -0.5, leaf.shape).astype(np.float32)

    return task, jax.tree_util.tree_map_with_path(draw, jax.eval_shape(task.init, jax.random.key(0)))


def batch(count=4, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (count, NET.image_size, NET.image_size, 3), dtype=np.uint8)
    return {"image": image, "valid": np.ones(count, bool)}


@pytest.fixture(scope="module")
def gradients():
    """Gradient of the loss and of each of its terms."""
    task, params = make(FULL)

    def value(params, name):
        return task.loss(params, {}, batch(), None, True)[1][name]

    names = ("loss", *ADVERSARYS, *TOKENIZERS)
    return jax.jit(lambda params: {name: jax.grad(value)(params, name) for name in names})(params)


@pytest.fixture(scope="module")
def separate():
    """Gradients of the two players' losses, written out without stop-gradients and each for its own parameters only."""
    task, params = make(FULL)
    params = jax.device_put(params)
    image = jnp.asarray(batch()["image"], jnp.float32) / 255

    def judge(params, image):
        return jax.nn.sigmoid(task.discriminator.apply({"params": params}, image))

    def discriminate(own):
        def logit(one):
            return task.discriminator.apply({"params": own}, one[None])[0]

        slope = jax.vmap(jax.grad(logit))(image).reshape(len(image), -1)
        fake = task.net.apply({"params": params["tokenizer"]}, image)
        chance = jnp.log(judge(own, image)).mean() + jnp.log(1 - judge(own, fake)).mean()
        return -chance + FULL.r1_weight * (slope**2).sum(1).mean()

    def deceive(decoder):
        fake = task.net.apply({"params": {**params["tokenizer"], "decoder": decoder}}, image)
        return -jnp.log(judge(params["discriminator"], fake)).mean()

    grad = jax.jit(lambda one, two: (jax.grad(discriminate)(one), jax.grad(deceive)(two)))
    return grad(params["discriminator"], params["tokenizer"]["decoder"])


def size(tree):
    return float(optax.tree.norm(tree))


def assert_close(one, other):
    assert size(other) > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=RTOL * size(other)), one, other)


def weighted(gradients, weights, player):
    return jax.tree.map(
        lambda *leaves: sum(weight * leaf for weight, leaf in zip(weights.values(), leaves)),
        *(gradients[name][player] for name in weights),
    )


def test_configuration_is_built_from_the_users_fields():
    fields = {"discriminator": {"channels": 8}, "net": {"image_size": 32}, "l2_weight": 2}
    config = schema.build(task_tokenizer.Config, fields, "config.model")
    assert config.discriminator.channels == 8 and config.net.image_size == 32 and config.l2_weight == 2.0


@pytest.mark.parametrize(
    "net", [{"image_size": 17}, {"channels": 5}, {"image_size": 24}], ids=["patch size", "groups", "discriminator"]
)
def test_sizes_that_do_not_fit_are_refused(net):
    with pytest.raises(ValueError, match="image_size|num_groups"):
        task_tokenizer.Task(dataclasses.replace(FULL, net=dataclasses.replace(NET, **net)), jnp.float32)


def test_without_weight_there_is_no_discriminator():
    task, params = make(ALONE)
    assert set(params) == {"tokenizer"}
    _, metrics = jax.eval_shape(lambda params: task.loss(params, {}, batch(), None, True), params)
    assert not {"adversarial", "discriminator", "r1", "logits_real"} & set(metrics)


def test_every_parameter_has_a_layout():
    task, params = make(FULL)[:2]
    partition.shardings(params, partition.make_mesh(partition.Config()), task.layout)


@pytest.mark.medium
def test_the_tokenizers_gradient_holds_nothing_of_the_discriminators_loss(gradients):
    for name in ADVERSARYS:
        assert size(gradients[name]["tokenizer"]) == 0
    assert_close(gradients["loss"]["tokenizer"], weighted(gradients, TOKENIZERS, "tokenizer"))


@pytest.mark.medium
def test_the_discriminators_gradient_holds_nothing_of_the_tokenizers_loss(gradients):
    for name in TOKENIZERS:
        assert size(gradients[name]["discriminator"]) == 0
    assert_close(gradients["loss"]["discriminator"], weighted(gradients, ADVERSARYS, "discriminator"))


@pytest.mark.medium
def test_one_scalar_gives_both_players_their_separate_gradients(gradients, separate):
    discriminators, decoders = separate
    assert_close(gradients["loss"]["discriminator"], discriminators)
    assert_close(gradients["adversarial"]["tokenizer"]["decoder"], decoders)


def test_the_reconstruction_error_passes_straight_through_to_the_encoder(gradients):
    found = gradients["mse"]["tokenizer"]
    assert size(found["encoder"]) > 0 and size(found["decoder"]) > 0 and size(found["codebook"]) == 0


def test_codebook_term_moves_codes_and_commitment_term_moves_features(gradients):
    codes, features = gradients["codebook"]["tokenizer"], gradients["commitment"]["tokenizer"]
    assert size(codes["codebook"]) > 0 and size(codes["encoder"]) == size(codes["decoder"]) == 0
    assert size(features["encoder"]) > 0 and size(features["codebook"]) == size(features["decoder"]) == 0


def test_entropy_loss_is_lowest_for_sure_and_even_codes():
    codes = 4
    sure = 1 - jax.nn.one_hot(jnp.arange(8).reshape(2, 4) % codes, codes)
    collapsed = 1 - jax.nn.one_hot(jnp.zeros((2, 4), int), codes)
    unsure = jnp.zeros((2, 4, codes))
    losses = [float(task_tokenizer.entropy_loss(distances, 0.01)[0]) for distances in (sure, collapsed, unsure)]
    np.testing.assert_allclose(losses, [-np.log(codes), 0.0, 0.0], atol=1e-3)


def test_loss_is_the_weighted_sum_of_its_terms():
    task, params = make(FULL)
    loss, metrics = jax.jit(lambda params: task.loss(params, {}, batch(), None, True))(params)
    weights = {**TOKENIZERS, **ADVERSARYS}
    np.testing.assert_allclose(loss, sum(weight * metrics[name] for name, weight in weights.items()), rtol=1e-5)
    np.testing.assert_allclose(metrics["entropy"], metrics["entropy_each"] - metrics["entropy_mean"], atol=1e-5)
    assert all(value.shape == () and jnp.isfinite(value) for value in metrics.values())


def test_code_statistics_of_known_counts():
    statistics = task_tokenizer.code_statistics(jnp.asarray([5, 0, 5, 0]))
    np.testing.assert_allclose([statistics["codebook_usage"], statistics["perplexity"]], [0.5, 2.0], rtol=1e-6)


@pytest.mark.medium
def test_training_lowers_the_error_and_keeps_codes_alive():
    task, params = make(dataclasses.replace(FULL, r1_weight=0.1))
    optimizer = optax.adam(3e-3, 0.9, 0.99)
    colours = np.random.default_rng(1).integers(0, 256, (8, 2, 2, 3), dtype=np.uint8)
    data = {"image": colours.repeat(NET.image_size // 2, axis=1).repeat(NET.image_size // 2, axis=2)}

    @jax.jit
    def step(params, state):
        gradients, metrics = jax.grad(lambda params: task.loss(params, {}, data, None, True), has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, metrics

    state, history = optimizer.init(params), []
    for _ in range(60):
        params, state, metrics = step(params, state)
        history.append(metrics)
    assert history[-1]["mse"] < 0.3 * history[0]["mse"]
    assert history[-1]["codebook_usage"] > 0.5


def evaluate(batches):
    """On a mesh of two devices, with the batch split over them."""
    task, params = make(ALONE)
    mesh = partition.make_mesh(partition.Config(), jax.devices()[:2])
    with jax.set_mesh(mesh):
        return task.evaluate(params, {}, [jax.device_put(one, partition.batch_sharding(mesh)) for one in batches], None)


def test_evaluation_counts_every_valid_example_once():
    whole = batch(6)
    first = {name: values[:4] for name, values in whole.items()}
    last = {"image": np.concatenate([whole["image"][4:], np.zeros_like(whole["image"][:2])])}
    last["valid"] = np.array([True, True, False, False])
    one, _, _ = evaluate([whole])
    two, _, _ = evaluate([first, last])
    assert set(one) == {"mse", "psnr", "ssim", "codebook_usage", "perplexity"}
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-5)


def test_evaluation_agrees_with_numpy():
    task, params = make(ALONE)
    image = batch(4)["image"].astype(np.float32) / 255
    apply = functools.partial(task.net.apply, {"params": jax.device_put(params["tokenizer"])})
    output, token_ids = jax.jit(lambda image: (apply(image), apply(image, method="encode")))(image)
    mse = ((np.clip(output, 0, 1) - image) ** 2).mean((1, 2, 3))
    share = np.bincount(np.ravel(token_ids), minlength=NET.num_codes) / token_ids.size
    used = share[share > 0]
    scalars, _, _ = evaluate([batch(4)])
    expected = {"mse": mse.mean(), "psnr": (-10 * np.log10(mse)).mean(), "codebook_usage": len(used) / NET.num_codes}
    expected["perplexity"] = np.exp(-(used * np.log(used)).sum())
    for name, value in expected.items():
        np.testing.assert_allclose(scalars[name], value, rtol=1e-4)


def test_picture_shows_valid_originals_above_their_reconstructions():
    data = batch(4)
    data["valid"] = np.array([True, True, False, False])
    _, images, _ = evaluate([data])
    picture, size, pad = images["reconstructions"], NET.image_size, 2
    assert picture.shape == (2 * (size + pad) + pad, 2 * (size + pad) + pad, 3) and picture.dtype == np.float32
    np.testing.assert_allclose(picture[pad : pad + size, pad : pad + size], data["image"][0] / 255, atol=1e-6)


@pytest.mark.medium
def test_perceptual_term_comes_with_its_weights_and_trains_the_tokenizer(tmp_path, monkeypatch):
    stages = ((2, (0, 2)), (3, (5,)))  # a toy in place of VGG16's
    monkeypatch.setattr(perceptual, "STAGES", stages)
    rng, arrays = np.random.default_rng(0), {}
    for index, shape in ((0, (2, 3, 3, 3)), (2, (2, 2, 3, 3)), (5, (3, 2, 3, 3))):
        arrays[f"features.{index}.weight"] = rng.normal(0, 0.3, shape).astype(np.float32)
        arrays[f"features.{index}.bias"] = np.ones(shape[0], np.float32)
    safetensors.numpy.save_file(arrays, tmp_path / "vgg16.safetensors")
    config = dataclasses.replace(ALONE, perceptual_weights=str(tmp_path / "vgg16.safetensors"))
    task, params = make(config)
    frozen = task.load_frozen()
    term = jax.value_and_grad(lambda params: task.loss(params, frozen, batch(), None, True)[1]["perceptual"])
    value, found = jax.jit(term)(params)
    assert value > 0 and size(found["tokenizer"]["decoder"]) > 0 and set(params) == {"tokenizer"}
    for without in (ALONE, dataclasses.replace(config, perceptual_weight=0.0)):
        assert task_tokenizer.Task(without, jnp.float32).load_frozen() == {}

    lpips = {f"lin{stage}.model.1.weight": np.ones((1, width, 1, 1), np.float32) for stage, (width, _) in enumerate(stages)}
    safetensors.numpy.save_file(lpips, tmp_path / "lpips.safetensors")
    with_lpips = dataclasses.replace(config, lpips_weights=str(tmp_path / "lpips.safetensors"))
    task = task_tokenizer.Task(with_lpips, jnp.float32)
    scalars, _, _ = task.evaluate(params, frozen, [batch()], None)
    # With all channel weights 1 it is the training's distance summed, not averaged, over the stages.
    image = batch()["image"].astype(np.float32) / 255
    found = jnp.clip(task.reconstruct(params, frozen, image), 0, 1)
    np.testing.assert_allclose(scalars["lpips"], 2 * perceptual.distance(frozen["perceptual"], image, found).mean(), rtol=RTOL)
    with pytest.raises(errors.UserError, match="config.model.lpips_weights needs config.model.perceptual_weights"):
        task_tokenizer.Task(dataclasses.replace(with_lpips, perceptual_weights=""), jnp.float32).load_frozen()


@pytest.mark.parametrize("content", (None, b"not weights", {"features.0.weight": np.zeros((64, 3, 3, 3), np.float32)}))
def test_perceptual_weights_that_do_not_fit_name_the_file(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        safetensors.numpy.save_file(content, path)
    with pytest.raises(errors.UserError, match="config.model.perceptual_weights.*weights.safetensors"):
        task_tokenizer.Task(dataclasses.replace(ALONE, perceptual_weights=str(path)), jnp.float32).load_frozen()


def test_transforms_give_images_of_the_nets_size():
    example = {"image": np.zeros((20, 30, 3), np.uint8), "label": 0}
    task, _ = make(ALONE)
    for split in ("train", "eval"):
        out = task.transform(split, pipeline.Config())(example, np.random.default_rng(0))
        assert out["image"].shape == (task.image_size, task.image_size, 3)

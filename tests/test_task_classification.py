"""Fine-tuning: the classifier, where its encoder comes from, what evaluation says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import programs
import pytest

from addp_jax import errors, optim, parameters, partition, program, schema
from addp_jax.data import augment, pipeline
from addp_jax.models import heads, pixel_to_token, vit
from addp_jax.tasks import classification
from addp_jax.training import loop
from addp_jax.weights import checkpoint

ENCODER = vit.Config(16, 2, 2, dropout=0.0, image_size=16, patch_size=4, input_dropout=0.0, input_norm=False, final_norm=False)
PLAIN = classification.Config(
    heads.Config(ENCODER, num_classes=2), mixup=0.0, cutmix=0.0, label_smoothing=0.0, augment=augment.Config(0.0, 0.0, 0.0)
)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time


@functools.cache
def make(config=PLAIN):
    task = classification.Task(config, jnp.float32)
    return task, jit(task.init)(jax.random.key(0))


def batch(count=16, seed=0):
    """Class 1 is bright on the left, class 0 on the right."""
    rng = np.random.default_rng(seed)
    label = np.arange(count, dtype=np.int32) % 2
    image = rng.integers(0, 120, (count, 16, 16, 3), dtype=np.uint8)
    for n, left in enumerate(label):
        image[n, :, slice(0, 8) if left else slice(8, 16)] += 120
    return {"image": image, "label": label, "valid": np.ones(count, bool)}


def with_encoder(weights="", **changes):
    """PLAIN with another encoder."""
    net = heads.Config(dataclasses.replace(ENCODER, **changes), num_classes=2)
    return dataclasses.replace(PLAIN, net=net, encoder_weights=weights)


def with_head(params):
    """With a head that tells images apart: the fresh one is nearly zero."""
    kernel = np.random.default_rng(0).normal(size=(16, 2)).astype(np.float32)
    return parameters.replaced(params, {"classifier": {"dense_out": {"kernel": kernel}}})


@pytest.fixture(scope="module")
def addp_run(tmp_path_factory):
    """The work directory of an ADDP run that has just begun: (path, its encoder)."""
    path = tmp_path_factory.mktemp("addp")
    fields = programs.fields("demo_addp").model.net.to_dict()
    net = pixel_to_token.PixelToToken(schema.build(pixel_to_token.Config, fields))
    params = jax.tree.map(np.asarray, jit(functools.partial(pixel_to_token.init, net))(jax.random.key(3)))
    checkpoint.save_params(str(path), {"pixel_to_token": params}, {})
    return str(path), params["encoder"]


def test_two_plain_classes_are_learned():
    task, params = make()
    optimizer = optim.build(optim.Config(clip_norm=0.0, layer_decay=0.8), 1e-2)

    @jit
    def step(params, state, batch, rng):
        grads = jax.grad(lambda params: task.loss(params, {}, batch, rng, True)[0])(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for n in range(60):
        params, state = step(params, state, batch(16, n), jax.random.key(n))
    scalars, images, _ = task.evaluate(params, {}, [batch(32, 1000)], None)
    assert scalars["top1"] > 0.95 and scalars["top5"] == 1.0
    assert scalars["class_worst"] == min(scalars["class/0"], scalars["class/1"]) > 0.9
    assert images["confusion"].ndim == 3 and images["confusion"].dtype == np.uint8


def test_evaluation_counts_valid_examples_only():
    task, params = make()
    params = with_head(params)
    whole = batch(16)
    right = np.asarray(jit(task.logits)(params, {}, whole["image"])).argmax(-1) == whole["label"]
    assert 0 < right.sum() < 16
    scalars, _, _ = task.evaluate(params, {}, [whole | {"valid": right}], None)
    assert scalars["top1"] == 1.0
    assert task.evaluate(params, {}, [], None) == ({}, {}, {})


def test_mixing_and_drop_path_happen_in_training_only():
    task, params = make(dataclasses.replace(with_encoder(drop_path=0.5), mixup=0.8, cutmix=1.0))
    params = with_head(params)
    loss = jit(lambda seed: task.loss(params, {}, batch(), jax.random.key(seed), True)[0])
    assert float(loss(0)) != float(loss(1))
    once, twice = (task.evaluate(params, {}, [batch()], None)[0] for _ in range(2))
    assert once == twice


def test_a_fresh_head_is_nearly_zero():
    fresh = make()[1]["classifier"]
    assert (fresh["head_norm"]["scale"] == 1).all() and 0 < np.abs(fresh["dense_out"]["kernel"]).max() < 1e-4


def test_logits_are_read_off_the_features():
    task, params = make()
    image = batch(3)["image"]
    head = params["classifier"]["dense_out"]
    expected = jit(task.features)(params, {}, image) @ head["kernel"] + head["bias"][None]
    np.testing.assert_allclose(jit(task.logits)(params, {}, image), expected, atol=1e-6)


def test_mean_pooling_leaves_the_class_token_out():
    tokens = jnp.arange(2 * 3 * 4, dtype=jnp.float32).reshape(2, 3, 4)
    np.testing.assert_allclose(heads.pool(tokens, "mean"), tokens[:, 1:].mean(1))
    np.testing.assert_allclose(heads.pool(tokens, "class"), tokens[:, 0])
    with pytest.raises(ValueError, match="pooling"):
        heads.Config(pooling="max")


@pytest.mark.parametrize("norms", [False, True])
def test_fine_tuning_starts_from_the_encoder_of_an_addp_run(addp_run, norms):
    path, expected = addp_run
    task, params = make(with_encoder(path, input_norm=norms, final_norm=norms))
    loaded = task.load_pretrained()["classifier"]["encoder"]
    assert ("input_norm" in loaded) == norms
    for name, leaf in parameters.named_leaves(loaded).items():
        np.testing.assert_array_equal(leaf, parameters.named_leaves(expected)[name])
    whole = parameters.replaced(params, task.load_pretrained())
    assert parameters.named_leaves(whole).keys() == parameters.named_leaves(params).keys()


def test_position_embeddings_are_resized_to_the_image(addp_run):
    path, expected = addp_run
    task, _ = make(with_encoder(path, image_size=24))
    loaded = task.load_pretrained()["classifier"]["encoder"]["pos_embed"]
    assert loaded.shape == (1 + 36, 16)
    np.testing.assert_array_equal(loaded[0], expected["pos_embed"][0])


@pytest.mark.parametrize(
    "change, said", [(dict(width=8), "encoder_weights.*parameters do not fit"), (dict(depth=3), "parameters do not fit")]
)
def test_another_encoder_is_refused(addp_run, change, said):
    task, _ = make(with_encoder(addp_run[0], **change))
    with pytest.raises(errors.UserError, match=said):
        task.load_pretrained()


def test_weights_that_are_not_there_or_have_no_encoder_are_named(tmp_path):
    with pytest.raises(errors.UserError, match="config.model.encoder_weights: nothing at 'nowhere'"):
        make(dataclasses.replace(PLAIN, encoder_weights="nowhere"))[0].load_pretrained()
    checkpoint.save_params(str(tmp_path), {"tokenizer": {"codebook": np.zeros((2, 2), np.float32)}}, {})
    with pytest.raises(errors.UserError, match="holds tokenizer, no encoder of pixels"):
        make(dataclasses.replace(PLAIN, encoder_weights=str(tmp_path)))[0].load_pretrained()


def test_a_run_begins_with_the_loaded_encoder_and_its_average_too(addp_run):
    config = programs.config("demo_classification", optim__ema_decay=0.9, model__encoder_weights=addp_run[0])
    run = program.create_training(config, num_train=64)
    with jax.set_mesh(run.mesh):
        state = run.init(jax.random.key(0), run.task.load_pretrained())
        fresh = run.init(jax.random.key(0))
    for params in (state.params, state.ema_params):
        np.testing.assert_array_equal(params["classifier"]["encoder"]["pos_embed"], addp_run[1]["pos_embed"])
    assert not np.array_equal(fresh.params["classifier"]["encoder"]["pos_embed"], addp_run[1]["pos_embed"])


def test_a_run_remembers_which_encoder_it_started_from(addp_run):
    """Resuming it with another one, or with none, is refused: the identities differ."""
    config = programs.config("demo_classification", model__encoder_weights=addp_run[0])
    run = program.create_training(config)
    identity = loop.identity(run, {}, run.task.load_pretrained())
    assert identity != loop.identity(run, {}, {}) and "classifier" in identity["init"]


def test_every_parameter_has_a_layout():
    partition.shardings(make()[1], partition.make_mesh(partition.Config()), heads.LAYOUT)


def test_the_evaluation_crop_is_the_protocols():
    config = dataclasses.replace(with_encoder(image_size=224, patch_size=16), crop_pct=0.875)
    image = classification.Task(config, jnp.float32).transform("eval", pipeline.Config()).transform
    assert int(image.size / image.crop_pct) == 256 and image.size == 224


def outcome(logits, labels, num_classes):
    return classification.report([(np.asarray(logits, np.float32), np.asarray(labels), np.ones(len(labels), bool))], num_classes)


def test_a_head_that_knows_nothing_names_nothing_rightly():
    scalars, _, _ = outcome(np.zeros((9, 3)), np.arange(9) % 3, 3)
    assert scalars["top1"] == scalars["class_mean"] == scalars["class/0"] == 0 and scalars["top5"] == 1
    assert scalars["loss"] == pytest.approx(np.log(3))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_wrong_in_every_figure(value):
    logits = np.eye(3, dtype=np.float32)[np.arange(6) % 3] * 5
    logits[:3, 0] = value
    scalars, images, _ = outcome(logits, np.arange(6) % 3, 3)
    assert scalars["top1"] == scalars["top5"] == scalars["class_mean"] == scalars["class_worst"] == 0.5
    assert not np.isfinite(scalars["loss"]) and "confusion" in images


def test_the_accuracies_agree_where_classes_are_equally_large():
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 3, (400, 4))  # many ties
    scalars, _, _ = outcome(logits, np.arange(400) % 4, 4)
    assert scalars["top1"] == pytest.approx(scalars["class_mean"]) and 0 < scalars["top1"] < 0.3


def test_an_evaluation_of_very_many_classes_is_small():
    """Of 200,000 classes a square of counts would take 320 GB."""
    logits = np.zeros((2, 200_000), np.float32)
    logits[0, 7] = logits[1, 9] = 1
    scalars, images, _ = outcome(logits, [7, 8], 200_000)
    assert scalars["top1"] == scalars["class_mean"] == 0.5 and scalars["class_worst"] == 0 and "class/7" not in scalars
    assert images["confusion"].size < 10**7

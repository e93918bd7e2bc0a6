"""The convolutional classifier and the task that trains it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from addp_jax import errors, partition, pictures
from addp_jax.data import pipeline
from addp_jax.models import convnet
from addp_jax.tasks import convnet as task_convnet

NET = convnet.Config(image_size=16, channels=8, multipliers=(1, 2), num_groups=4, num_classes=2)
CONFIG = task_convnet.Config(net=NET)
SHAPES = pipeline.Config(num_train=64, num_eval=16, threads=0)


@functools.cache
def make(config=CONFIG):
    task = task_convnet.Task(config, jnp.float32)
    return task, jax.jit(task.init)(jax.random.key(0))


def batch(count=16, seed=0):
    """Class 1 has a bright square somewhere, class 0 has none."""
    rng = np.random.default_rng(seed)
    label = np.arange(count, dtype=np.int32) % 2
    image = rng.integers(0, 80, (count, 16, 16, 3), dtype=np.uint8)
    for n in np.flatnonzero(label):
        top, left = rng.integers(0, 8, 2)
        image[n, top : top + 8, left : left + 8] += 150
    return {"image": image, "label": label, "valid": np.ones(count, bool)}


def test_logits_are_read_off_the_features():
    net, params = make()[0].net, make()[1]["convnet"]
    image = jnp.asarray(batch(3)["image"], jnp.float32) / 255
    features = net.apply({"params": params}, image, method="features")
    assert features.shape == (3, 16) and features.dtype == jnp.float32
    expected = features @ params["dense_out"]["kernel"] + params["dense_out"]["bias"][None]
    np.testing.assert_allclose(net.apply({"params": params}, image), expected, rtol=1e-5)


def test_a_size_that_does_not_halve_evenly_works():
    net = convnet.ConvNet(dataclasses.replace(NET, image_size=18, multipliers=(1, 1, 1)))
    shape = jax.eval_shape(lambda: net.init_with_output(jax.random.key(0), jnp.zeros((2, 18, 18, 3)))[0])
    assert shape.shape == (2, 2)


@pytest.mark.parametrize("change", (dict(image_size=15), dict(image_size=2), dict(num_groups=3)))
def test_sizes_that_do_not_fit_are_refused(change):
    with pytest.raises(ValueError, match="image_size|num_groups"):
        dataclasses.replace(NET, **change)


def test_every_parameter_has_a_layout():
    partition.shardings(make()[1], partition.make_mesh(partition.Config()), convnet.LAYOUT)


@pytest.mark.medium
def test_two_plain_classes_are_learned():
    task, params = make()
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state, batch, rng):
        grads = jax.grad(lambda params: task.loss(params, {}, batch, rng, True)[0])(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for n in range(60):
        params, state = step(params, state, batch(32, n), jax.random.key(n))
    scalars, images, _ = task.evaluate(params, {}, [batch(32, 1000)], None)
    assert scalars["accuracy"] > 0.95 and 0.8 < scalars["confidence"] <= 1
    assert images["predictions"].ndim == 3

    noise = jax.random.uniform(jax.random.key(5), (64, 16, 16, 3))
    top = jax.nn.softmax(task.net.apply({"params": params["convnet"]}, noise)).max(-1)
    assert top.mean() < 0.7  # of two classes: half is knowing nothing


def test_evaluation_counts_valid_examples_only():
    task, params = make()
    whole = batch(16)
    logits = task.net.apply({"params": params["convnet"]}, whole["image"] / 255.0)
    right = whole | {"valid": np.asarray(logits).argmax(-1) == whole["label"]}
    assert 0 < right["valid"].sum() < 16
    assert task.evaluate(params, {}, [right], None)[0]["accuracy"] == 1.0
    assert task.evaluate(params, {}, [], None)[0] == {}


def test_spoiled_images_have_no_class():
    """With nothing but spoiled images the labels make no difference; with none they do."""
    for share, same in ((1 - 2**-20, True), (0.0, False)):
        task, params = make(dataclasses.replace(CONFIG, outliers=share))
        loss = jax.jit(lambda label: task.loss(params, {}, batch() | {"label": label}, jax.random.key(1), True)[0])
        one, other = (loss(np.full(16, label, np.int32)) for label in (0, 1))
        assert same == bool(one == other)


def test_evaluation_looks_at_images_as_they_are():
    task, params = make(dataclasses.replace(CONFIG, outliers=1 - 2**-20, noise=1.0))
    values, kept = task._per_example(params, batch(), jax.random.key(0), False)
    logits = task.net.apply({"params": params["convnet"]}, batch()["image"] / np.float32(255))
    assert kept.all() and np.array_equal(values["top"], logits.argmax(-1))


def test_blur_keeps_flat_images_and_spreads_a_point():
    flat = jnp.full((2, 8, 8, 3), 0.25)
    sigma = jnp.array([0.01, 2.0])
    np.testing.assert_allclose(task_convnet.blur(flat, sigma), flat, rtol=1e-5)
    point = jnp.zeros((2, 9, 9, 3)).at[:, 4, 4].set(1.0)
    sharp, soft = task_convnet.blur(point, sigma)
    np.testing.assert_allclose(sharp, point[0], atol=1e-6)
    assert soft[4, 4, 0] < 0.1 and soft[4, 6, 0] > soft[4, 8, 0] > 0


def test_shuffled_blocks_are_the_same_blocks():
    image = jnp.arange(2 * 8 * 8 * 3, dtype=jnp.float32).reshape(2, 8, 8, 3)
    shuffled = task_convnet.shuffle_blocks(jax.random.key(0), image)
    assert shuffled.shape == image.shape
    for before, after in zip(np.asarray(image), np.asarray(shuffled)):
        assert not np.array_equal(before, after)
        assert {block.tobytes() for block in blocks(before)} == {block.tobytes() for block in blocks(after)}


def blocks(image, size=8 // task_convnet.BLOCKS):
    return [image[y : y + size, x : x + size] for y in range(0, 8, size) for x in range(0, 8, size)]


def test_more_classes_in_the_data_are_refused_before_training():
    with pytest.raises(errors.UserError, match="config.model.net.num_classes = 2, but the data has 8 classes"):
        make()[0].open_source("train", SHAPES)


@pytest.mark.parametrize("label", (-1, 2))
def test_a_label_outside_the_classes_is_refused(label):
    transform = make()[0].transform("eval", SHAPES)
    example = {"image": np.zeros((20, 30, 3), np.uint8), "path": "dog.png"}
    assert transform(example | {"label": 1}, np.random.default_rng(0))["image"].shape == (16, 16, 3)
    with pytest.raises(errors.UserError, match="dog.png has label"):
        transform(example | {"label": label}, np.random.default_rng(0))


def test_contact_sheet_has_each_image_above_its_caption():
    images = np.stack([np.full((20, 30, 3), shade, np.uint8) for shade in (10, 20, 30)])
    sheet = pictures.contact_sheet(["a", "b", "c"], images, columns=2)
    assert (sheet[2:22, 2:32] == 10).all() and (sheet[2:22, 34:64] == 20).all()
    assert sheet[22:38, 2:32].min() < 128  # the caption's ink

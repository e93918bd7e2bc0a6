"""The task of segmentation against mmsegmentation's numbers: losses, learning rates, weight decay; and what shares change."""

import dataclasses
import json

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import uper

from addp_jax import optim, parameters, partition, processes, schema, tasks
from addp_jax.models import batch_norm, beit, segmenter
from addp_jax.ops import windows
from addp_jax.tasks import segmentation
from addp_jax.weights import mmsegmentation

pytestmark = pytest.mark.golden

CONFIG = dataclasses.replace(uper.CONFIG, dropout=0.0, encoder=dataclasses.replace(uper.CONFIG.encoder, drop_path=0.0))
SIDE, CLASSES = CONFIG.encoder.image_size, CONFIG.num_classes
GOLD = dense.arrays("upernet")
PARAMS = {"segmenter": uper.params()}


def task(**changes):
    return segmentation.Task(segmentation.Config(CONFIG, **changes), jnp.float32)


@pytest.fixture
def taps(monkeypatch):
    """The reference's heads were run on taps of their own."""
    taps = [dense.our_order(GOLD[f"tap_{index}"]) for index in range(4)]

    def logits(net, params, image, size, rng):
        out, measured = net.apply({"params": params}, taps, True, method="from_taps", mutable=[batch_norm.COLLECTION])
        return out, measured[batch_norm.COLLECTION]

    monkeypatch.setattr(segmenter, "training_logits", logits)


@pytest.mark.medium
def test_losses(taps):
    label = np.stack([GOLD["label_0"], GOLD["label_1"]])
    batch = {"image": np.zeros((2, SIDE, SIDE, 3), np.uint8), "size": None, "label": label}
    found, metrics = task().loss(PARAMS, {}, batch, None, True)
    np.testing.assert_allclose(metrics["loss_main"], GOLD["loss_ce"], rtol=1e-6)
    np.testing.assert_allclose(metrics["loss_auxiliary"], GOLD["aux_loss_ce"], rtol=2e-6)
    np.testing.assert_allclose(found, GOLD["loss_ce"] + GOLD["aux_loss_ce"], rtol=1e-6)
    _, metrics = task(counted_only=True).loss(PARAMS, {}, batch, None, True)
    np.testing.assert_allclose(metrics["loss_main"], GOLD["loss_ce_non_ignored"], rtol=1e-6)


def test_learning_rates_and_weight_decay_of_the_recipe():
    """By mmsegmentation's names, on the small network."""
    from configs import ade20k

    gold, config = dense.arrays("optim"), ade20k.get_config("b")
    settings = schema.build(optim.Config, config.optim.to_dict())
    rate = optim.schedule(settings, optim.Length(config.steps, settings.warmup_steps), config.batch_size)
    found = [float(rate(step)) for step in gold["seg_steps"]]
    np.testing.assert_allclose(found, gold["seg_lr"], rtol=2e-5, atol=1e-10)
    # The reference's list is of a net of its own depth, which may be another one than that of the weights.
    names = [str(name) for name in gold["seg_names"]]
    depth = 1 + max(int(name.split(".")[2]) for name in names if name.startswith("backbone.layers."))
    encoder = dataclasses.replace(CONFIG.encoder, depth=depth, taps=beit.even_taps(depth))
    net = dataclasses.replace(CONFIG, encoder=encoder)
    shapes = jax.eval_shape(lambda: segmenter.init(segmenter.Segmenter(net), jax.random.key(0)))
    full = lambda values: jax.tree.map(lambda value, leaf: np.broadcast_to(value, leaf.shape).astype(np.float32), values, shapes)
    factors = full(optim.layer_scales({"segmenter": shapes}, settings.layer_decay)["segmenter"])
    decayed = full(optim.decay_mask(shapes, settings.not_decayed))
    factors, decayed = (mmsegmentation.to_mmsegmentation(values, net) for values in (factors, decayed))
    for name, factor, decay in zip(names, gold["seg_lr_factor"], gold["seg_weight_decay"]):
        np.testing.assert_allclose(factors[name], factor, rtol=1e-6, err_msg=name)
        np.testing.assert_array_equal(decayed[name] * settings.weight_decay, np.float32(decay), err_msg=name)


def batch(count: int = 8) -> dict:
    rng = np.random.default_rng(0)
    size = np.tile(np.array([[SIDE, SIDE], [SIDE - 9, SIDE], [SIDE, SIDE // 2], [SIDE // 3, SIDE]], np.int32), (count // 4, 1))
    label = rng.integers(0, CLASSES, (count, SIDE, SIDE), np.uint8)
    for k, (height, width) in enumerate(size):
        label[k, height:], label[k, :, width:] = 255, 255
    return {"image": rng.integers(0, 256, (count, SIDE, SIDE, 3), np.uint8), "label": label, "size": size}


@pytest.mark.medium
def test_two_devices_equal_one_statistics_included():
    """Losses, gradients and running statistics; means over a batch are those of the whole batch."""
    step = lambda params, batch: jax.grad(lambda p: task().loss(p, {}, batch, jax.random.key(0), True), has_aux=True)(params)
    results = []
    for count in (1, 2):
        mesh = partition.make_mesh(partition.Config(data=count), jax.devices()[:count])
        with jax.set_mesh(mesh):
            placed = partition.put(batch(), partition.batch_sharding(mesh))
            results.append(jax.device_get(jax.jit(step)(partition.put(PARAMS, partition.replicated(mesh)), placed)))
    (grads, metrics), (grads2, metrics2) = results
    assert parameters.named_leaves(metrics[tasks.STATISTICS]).keys() == parameters.named_leaves(parameters.running(PARAMS)).keys()
    before = parameters.running(PARAMS)["segmenter"]["auxiliary"]["norm"]["running_mean"]
    assert np.abs(metrics[tasks.STATISTICS]["segmenter"]["auxiliary"]["norm"]["running_mean"] - before).max() > 1e-3
    for one, two in zip(jax.tree.leaves(metrics), jax.tree.leaves(metrics2), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
    for one, two in zip(jax.tree.leaves(grads), jax.tree.leaves(grads2), strict=True):
        # Statistics of few values magnify rounding, on some CPUs to a thousandth; those of one device alone differ by far.
        np.testing.assert_allclose(one, two, rtol=0, atol=3e-3 * max(np.abs(one).max(), 1e-3))


def test_what_lies_beyond_the_crop_changes_no_loss():
    found, other = batch(4), batch(4)
    for k, (height, width) in enumerate(other["size"]):
        other["image"][k, height:], other["image"][k, :, width:] = 201, 13
    loss = jax.jit(lambda batch: task().loss(PARAMS, {}, batch, jax.random.key(0), True)[0])
    np.testing.assert_array_equal(loss(found), loss(other))


def images(sizes=((SIDE, SIDE), (SIDE + 50, 2 * SIDE), (40, 23))):
    return [np.random.default_rng(n).integers(0, 256, (*size, 3), np.uint8) for n, size in enumerate(sizes)]


@pytest.mark.medium
def test_labels_do_not_depend_on_devices_and_batches_of_windows():
    one, expected = task(windows=windows.Config(scales=(1.0, 1.5), flip=True, batch=3)), []
    for image in images():
        expected.append(one.segment(PARAMS, {}, image))  # no mesh is needed
        assert expected[-1].shape == image.shape[:2] and expected[-1].dtype == np.uint8
        crops = windows.calls(image.shape[:2], SIDE, one.config.windows)
        assert crops == sum(-(-len(v.corners) // 3) for v in windows.views(image.shape[:2], SIDE, one.config.windows))
    assert len(np.unique(expected[1])) > 1
    mesh = partition.make_mesh(partition.Config(data=2, fsdp=2, tensor=2))
    layout = partition.shardings(PARAMS, mesh, one.layout)
    with jax.set_mesh(mesh):
        placed = partition.put(PARAMS, layout)
        for image, label in zip(images(), expected):
            assert (one.segment(placed, {}, image) != label).mean() < 1e-3
            assert (one.segment(placed, {}, image, batch=1) != label).mean() < 1e-3


def test_a_process_without_an_image_calls_as_often_as_the_others(monkeypatch):
    one, calls = task(), []
    monkeypatch.setattr(processes, "largest", lambda value: max(value, 3))
    original = one._logits
    monkeypatch.setattr(one, "_logits", lambda *args: calls.append(1) or original(*args))
    assert one.segment(PARAMS, {}, None) is None and len(calls) == 3
    assert one.segment(PARAMS, {}, images()[0]) is not None and len(calls) == 6


class Known:
    """A source of two classes."""

    classes = ("sky", "sea")


def test_figures_of_images_of_differing_sizes(monkeypatch):
    one = task()
    examples = [{"image": image, "index": np.int32(n), "valid": True} for n, image in enumerate(images())]
    for example in examples:
        shape = example["image"].shape[:2]
        example["label"] = np.where(np.arange(shape[1])[None] < shape[1] // 2, 0, 1).astype(np.uint8)
        example["label"] = np.broadcast_to(example["label"], shape).copy()
        example["label"][:2] = 255
    examples.append(examples[0] | {"valid": False})
    # Right but for the left column; class 2 is never there.
    monkeypatch.setattr(one, "segment", lambda params, frozen, image: None if image is None else answer(image))

    def answer(image):
        label = np.where(np.arange(image.shape[1]) < image.shape[1] // 2, 0, 1)
        label[0] = 2
        return np.broadcast_to(label.astype(np.uint8), image.shape[:2])

    scalars, drawn, files = one.evaluate(PARAMS, {}, examples, Known)
    rows = [example["image"].shape[0] - 2 for example in examples[:3]]
    pixels = [row * example["image"].shape[1] for row, example in zip(rows, examples)]
    np.testing.assert_allclose(scalars["aAcc"], 1 - sum(rows) / sum(pixels))
    left = sum(row * (example["image"].shape[1] // 2) for row, example in zip(rows, examples))
    np.testing.assert_allclose(scalars["IoU/sky"], 1 - sum(rows) / left)
    assert scalars["IoU/sea"] == 1 and scalars["IoU/class 2"] == 0 and "IoU/class 3" not in scalars
    np.testing.assert_allclose(scalars["mIoU"], np.mean([scalars["IoU/sky"], 1, 0]))
    table = json.loads(files["IoU.json"])
    assert [row["class"] for row in table[:3]] == ["sky", "sea", "class 2"] and len(table) == CLASSES
    assert table[3]["IoU"] is None and table[2]["accuracy"] is None
    assert drawn["segmentation"].shape[1] > 2 * SIDE and drawn["confusion"].ndim == 3

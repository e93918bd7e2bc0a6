"""Frozen features: computed once, then a linear classifier and neighbours on them."""

import concurrent.futures
import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from addp_jax import errors, optim, partition
from addp_jax.data import features, pipeline
from addp_jax.data.sources import image_folder
from addp_jax.models import heads, vit
from addp_jax.tasks import linear_probe

ENCODER = vit.Config(16, 3, 2, dropout=0.0, image_size=16, patch_size=4, input_dropout=0.0)
CONFIG = linear_probe.Config(num_classes=8, encoder=ENCODER, encoder_weights="random", neighbours=3)
SHAPES = pipeline.Config(num_train=48, num_eval=24, threads=0)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("features"))


def make(cache, **changes):
    return linear_probe.Task(dataclasses.replace(CONFIG, cache=cache, **changes), jnp.float32)


def test_features_are_computed_once_and_follow_the_data(cache, monkeypatch):
    first = make(cache).open_source("train", SHAPES)
    assert first.features.shape == (48, 16) and first.features.dtype == np.float32
    np.testing.assert_array_equal(first.labels, np.arange(48) % 8)
    with monkeypatch.context() as patch:
        patch.setattr(linear_probe.Task, "_compute", None)  # a second computation would fail
        again = make(cache, shots=2).open_source("train", SHAPES)
        assert np.bincount(again.labels).tolist() == [2] * 8


def test_whatever_changes_the_features_changes_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(linear_probe.Task, "_compute", lambda *_: [(np.zeros((1, 16)), np.zeros(1))])
    monkeypatch.setattr(linear_probe.Task, "_encoder", {"kernel": np.zeros(1)})
    encoder = functools.partial(dataclasses.replace, ENCODER)
    changes = [
        {}, dict(pooling="class"), dict(block=1), dict(crop_pct=0.5), dict(encoder=encoder(heads=4)),
        dict(encoder=encoder(depth=2)), dict(encoder=encoder(input_norm=False)),
    ]  # fmt: skip
    for count, change in enumerate(changes, 1):
        make(str(tmp_path), **change).open_source("train", SHAPES)
        assert len(os.listdir(tmp_path)) == count
    make(str(tmp_path)).open_source("train", dataclasses.replace(SHAPES, num_train=40))
    monkeypatch.setattr(linear_probe.Task, "_encoder", {"kernel": np.ones(1)})
    make(str(tmp_path)).open_source("train", SHAPES)
    monkeypatch.setattr(features, "code", lambda: "another version")
    make(str(tmp_path)).open_source("train", SHAPES)
    assert len(os.listdir(tmp_path)) == len(changes) + 3


def test_a_rewritten_file_makes_another_fingerprint(tmp_path):
    """Of the same length and with its time of modification set back, as tar and rsync do."""
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "a.bmp")
    source = image_folder.open_folder(str(tmp_path), "here")
    before, status = source.fingerprint(times=True), os.stat(tmp_path / "a.bmp")
    assert source.fingerprint(times=True) == before
    Image.fromarray(np.ones((4, 4, 3), np.uint8)).save(tmp_path / "a.bmp")
    os.utime(tmp_path / "a.bmp", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert source.fingerprint(times=True) != before
    os.remove(tmp_path / "a.bmp")
    with pytest.raises(errors.UserError, match="cannot read .*a.bmp"):
        source.fingerprint(times=True)


def test_features_are_computed_where_no_mesh_has_been_entered_yet(tmp_path):
    with concurrent.futures.ThreadPoolExecutor(1) as elsewhere:  # a mesh belongs to its thread
        found = elsewhere.submit(make(str(tmp_path)).open_source, "eval", SHAPES).result()
    assert found.features.shape == (24, 16)


def test_features_are_those_of_the_image(cache):
    task = make(cache)
    cached = task.open_source("eval", SHAPES)
    image = np.stack([pipeline.open_source(SHAPES, "eval", 16)[i]["image"] for i in range(3)])
    np.testing.assert_allclose(jit(task.features)({}, task.load_frozen(), image), cached.features[:3], atol=1e-4)


def test_a_block_gives_what_the_whole_encoder_has_there(cache):
    params = make(cache).load_frozen()["encoder"]
    image = jnp.asarray(np.random.default_rng(0).random((2, 16, 16, 3)), jnp.float32)
    capture = lambda module, name: isinstance(module, vit.layers.Block)
    whole = functools.partial(vit.VisionTransformer(ENCODER).apply, capture_intermediates=capture, mutable="intermediates")
    tokens, state = jit(whole)({"params": params}, image)
    each = jax.tree.leaves(state)[0]  # [depth,B,1+L,D]
    assert each.shape == (3, 2, 17, 16)
    for block, expected in ((1, each[0]), (2, each[1]), (3, tokens)):
        ours = jit(functools.partial(heads.block_features, ENCODER, block=block, pooling="mean"))(params, image)
        np.testing.assert_allclose(ours, expected[:, 1:].mean(1), atol=1e-5)


def test_the_folded_batch_norm_standardises_the_training_features(cache):
    task = make(cache)
    rows = task.open_source("train", SHAPES).features
    norm = task.load_pretrained()["linear_probe"]
    standard = rows * norm["norm_scale"] + norm["norm_bias"]
    np.testing.assert_allclose(standard.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(standard.std(0), 1, atol=0.05)


@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
def test_only_the_linear_layer_is_trained(cache, optimizer):
    task = make(cache)
    params = task.init(jax.random.key(0))
    batch = {"features": np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32)}
    batch["label"] = (batch["features"][:, :8].argmax(1)).astype(np.int32)
    rate = {"adamw": 0.05, "lars": 8.0}[optimizer]
    chain = optim.build(optim.Config(optimizer=optimizer, weight_decay=0.1, clip_norm=0.0), rate)

    @jit
    def step(params, state):
        (loss, _), grads = jax.value_and_grad(task.loss, has_aux=True)(params, {}, batch, None, True)
        updates, state = chain.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state, loss

    state, losses, new = chain.init(params), [], params
    for _ in range(100):
        new, state, loss = step(new, state)
        losses.append(float(loss))
    assert losses[-1] < 0.6 * losses[0]
    for name in ("norm_scale", "norm_bias"):
        np.testing.assert_array_equal(new["linear_probe"][name], params["linear_probe"][name])


def test_evaluation_reports_the_probe_and_the_neighbours(cache):
    task = make(cache, neighbours=1)
    held_out = task.open_source("train", SHAPES)  # the training examples themselves: each is its own neighbour
    batch = {"features": held_out.features, "label": held_out.labels, "valid": np.arange(48) < 40}
    scalars, images, _ = task.evaluate(task.init(jax.random.key(0)), {}, [batch], None)
    assert {"loss", "top1", "top5", "knn_top1", "knn_plain_top1"} <= set(scalars) and "confusion" in images
    assert scalars["knn_top1"] > 0.9


def test_few_shot_choice_depends_on_its_seed_alone():
    whole = features.Features(np.arange(40, dtype=np.float32)[:, None], (np.arange(40) % 4).astype(np.int32), ())
    one, same, other = (whole.few(3, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.features, same.features)
    assert not np.array_equal(one.features, other.features)
    with pytest.raises(errors.UserError, match="config.model.shots = 11, but class 0 has 10"):
        whole.few(11, 0)


def test_a_damaged_cache_is_named(tmp_path):
    source = features.Features(np.zeros((2, 1)), np.zeros(2, np.int32), ("a",))
    batches = [(np.zeros((2, 1)), np.zeros(2))]
    assert features.cached(str(tmp_path), "x", source, lambda: batches).classes == ("a",)
    (tmp_path / "x.npz").write_bytes(b"no")
    with pytest.raises(errors.UserError, match="config.model.cache: cannot read"):
        features.cached(str(tmp_path), "x", source, None)
    assert [file.name for file in tmp_path.iterdir()] == ["x.npz"]


def test_the_fingerprint_follows_files(tmp_path):
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    data = pipeline.Config(source="image_folder", path=str(tmp_path))
    before = pipeline.open_source(data, "train").fingerprint(times=True)
    assert before == pipeline.open_source(data, "train").fingerprint(times=True)
    part = pipeline.open_source(dataclasses.replace(data, num_train=1), "train")
    assert part.fingerprint(times=True) != before
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        Image.new("RGB", (5, 4)).save(tmp_path / name)
    assert pipeline.open_source(data, "train").fingerprint(times=True) != before


@pytest.mark.parametrize("change", [dict(block=0), dict(block=4), dict(pooling="max")])
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match="block|pooling"):
        dataclasses.replace(CONFIG, **change)


def test_labels_outside_the_classes_are_refused(cache):
    with pytest.raises(errors.UserError, match="config.model.num_classes = 5, but the data has 8 classes: circle"):
        make(cache, num_classes=5).open_source("train", SHAPES)


def test_an_encoder_must_be_given(cache):
    with pytest.raises(errors.UserError, match="config.model.encoder_weights"):
        make(cache, encoder_weights="").open_source("train", SHAPES)


def test_every_parameter_has_a_layout(cache):
    task = make(cache)
    partition.shardings(task.init(jax.random.key(0)), partition.make_mesh(partition.Config()), task.layout)

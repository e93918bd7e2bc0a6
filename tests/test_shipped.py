"""The trained model in the package: what it draws, keeps and tells apart; found by its name from anywhere."""

import subprocess
import sys

import numpy as np
import pytest

import addp_jax
from addp_jax import errors
from addp_jax.api import loading
from addp_jax.data import pipeline
from addp_jax.metrics import reconstruction

FILE = loading.SHIPPED / "shapes.safetensors"


@pytest.fixture(scope="module")
def model():
    return addp_jax.load("shapes")


def held_out(model, count):
    """(images uint8 [n,S,S,3], labels [n]) that the model has not seen."""
    source = pipeline.open_source(pipeline.Config(shapes="plain"), "eval", model.image_size)
    examples = [source[i] for i in range(count)]
    return np.stack([e["image"] for e in examples]), np.array([e["label"] for e in examples])


def psnr(*images):
    """Of all values of uint8 arrays together, in dB."""
    return float(reconstruction.psnr(*(array.reshape(1, -1, 1, 3) / 255 for array in images))[0])


def nearest(images, bank):
    """Of each image the closest of the bank: (its index, root of the mean squared difference of their values, 0..255)."""
    flat, known = (array.reshape(len(array), -1).astype(np.float32) for array in (images, bank))
    squared = (flat**2).sum(1)[:, None] - 2 * flat @ known.T + (known**2).sum(1)
    return squared.argmin(1), np.sqrt(np.maximum(squared.min(1), 0) / flat.shape[1])


def test_its_file_is_small_and_is_found_from_anywhere(tmp_path):
    assert FILE.stat().st_size <= 6e6
    code = "import addp_jax; print(addp_jax.load('shapes'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "task addp" in done.stdout and "tensor" not in done.stderr, done.stderr


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    (tmp_path / "shapes").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.UserError, match=r"shapes has no config\.json"):
        addp_jax.load("shapes")
    with pytest.raises(errors.UserError, match='nothing at shape: give .* or "shapes"'):
        addp_jax.load("shape")


def test_the_tokenizer_keeps_shapes_that_it_has_not_seen(model):
    images, _ = held_out(model, 32)
    assert psnr(model.reconstruct(images), images) > 28


def test_samples_look_like_shapes_and_differ(model):
    images, labels = held_out(model, 1000)
    samples = model.sample(32, seed=0)
    found, distance = nearest(samples, images)
    _, usual = nearest(images[:200], images[200:])
    assert np.median(distance) < 1.75 * np.median(usual)
    assert len(set(labels[found])) >= 6 and len(np.unique(found)) >= 20


def test_an_edit_keeps_what_is_outside_the_mask(model):
    images, _ = held_out(model, 1)
    mask = np.zeros(images.shape[1:3], bool)
    mask[:, 24:] = True
    edited = model.edit(images[0], mask, n=4, seed=0)
    kept, again = edited[:, :, :16], model.reconstruct(images)[0, :, :16]
    assert all(psnr(one, again) > 28 for one in kept)
    assert len(np.unique(edited, axis=0)) > 1

